"""What all nodes of a run must agree on. The first node writes it into the run directory.

- `config.toml`: the effective configuration. `elastic-pt run RUN_URL` needs nothing else. Of `[telemetry]`, which each
  node has for itself, it has only what belongs to the type of machine.
- `identity.json`: the values that decide the bits, by name. A node with another value is refused, and the message
  names it. Names with a dot belong to the configuration and the data, the others to the platform. The version of the
  data order (`data.order`) is not compared: a run keeps the one that it began with.

A later version may know more names of its platform than the run has recorded. Those are not compared, and the
next generation records all of them.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

import elastic_pt
from elastic_pt.config import INTRODUCED, Config, TelemetrySection, parse_config
from elastic_pt.data.lanes import LANES_VERSION
from elastic_pt.data.manifest import Manifest
from elastic_pt.data.order import ORDER_VERSION
from elastic_pt.errors import AlreadyExists, ConfigError, NotFound
from elastic_pt.runlog.log import RunView
from elastic_pt.store.port import Store

CONFIG_KEY: Final = "config.toml"
IDENTITY_KEY: Final = "identity.json"
EXPLAINING: Final = ("driver", "processor model")
"""Names of a platform that may differ as long as the probe is equal. They explain a probe that differs."""
_OF_THE_MACHINE: Final = {"price_per_hour", "peak_flops"}
"""Keys of `[telemetry]` that a node which joins by the URL takes from the run: most fleets have machines of one type."""
_ORDER: Final = "data.order"
_PROBE: Final = "probe"
_ENVIRONMENT: Final = "environment"
_CODE_DIGITS: Final = 16
_Plain = str | int | float | bool | list[Any] | dict[str, Any] | None
_IDENTITY: Final[TypeAdapter[dict[str, Any]]] = TypeAdapter(dict[str, _Plain])


def identity_of(config: Config, data: Manifest, platform: Mapping[str, str]) -> dict[str, Any]:
    """The values that decide the bits of the weights, by name.

    `platform` comes from `train.probe`. Native numerics promises no bits, so it leaves the platform out.
    """
    return {
        **config.identity(),
        **(platform if config.train.numerics == "exact" else {}),
        "data.url (fingerprint)": data.fingerprint,
        "data.url (tokenizer)": data.tokenizer_sha256,
    }


def fingerprint(config: Config, data: Manifest, platform: Mapping[str, str]) -> dict[str, str]:
    """The values that members compare when a node joins, by name.

    In addition to the run's identity they include the code and `[evaluation]`: a run may go on with newer code and other
    evaluations, but not with two kinds at the same time.
    """
    deciding = {name: value for name, value in platform.items() if name not in EXPLAINING}
    identity = identity_of(config, data, {})
    return {
        **deciding,
        "code": code(),
        "train.compute_dtype": config.train.compute_dtype,
        **{
            f"evaluation.{key}": str(value) for key, value in config.evaluation.model_dump().items()
        },
        "data": data.fingerprint,
        "config": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
    }


def code() -> str:
    """The version of this package, and the beginning of the SHA-256 over all its source files, by path."""
    package = Path(elastic_pt.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return f"elastic_pt {elastic_pt.__version__}, sources {digest.hexdigest()[:_CODE_DIGITS]}"


def agree_on_identity(
    store: Store,
    config: Config,
    data: Manifest,
    platform: Mapping[str, str],
    bound: Mapping[str, str] | None = MappingProxyType({}),
) -> int:
    """Publish this node's identity or compare it with the run's. Returns the version of the run's data order.

    `bound` is the platform to which the log binds the run (`RunView.platform`). If a generation names one, it replaces
    the first node's. None accepts any platform, because an operator has reopened the run for it.

    Raises `ConfigError` that names the first value that differs. Agent process.
    """
    mine = identity_of(config, data, platform)
    first = mine | {_ORDER: LANES_VERSION}
    encoded = json.dumps(first, indent=1, sort_keys=True).encode()
    # Creating an object with the bytes that are already there succeeds, so the create does not tell who was first.
    with suppress(AlreadyExists):
        store.create(IDENTITY_KEY, encoded)
    theirs = read_identity(store)
    order = order_version(store.url, theirs)
    for name in sorted(filter(_is_setting, (mine.keys() | theirs.keys()) - {_ORDER})):
        here, there = (each.get(name, INTRODUCED.get(name)) for each in (mine, theirs))
        if here != there:
            raise ConfigError(
                f"{name} = {here!r}: the run at {store.url} has {there!r}; "
                "expected the same value, or another run.url"
            )
    if bound is not None:
        _require_platform(store.url, platform, bound or platform_in(theirs))
    with suppress(AlreadyExists):
        telemetry = TelemetrySection(**config.telemetry.model_dump(include=_OF_THE_MACHINE))
        shared = config.model_copy(update={"telemetry": telemetry})
        store.create(CONFIG_KEY, shared.to_toml(comments=True).encode())
    _require_same_links(store, config)
    return order


def _require_same_links(store: Store, config: Config) -> None:
    """Nodes with and without TLS never meet, so the run's `config.toml` decides for all."""
    there = read_run_config(store, []).elastic.tls
    if config.elastic.tls != there:
        raise ConfigError(
            f"elastic.tls = {str(config.elastic.tls).lower()}: the run at {store.url} has {str(there).lower()}; expected the "
            f"same value (to change it: edit {CONFIG_KEY} there while no node runs)"
        )


def read_identity(store: Store) -> dict[str, Any]:
    """The values that decide the bits, as the first node wrote them. Raises `NotFound`, and `ConfigError` for anything else."""
    origin = f"{store.url}/{IDENTITY_KEY}"
    try:
        return _IDENTITY.validate_json(store.read(IDENTITY_KEY))
    except ValidationError as error:
        raise ConfigError(
            f"{origin}: {error.errors()[0]['msg']}; expected the values that the run's first node wrote"
        ) from None


def order_version(url: str, identity: Mapping[str, Any]) -> int:
    """The version of the data order in the `identity.json` of the run at `url`; the first version wrote none."""
    order = identity.get(_ORDER, ORDER_VERSION)
    if not isinstance(order, int) or order not in (ORDER_VERSION, LANES_VERSION):
        raise ConfigError(
            f"{_ORDER} = {order!r}: recorded by the run at {url}; expected {ORDER_VERSION} or {LANES_VERSION}, "
            "or a node with a newer elastic_pt"
        )
    return int(order)


def _is_setting(name: str) -> bool:
    return "." in name


def platform_in(identity: Mapping[str, str]) -> dict[str, str]:
    """The platform of the node that wrote this `identity.json`; empty with native numerics."""
    return {name: value for name, value in identity.items() if not _is_setting(name)}


def differing_names(before: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """The names of a platform that decide the bits and differ. Names that `before` does not have are not compared.

    The probe comes last, because it shows no cause.
    """
    names = [name for name in sorted(before) if here.get(name) != before[name]]
    return sorted((name for name in names if name not in EXPLAINING), key=lambda x: x == _PROBE)


def _require_platform(url: str, mine: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Raise `ConfigError` if this node would, or might, compute other bits than the run."""
    names = differing_names(theirs, mine)
    if not names:
        return
    name = names[0]
    what = f"{name} = {mine.get(name)!r}: the run at {url} has {theirs[name]!r}"
    if name == _PROBE:
        causes = [
            f"{each} {mine.get(each)!r} (there {theirs[each]!r})"
            for each in EXPLAINING
            if each in theirs and mine.get(each) != theirs[each]
        ]
        what += (
            "; the same small training step gives other bits on this node, though the settings agree "
            f"(what else differs: {', '.join(causes) or 'nothing that has a name'})"
        )
    if name == _ENVIRONMENT:
        raise ConfigError(f"{what}; expected the same: start this node with the same variables")
    raise ConfigError(
        f"{what}; expected the same, or another run.url; "
        "if no such node is left: elastic-pt reopen --platform"
    )


def require_platform_since_start(
    url: str, view: RunView, mine: Mapping[str, str], waived_generation: int
) -> None:
    """Raise `ConfigError` if the run has changed to another platform since this agent was started.

    `mine` is the agent's platform; empty if no bits are promised. `waived_generation` is `RunView.waived_generation` at
    the agent's start. If an operator has accepted another platform since then, the agent has the old one.
    """
    if not mine:
        return
    if view.platform is not None:
        _require_platform(url, mine, view.platform)
    elif view.waived_generation > waived_generation:
        raise ConfigError(
            f"{url}: reopened for another platform after generation {view.waived_generation}, while this agent was "
            "running; expected an agent that is started after that"
        )


def read_run_config(store: Store, overrides: list[str]) -> Config:
    """The configuration that a run was started with."""
    try:
        text = store.read(CONFIG_KEY).decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{store.url}/{CONFIG_KEY}: not UTF-8; expected TOML") from None
    except NotFound:
        raise ConfigError(
            f"{store.url}: no run there ({CONFIG_KEY} is missing); expected a run directory, or a configuration file to start one"
        ) from None
    return parse_config(text, source=f"{store.url}/{CONFIG_KEY}", overrides=overrides)
