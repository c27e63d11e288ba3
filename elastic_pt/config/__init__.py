"""The configuration of a run: one frozen tree.

    run.toml ─► parse_config (+ --set section.key=value) ─► Config ─► a section for each part of the code

Unknown keys are errors. Code gets only the section that it needs. The sections in `IDENTITY_SECTIONS`
decide the bits of the weights: they are written to the run directory once and every node must agree on them. The
others may differ from node to node, except `[evaluation]`: the members of one generation agree on it.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from elastic_pt.config.mistakes import mistakes_in
from elastic_pt.config.sections import (
    CheckpointSection,
    DataSection,
    ElasticSection,
    EvaluationSection,
    ModelSection,
    RunSection,
    Section,
    StoreSection,
    TelemetrySection,
    TrainSection,
    Url,
    broken_scheme,
)
from elastic_pt.errors import ConfigError

__all__ = [
    "INTRODUCED",
    "CheckpointSection",
    "Config",
    "DataSection",
    "ElasticSection",
    "EvaluationSection",
    "ModelSection",
    "RunSection",
    "StoreSection",
    "TelemetrySection",
    "TrainSection",
    "Url",
    "broken_scheme",
    "load_config",
    "parse_config",
    "section_type",
]

IDENTITY_SECTIONS = ("data", "model", "train")
INTRODUCED: dict[str, Any] = {"data.shuffle_window_tokens": 2**30}
"""Keys of these sections that were added after the first version, by name, with their first default. A run recorded
without such a key has this default, so its identity and its fingerprint do not change."""


class Config(Section):
    """The whole tree."""

    run: RunSection
    data: DataSection
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    elastic: ElasticSection = ElasticSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    telemetry: TelemetrySection = TelemetrySection()
    store: StoreSection = StoreSection()

    def to_toml(self, *, comments: bool = False) -> str:
        """The effective configuration as TOML; with `comments`, a sentence above each key."""
        # Not at the top: most processes only read a configuration.
        import tomlkit

        document = tomlkit.document()
        for section_name, section_field in Config.model_fields.items():
            section = getattr(self, section_name)
            table = tomlkit.table()
            doc = (section_type(section_field.annotation).__doc__ or "").strip()
            if comments and doc:
                table.add(tomlkit.comment(doc.splitlines()[0]))
            for key, field in type(section).model_fields.items():
                if comments and field.description:
                    table.add(tomlkit.comment(field.description))
                table.add(key, getattr(section, key))
            table.add(tomlkit.nl())
            document.add(section_name, table)
        return tomlkit.dumps(document)

    def identity(self) -> dict[str, Any]:
        """The part that decides the bits of the weights, as `section.key -> value`."""
        leaves: dict[str, Any] = {"run.seed": self.run.seed}
        for name in IDENTITY_SECTIONS:
            section: Section = getattr(self, name)
            leaves |= {f"{name}.{key}": value for key, value in section.model_dump().items()}
        # The location and the cache of the data do not affect the bits. What was left out is recorded in the log.
        for key in ("url", "prefetch_steps", "cache", "cache_bytes", "on_damage"):
            del leaves[f"data.{key}"]
        return {
            name: value
            for name, value in leaves.items()
            if name not in INTRODUCED or value != INTRODUCED[name]
        }

    def fingerprint(self) -> str:
        """SHA-256 over `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def section_type(annotation: Any) -> type[Section]:
    """The class of a section field."""
    assert isinstance(annotation, type)
    assert issubclass(annotation, Section)
    return annotation


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides. Raises `ConfigError` in one line."""
    try:
        # Some editors on Windows write a byte order mark first.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; expected a TOML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text at byte {error.start}; expected a TOML file"
        ) from error
    return parse_config(text, source=str(path), overrides=overrides)


def parse_config(text: str, *, source: str, overrides: Iterable[str] = ()) -> Config:
    """Parse TOML text (`source` names it in errors) and apply `section.key=value` overrides."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}; expected a TOML file") from error
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {mistakes_in(error, Config)}") from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not equals or not dot or not key or "." in key:
        raise ConfigError(
            f"--set {override!r}: expected section.key=value, such as train.steps=100"
        )
    table = tree.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(
            f"--set {override!r}: {section} is a value in the file; expected a [{section}] table"
        )
    try:
        table[key] = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        table[key] = value.strip()
