"""What all nodes of a run must agree on, written into the run directory by whoever comes first.

- `config.toml`: the effective configuration but for `[telemetry]`, which is each node's own, so that
  `elastic-pt run RUN_URL` needs nothing else.
- `identity.json`: the values that decide the bits, by name; a node with another one is refused by name.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from elastic_pt.config import Config, TelemetrySection, parse_config
from elastic_pt.data.manifest import Manifest
from elastic_pt.errors import AlreadyExists, ConfigError, NotFound
from elastic_pt.store.port import Store

CONFIG_KEY: Final = "config.toml"
IDENTITY_KEY: Final = "identity.json"


def identity_of(config: Config, data: Manifest, platform: Mapping[str, str]) -> dict[str, Any]:
    """The values that decide the bits of the weights, by name.

    `platform` tells what computes (torch's version, the processor); native numerics does not promise bits,
    so there it does not count.
    """
    return {
        **config.identity(),
        **(platform if config.train.numerics == "exact" else {}),
        "data.url (fingerprint)": data.fingerprint,
        "data.url (tokenizer)": data.tokenizer_sha256,
    }


def agree_on_identity(
    store: Store, config: Config, data: Manifest, platform: Mapping[str, str]
) -> str:
    """Publish this node's identity or compare it with the run's; returns its SHA-256.

    Raises `ConfigError` that names the first value that differs. Agent process.
    """
    mine = identity_of(config, data, platform)
    encoded = json.dumps(mine, indent=1, sort_keys=True).encode()
    try:
        store.create(IDENTITY_KEY, encoded)
    except AlreadyExists:
        theirs = json.loads(store.read(IDENTITY_KEY))
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise ConfigError(
                    f"{name} = {mine.get(name)!r}: the run at {store.url} has {theirs.get(name)!r}; "
                    "the same value, or another run.url, would be right"
                ) from None
    with suppress(AlreadyExists):
        shared = config.model_copy(update={"telemetry": TelemetrySection()})
        store.create(CONFIG_KEY, shared.to_toml(comments=True).encode())
    return hashlib.sha256(encoded).hexdigest()


def read_run_config(store: Store, overrides: list[str]) -> Config:
    """The configuration that a run was started with."""
    try:
        text = store.read(CONFIG_KEY).decode()
    except NotFound:
        raise ConfigError(
            f"{store.url}: no run there ({CONFIG_KEY} is missing); a configuration file would start one"
        ) from None
    return parse_config(text, source=f"{store.url}/{CONFIG_KEY}", overrides=overrides)
