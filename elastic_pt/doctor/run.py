"""Checks of the run at a URL: its state, and whether it would accept this machine.

Command line's process.
"""

from collections.abc import Mapping

from elastic_pt.config import INTRODUCED, Config
from elastic_pt.data.manifest import Manifest
from elastic_pt.doctor.check import Check, judged
from elastic_pt.errors import ConfigError, NotFound
from elastic_pt.runlog.identity import differing_names, identity_of, platform_in, read_identity
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import COMPLETED
from elastic_pt.store.port import Store

_ORDER = "data.order"
_PROBE = "probe"


def state(view: RunView, *, begun: bool) -> Check:
    """Whether agents can take part in the run. Pure."""
    expected = "no run yet, or one that has not failed"
    if view.stop is not None:
        found = f"ended: {view.stop.reason}"
    elif view.generation is not None:
        nodes = len(view.generation.members)
        found = f"generation {view.generation_number} of {nodes} nodes, {view.length} records"
    else:
        found = "no generation yet" if begun else "no run there yet"
    ok = view.stop is None or view.stop.reason == COMPLETED
    return judged(
        "run", ok, found, expected, "fix the cause, then elastic-pt reopen RUN_URL --why TEXT"
    )


def identity(
    store: Store, config: Config, data: Manifest, platform: Mapping[str, str], view: RunView
) -> Check | None:
    """Whether the run's recorded values are those of this machine and configuration; None if there are none yet.

    The probe of the platform is left out: the agent computes it at its start.
    """
    expected = "the values that the run was started with"
    try:
        theirs = read_identity(store)
    except NotFound:
        return None
    except ConfigError as error:
        return Check("identity", False, str(error), expected, "restore the object from a copy")
    mine = identity_of(config, data, platform)
    names = {name for name in mine.keys() | theirs.keys() if "." in name and name != _ORDER}
    differs = [
        f"{name} = {mine.get(name, INTRODUCED.get(name))!r}, the run has {theirs.get(name, INTRODUCED.get(name))!r}"
        for name in sorted(names)
        if mine.get(name, INTRODUCED.get(name)) != theirs.get(name, INTRODUCED.get(name))
    ]
    # None: an operator has reopened the run for any platform.
    if view.platform is not None and platform:
        bound = view.platform or platform_in(theirs)
        bound = {name: value for name, value in bound.items() if name != _PROBE}
        differs += [
            f"{name} = {platform.get(name)!r}, the run has {bound[name]!r}"
            for name in differing_names(bound, platform)
        ]
    return judged(
        "identity",
        not differs,
        "; ".join(differs) or "the same configuration, data and platform as the run",
        expected,
        "start this node with the run's URL and the same environment; for another run choose another run.url; "
        "for another platform: elastic-pt reopen RUN_URL --platform --why TEXT",
    )
