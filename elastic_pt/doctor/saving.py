"""Whether a node that must leave can save its state: the time of an upload against the notice of its platform.

Command line's process.
"""

import asyncio
from typing import Final

import aiohttp

from elastic_pt.config import Config, ElasticSection
from elastic_pt.doctor.bucket import Speed
from elastic_pt.doctor.check import Check, judged, one_line, rate, seconds, size
from elastic_pt.doctor.machine import Needs
from elastic_pt.notices.detect import Machine, chosen, sources

LEADS_S: Final = {"aws": 120.0, "gcp": 30.0, "azure": 30.0}
"""What a platform promises between its notice and the end of a spot machine (docs/notices.md)."""
_ASKED: Final = ("aws", "gcp", "file")
"""Sources that answer at once. Azure's first answer may take two minutes, and a webhook is asked by others."""
_ASK_TIMEOUT_S: Final = 3.0
_UPLOAD_MARGIN: Final = 1.3
"""As the agent's own plan to leave has it (docs/notices.md)."""


def notices(elastic: ElasticSection, machine: Machine, node: str) -> Check:
    """Which sources of notices this machine has, whether they are watched, and whether they answer."""
    there, watched = chosen("auto", machine), chosen(elastic.notices, machine)
    missed = [each for each in there if each not in {name.partition(":")[0] for name in watched}]
    missed = [each for each in missed if each not in watched]
    silent = _silent(watched, node)
    if machine.supervisor:
        found = f"{machine.supervisor} sends a signal" + (
            f"; also {', '.join(watched)}" if watched else ""
        )
    else:
        found = ", ".join(watched) or "no source: a signal is the only notice"
    if missed:
        found = f"this machine has {', '.join(missed)}, which elastic.notices leaves out"
    elif silent:
        found = "; ".join(f"{name} does not answer: {why}" for name, why in silent.items())
    return judged(
        "notices",
        not missed and not silent,
        found,
        "the notices of this machine's platform are watched, and answer",
        "elastic.notices = 'auto'; in a container on AWS set the instance's metadata hop limit to 2",
    )


def _silent(watched: tuple[str, ...], node: str) -> dict[str, str]:
    """The sources that do not answer, and why."""
    asked = tuple(each for each in watched if each.partition(":")[0] in _ASKED)
    return asyncio.run(_ask(asked, node)) if asked else {}


async def _ask(asked: tuple[str, ...], node: str) -> dict[str, str]:
    found: dict[str, str] = {}
    # As the agent does: no proxy, because a metadata server is on this machine.
    async with aiohttp.ClientSession(trust_env=False) as session:
        for source in sources(asked, node, b""):
            try:
                async with asyncio.timeout(_ASK_TIMEOUT_S):
                    await source.read(session)
            except TimeoutError:
                found[source.name] = f"nothing within {_ASK_TIMEOUT_S:g} s"
            except Exception as error:  # as `Watch`: a source may raise anything
                found[source.name] = one_line(str(error)) or type(error).__name__
    return found


def grace_of(elastic: ElasticSection, watched: tuple[str, ...]) -> tuple[float, str]:
    """The least time that a node has to leave, and what sets it. Pure."""
    limits = [(elastic.leave_timeout_s, "elastic.leave_timeout_s")]
    names = (each.partition(":")[0] for each in watched)
    limits += [(LEADS_S[name], f"the notice of {name}") for name in names if name in LEADS_S]
    return min(limits)


def checkpoint(config: Config, needs: Needs, speed: Speed, watched: tuple[str, ...]) -> Check:
    """Size of a checkpoint, and whether this node uploads its share before it must be gone. Pure."""
    grace_s, why = grace_of(config.elastic, watched)
    takes_s = _UPLOAD_MARGIN * needs.share_bytes / speed.up
    mirrored = needs.copies > 0
    return judged(
        "checkpoint",
        takes_s <= grace_s,
        f"{size(needs.state_bytes)} ({needs.parameters:,} parameters); this node's share of {size(needs.share_bytes)} "
        f"takes {seconds(takes_s)} at {rate(speed.up)}",
        f"at most {seconds(grace_s)}, {why}",
        "use more nodes, a nearer bucket, or a longer elastic.leave_timeout_s where the platform gives the time"
        + ("; other nodes have a copy in memory and go on from it" * mirrored),
    )
