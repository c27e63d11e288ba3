"""Every number of the configuration has a finite range, and an agent's checks work within it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types
import pytest

from elastic_pt.checkpoint.footprint import footprint
from elastic_pt.checkpoint.layout import TrainingState
from elastic_pt.config import Config, parse_config, section_type
from elastic_pt.doctor.requirements import require_device, require_staging_space
from elastic_pt.errors import ConfigError, NodeFailure
from elastic_pt.train.schedule import learning_rate

TEXT = '[run]\nurl = "run"\n[data]\nurl = "data"\n'
# Overrides that a leaf needs to be at its bound.
COMPANIONS = {
    "model.width": {"high": ["model.heads=1", "model.kv_heads=1"], "low": None},
    "model.heads": {"high": None, "low": ["model.kv_heads=1"]},
    "model.kv_heads": {"high": None},
    "train.global_batch": {"high": ["train.micro_batch=1"], "low": ["train.micro_batch=1"]},
    "train.micro_batch": {"high": ["train.global_batch=16777216"]},
    "elastic.nodes_min": {"high": ["elastic.nodes_max=1000000000"]},
    "elastic.heartbeat_interval_s": {"high": None},
    "elastic.heartbeat_timeout_s": {"low": None, "high": None},
    "elastic.takeover_s": {"low": None},
}
"""By leaf and bound; None if another rule is stricter than the bound."""


def leaves() -> Iterator[tuple[str, type, dict[str, float]]]:
    """Each numeric key with its type and bounds."""
    for section, field in Config.model_fields.items():
        for key, leaf in section_type(field.annotation).model_fields.items():
            if leaf.annotation in (int, float):
                bounds: dict[str, float] = {}
                for each in leaf.metadata:
                    for name in ("ge", "gt", "le", "lt"):
                        if hasattr(each, name) and not isinstance(each, annotated_types.Interval):
                            bounds[name] = getattr(each, name)
                yield f"{section}.{key}", leaf.annotation, bounds


LEAVES = list(leaves())


def parse(*overrides: str) -> Config:
    """The smallest configuration with overrides."""
    return parse_config(TEXT, source="test", overrides=overrides)


def check_start(config: Config) -> None:
    """What an agent computes from its configuration before it starts."""
    footprint(config.model, 300)
    config.fingerprint()
    parse_config(config.to_toml(comments=True), source="test")
    learning_rate(0, config.train)
    TrainingState(
        step=1, optimizer_step=1, skipped_in_a_row=0, data_fingerprint="d", tokenizer_sha256="e" * 64,
        config_fingerprint=config.fingerprint(),
    )  # fmt: skip


def test_list_of_numbers_is_complete() -> None:
    """The list comes from the configuration itself, so it includes new numbers."""
    names = {name for name, _, _ in LEAVES}
    assert len(names) > 35
    assert {"run.seed", "telemetry.metrics_port", "store.deadline_s", "train.threads"} <= names


@pytest.mark.parametrize(("name", "kind", "bounds"), LEAVES, ids=[each[0] for each in LEAVES])
def test_number_has_finite_bounds_and_works_at_them(
    name: str, kind: type, bounds: dict[str, float]
) -> None:
    """At both bounds an agent's checks pass. Beyond them the error has the field, the value and the expectation."""
    low = {bounds[each] for each in ("ge", "gt") if each in bounds}
    high = {bounds[each] for each in ("le", "lt") if each in bounds}
    assert low, name
    assert high, name
    assert all(map(math.isfinite, low | high)), name
    step: Any = 1 if kind is int else 1e-9
    at = {
        "low": min(low) + (step if "gt" in bounds else 0),
        "high": max(high) - (step if "lt" in bounds else 0),
    }
    for side, value in at.items():
        companions = COMPANIONS.get(name, {}).get(side, [])
        if companions is not None:
            check_start(parse(f"{name}={value!r}", *companions))
    beyond = [min(low) - 1, max(high) + (1 if kind is int else max(high) + 1.0)]
    beyond += [math.nan, math.inf, -math.inf] if kind is float else [10**30]
    for value in beyond:
        shown = str(value) if isinstance(value, float) else repr(value)
        with pytest.raises(ConfigError, match=rf"{name} = .*expected") as caught:
            parse(f"{name}={shown}")
        assert len(str(caught.value).splitlines()) == 1


def test_cuda_is_refused_on_a_machine_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that this machine lacks is refused before the run starts."""
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    require_device(parse("train.device=auto"))
    with pytest.raises(ConfigError, match=r"train\.device = 'cuda'.*expected"):
        require_device(parse("train.device=cuda"))


def test_full_staging_directory_is_not_a_config_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A disk that is too small is a ConfigError (2); one that is full now is a NodeFailure (6)."""
    import shutil
    from collections import namedtuple

    Usage = namedtuple("Usage", "total used free")
    config = parse(f"checkpoint.staging={tmp_path}", "elastic.nodes_max=1")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 0))
    with pytest.raises(NodeFailure, match=r"checkpoint\.staging = .*when there is room"):
        require_staging_space(config, 300)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 0, 1000))
    with pytest.raises(ConfigError, match=r"checkpoint\.staging = .*expected a larger directory"):
        require_staging_space(config, 300)
