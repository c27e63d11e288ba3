"""Reads what the page shows from the run's URL.

log ─► Timeline, explanations          read once, for the goodput too
history/ ─► Steps                      a few commits in memory at a time
accounts, agents, manifests, data      as `goodput`, `status` and `checkpoints` read them
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from elastic_pt.config import Config
from elastic_pt.data.manifest import read_manifest
from elastic_pt.errors import ConfigError, ElasticPtError, NotFound
from elastic_pt.report.change import Change, End
from elastic_pt.report.checkpoints import CheckpointReport, checkpoint_bytes, read_checkpoints
from elastic_pt.report.explanation import explain
from elastic_pt.report.goodput import Goodput, read_goodput
from elastic_pt.report.history import read_steps
from elastic_pt.report.page.steps import Steps
from elastic_pt.report.page.timeline import Timeline
from elastic_pt.report.status import STORE_TIMEOUT_S, Run, RunStatus, State, read_status
from elastic_pt.runlog.identity import CONFIG_KEY, read_identity
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from elastic_pt.telemetry.redaction import Redactor, secrets_in, without_credentials

SIZES_MAX: Final = 32
"""Checkpoints whose size is read, the newest ones: each takes a request."""


@dataclass(frozen=True)
class Mixture:
    """The planned share of each source."""

    weights: Mapping[str, float]
    missing: str
    """Why there are no weights; empty if there are."""


@dataclass(frozen=True)
class KeptCheckpoint:
    """A checkpoint of which the bucket still has the bytes."""

    report: CheckpointReport
    size_bytes: int | None
    """None if its manifest was not read, or cannot be used."""


@dataclass(frozen=True)
class Facts:
    """A run at one moment."""

    url: str
    """Without credentials."""
    now_at_s: float
    """Unix time."""
    status: RunStatus
    config: Config | None
    config_text: str
    """`config.toml` without its comments and without secrets; empty for a run of stock torchrun."""
    identity: Mapping[str, Any]
    timeline: Timeline
    changes: list[Change | End]
    steps: Steps
    goodput: Goodput
    checkpoints: list[KeptCheckpoint]
    mixture: Mixture
    redactor: Redactor


def read_facts(run: Run, now_at_s: float) -> Facts:
    """Read a run."""
    redactor = Redactor(secrets_in(os.environ))
    status = read_status(run)
    records = list(run.log.records())
    goodput = read_goodput(run, records)
    timeline = Timeline({each.incarnation: each.ended_at_s for each in goodput.agents})
    steps = Steps()
    changes = explain(timeline.watch(records))
    for line in read_steps(run.store, records):
        steps.add(line)
    if status.state is State.DOWN:
        timeline.end_unseen()
    return Facts(
        url=without_credentials(run.store.url),
        now_at_s=now_at_s,
        status=status,
        config=run.config,
        config_text=redactor.text(_settings(run.store)),
        identity=_identity(run.store),
        timeline=timeline,
        changes=changes,
        steps=steps,
        goodput=goodput,
        checkpoints=_checkpoints(run),
        mixture=_mixture(run.config),
        redactor=redactor,
    )


def _checkpoints(run: Run) -> list[KeptCheckpoint]:
    reports = read_checkpoints(run)
    measured = checkpoint_bytes(run, [each.checkpoint for each in reports[:SIZES_MAX]])
    sizes = measured + [None] * (len(reports) - len(measured))
    return [KeptCheckpoint(*each) for each in zip(reports, sizes, strict=True)]


def _mixture(config: Config | None) -> Mixture:
    if config is None:
        return Mixture({}, "the run has no configuration that names its data")
    try:
        manifest = read_manifest(
            open_store(config.data.url, timeout_s=STORE_TIMEOUT_S, patient=False)
        )
    except ElasticPtError as error:
        return Mixture({}, str(error))
    return Mixture({source.name: source.weight for source in manifest.sources}, "")


def _settings(store: Store) -> str:
    """The stored configuration without comments and empty lines."""
    with suppress(NotFound):
        lines = store.read(CONFIG_KEY).decode(errors="replace").splitlines()
        return "\n".join(line for line in lines if line.strip() and not line.startswith("#"))
    return ""


def _identity(store: Store) -> dict[str, Any]:
    with suppress(NotFound, ConfigError):
        return read_identity(store)
    return {}
