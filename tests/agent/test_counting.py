"""What an agent counts: the records that it appends, the messages of its workers, and what it reads at a scrape."""

import dataclasses
import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_pt.agent.checkpointing import Checkpointing, quarantine
from elastic_pt.agent.counting import (
    CountRecords,
    Follow,
    ReadAtScrape,
    count_workers,
    describe,
    flops_of,
    label_of,
    metrics_of,
)
from elastic_pt.agent.messages import Progress, WorkerMessages
from elastic_pt.agent.observation import Observation
from elastic_pt.agent.snapshots import Snapshots
from elastic_pt.errors import FencedError
from elastic_pt.membership.decision.node_states import NodeState
from elastic_pt.membership.decision.status import MESH_NODES_MAX
from elastic_pt.membership.node import Node
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import (
    COMPLETED,
    Cause,
    CauseKind,
    Checkpoint,
    Commit,
    Quarantine,
    Recovery,
    Stop,
)
from elastic_pt.store.observer import Operation, Result
from elastic_pt.store.open import open_store
from elastic_pt.telemetry.catalogue import Metrics, catalogue, page
from elastic_pt.telemetry.declaration import By
from elastic_pt.workers.failure import FailureCause
from elastic_pt.workers.heartbeat import WorkerPhase
from tests.membership.world import generation, status, view_of
from tests.train.world import config_for

CHECKPOINT = Checkpoint(3, 1, "ckpt/0000000003-g1-abcd", 1, "0" * 64, 1.0)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """One sample as it is served."""
    return metrics.registry.get_sample_value(f"elastic_pt_{name}", labels)


@pytest.fixture
def counted(tmp_path: Path) -> tuple[RunLog, Metrics]:
    """A node's log and its metrics, in a run of which another node has written the first generation."""
    RunLog(open_store(f"file://{tmp_path}"), writer="b").append(
        lambda _: generation("a", "b"), generation=0
    )
    run_log, metrics = RunLog(open_store(f"file://{tmp_path}"), writer="a"), Metrics()
    run_log.listen(CountRecords(metrics))
    return run_log, metrics


def test_records_count_where_they_are_appended(counted: tuple[RunLog, Metrics]) -> None:
    """Causes, lost steps, recoveries, quarantines and the end count on the node that appends them, and on no other."""
    run_log, metrics = counted
    causes = (Cause(CauseKind.JOINED, "c"), Cause(CauseKind.GAVE_UP, "b"))
    changed = dataclasses.replace(
        generation("a", "c"), number=2, causes=causes, reached_step=12, resume=CHECKPOINT
    )
    run_log.append(lambda _: changed, generation=1)
    run_log.append(lambda _: Recovery(2, 1.0, 1.0, 1.0, 1.0, 4.5), generation=2)
    run_log.append(lambda _: Quarantine("", "3 failures", "b", 30.0), generation=2)
    quarantine(run_log, 2, CHECKPOINT.directory, "torn")
    run_log.append(lambda _: Stop(COMPLETED, 20), generation=2)
    assert value(metrics, "changes_total", cause="joined") == 1
    assert value(metrics, "changes_total", cause="gave_up") == 1
    assert value(metrics, "lost_steps_total") == 9
    assert value(metrics, "recovery_seconds_sum", cause="gave_up") == 4.5
    assert value(metrics, "quarantines_total", what="node") == 1
    assert value(metrics, "quarantines_total", what="checkpoint") == 1
    assert value(metrics, "verify_failures_total") == 1
    assert value(metrics, "fenced_total") == 0


def test_the_loss_of_all_nodes_is_a_cause(counted: tuple[RunLog, Metrics]) -> None:
    """Nobody is left who could name one, but it is a fault. A generation of the same members follows a pause."""
    run_log, metrics = counted
    resumed = dataclasses.replace(generation("b", "a"), number=2)
    run_log.append(lambda _: resumed, generation=1)
    assert value(metrics, "changes_total", cause="all_lost") is None
    run_log.append(lambda _: dataclasses.replace(generation("x"), number=3), generation=2)
    assert value(metrics, "changes_total", cause="all_lost") == 1


def test_a_writer_of_an_old_generation_is_counted(counted: tuple[RunLog, Metrics]) -> None:
    """The fence counts a node that has been replaced, but not two nodes that propose the same generation."""
    run_log, metrics = counted
    second = dataclasses.replace(generation("a", "b"), number=2)
    run_log.append(lambda _: second, generation=1)
    with pytest.raises(FencedError):
        run_log.append(lambda _: second, generation=1)
    assert value(metrics, "fenced_total") == 0
    with pytest.raises(FencedError):
        run_log.append(lambda _: Commit((CHECKPOINT,), "history/x"), generation=1)
    assert value(metrics, "fenced_total") == 1


def test_workers_are_counted_by_what_they_do() -> None:
    """A phase that no worker is in any more falls to 0: who looks for a hang must not find an old one."""
    metrics = Metrics()
    count_workers(metrics, [WorkerPhase.COMPUTE, WorkerPhase.DATA, WorkerPhase.COMPUTE])
    assert value(metrics, "workers", phase="compute") == 2
    assert value(metrics, "workers", phase="data") == 1
    assert value(metrics, "workers", phase="evaluate") == 0
    count_workers(metrics, [])
    assert value(metrics, "workers", phase="compute") == 0


def test_a_recovery_after_a_pause_has_no_cause(counted: tuple[RunLog, Metrics]) -> None:
    """A start without a fault must not look like a recovery from one."""
    run_log, metrics = counted
    run_log.append(lambda _: Recovery(1, 1.0, 1.0, 1.0, 1.0, 4.0), generation=1)
    run_log.append(lambda _: Stop("diverged: loss is nan", 3), generation=1)
    assert value(metrics, "recovery_seconds_count", cause="start") == 1


def test_every_event_has_a_series_before_it_comes(tmp_path: Path) -> None:
    """`increase()` never sees the first value of a new series, so an alert or a panel would miss the first event."""
    metrics = metrics_of(config_for(tmp_path), "a")
    found = {
        family.name.removeprefix("elastic_pt_"): family for family in metrics.registry.collect()
    }
    events = {each.name for each in catalogue() if each.kind == "counter"} | {"recovery_seconds"}
    without = {name for name, family in found.items() if name in events and not family.samples}
    assert without == {
        *("time_seconds", "source_rows", "notices"),
        *("gpu_ecc_uncorrected", "gpu_xid_errors"),
    }
    assert {
        sample.labels["cause"] for sample in found["worker_failures"].samples if sample.value == 0
    } == set(FailureCause)
    assert (
        value(metrics, "changes_total", cause="gave_up", run=config_for(tmp_path).run.url, node="a")
        == 0
    )


def test_states_and_risks_are_read_at_a_scrape() -> None:
    """A scrape shows what the node knows then; a node that is no member says nothing about the members."""
    metrics, of = Metrics(), generation("a", "b")
    me = status("a", step=12)
    node = SimpleNamespace(
        facts=view_of(me, {}, of=of, committed_step=5),
        view=RunView(generations=(of,)),
        member=me.member,
        node_states=lambda: {NodeState.ACTIVE: 2, NodeState.LOST: 0},
    )
    metrics.before_scrape(ReadAtScrape(metrics, cast(Node, node), lambda: 1))
    assert value(metrics, "nodes", state="active") == 2
    assert value(metrics, "nodes", state="lost") == 0
    assert value(metrics, "steps_at_risk", loss="all") == 7
    assert value(metrics, "steps_at_risk", loss="node") == 7
    assert value(metrics, "checkpoints_pending") == 1
    node.view = RunView(generations=(generation("b"),))
    assert value(metrics, "nodes", state="active") is None
    assert value(metrics, "steps_at_risk", loss="all") is None


def test_the_risk_of_one_node_is_not_shown_once_the_run_is_large() -> None:
    """An old value would stay for as long as the run is large, and keep an alert on or off."""
    metrics, me = Metrics(), status("a", step=12)
    node = SimpleNamespace(member=me.member, node_states=dict)

    def grow_to(*names: str) -> None:
        of = generation(*names)
        node.view = RunView(generations=(of,))
        node.facts = view_of(me, {}, of=of, committed_step=5)

    metrics.before_scrape(ReadAtScrape(metrics, cast(Node, node), lambda: 0))
    grow_to("a", "b")
    assert value(metrics, "steps_at_risk", loss="node") == 7
    grow_to("a", *(f"n{number}" for number in range(MESH_NODES_MAX)))
    assert value(metrics, "steps_at_risk", loss="node") is None
    assert value(metrics, "steps_at_risk", loss="all") == 7


def test_a_node_that_others_train_without_shows_nothing_of_the_run() -> None:
    """`max by (run)` must find the values of members: not the step, loss and size of a generation that was replaced."""
    metrics, member = Metrics(), status("a").member
    node = SimpleNamespace(
        view=RunView(generations=(generation("a", "b"),)),
        facts=None,
        member=member,
        node_states=dict,
    )
    metrics.before_scrape(ReadAtScrape(metrics, cast(Node, node), lambda: 0))
    for each in catalogue():
        if each.kind == "gauge":
            gauge = getattr(metrics, each.name)
            (gauge.labels(*each.labels) if each.labels else gauge).set(7)

    def shown() -> set[str]:
        families = metrics.registry.collect()
        return {family.name.removeprefix("elastic_pt_") for family in families if family.samples}

    assert {"step", "loss", "source_loss", "world_size", "mirror_step"} <= shown()
    node.view = RunView(generations=(generation("a", "b"), generation("b")))
    of_the_run = {each.name for each in catalogue() if each.kind == "gauge" and each.by is By.RUN}
    configured = {"steps_planned", "nodes_min", "nodes_max", "checkpoint_every_steps"}
    assert shown() & of_the_run == configured
    assert not {each for each in shown() if each.startswith(("snapshot_", "mirror_"))} - {
        "snapshot_skips",
        "mirror_bytes",
    }


def test_messages_about_states_in_memory_are_counted(tmp_path: Path) -> None:
    """A snapshot shows its step and moment; a damaged copy and an unusable state count as failed checks."""
    metrics, seen = Metrics(), list[Any]()
    parts = SimpleNamespace(
        written=seen.append, copy_failed=seen.append, distrust=lambda *_: seen.append(_)
    )
    node = SimpleNamespace(formed=SimpleNamespace(generation=generation("a")))
    messages = WorkerMessages(
        RunLog(open_store(f"file://{tmp_path}"), writer="a"),
        cast(Node, node),
        cast(Checkpointing, None),
        cast(Snapshots, parts),
        Observation(metrics),
        Progress(),
        relay=seen.append,
    )
    messages.handle({"kind": "snapshot", "step": 9, "seconds": 0.2, "checkpoint": False})
    assert value(metrics, "snapshot_step") == 9
    assert value(metrics, "snapshot_seconds") == 0.2
    assert (value(metrics, "snapshot_timestamp_seconds") or 0) > 1e9
    for damaged in (True, False):
        messages.handle({"kind": "copy_failed", "damaged": damaged})
    messages.handle({"kind": "unusable", "step": 9, "generation": 1, "whole": True, "why": "rows"})
    assert value(metrics, "verify_failures_total") == 2
    assert len(seen) == 4


def test_the_page_of_metrics_explains_the_values_of_labels() -> None:
    """Whoever writes a query finds the values of a label that the code enumerates."""
    values = [label_of(each) for each in CauseKind]
    for enumeration in (NodeState, Operation, Result):
        values += list(enumeration)
    assert [each for each in values if f"`{each}`" not in page()] == []


def test_totals_of_others_are_followed() -> None:
    """Lost events count once, however often somebody asks."""
    metrics, total = Metrics(), [0]
    metrics.before_scrape(Follow(metrics.events_dropped, lambda: total[0]))
    assert value(metrics, "events_dropped_total") == 0
    total[0] = 3
    assert value(metrics, "events_dropped_total") == 3
    assert value(metrics, "events_dropped_total") == 3


def test_the_configuration_is_shown(tmp_path: Path) -> None:
    """Plans and limits come from the configuration, and an MFU needs a known peak."""
    config = config_for(tmp_path, "telemetry.peak_flops=1e12", "elastic.nodes_max=4")
    metrics = metrics_of(config, "a")
    labels = {"run": config.run.url, "node": "a"}
    assert value(metrics, "nodes_max", **labels) == 4
    assert value(metrics, "steps_planned", **labels) == config.train.steps
    assert value(metrics, "checkpoint_every_steps", **labels) == config.checkpoint.every_steps
    found = flops_of(config, 300)
    assert found is not None
    assert found.peak_flops == 1e12
    assert flops_of(config_for(tmp_path, "train.device='cpu'"), 300, "NVIDIA H200") is None
    on_gpu = config_for(tmp_path, "train.device='cuda'")
    assert flops_of(on_gpu, 300) is None
    known = flops_of(on_gpu, 300, "NVIDIA H200")
    assert known is not None
    assert known.peak_flops == 989e12
    run_log = RunLog(open_store(f"file://{tmp_path}/run"), writer="a")
    run_log.append(lambda _: generation("a"), generation=0)
    view = run_log.append(lambda _: Commit((CHECKPOINT,), "history/x"), generation=1)
    describe(metrics, config, view)
    assert value(metrics, "checkpoint_committed_step", **labels) == 3
    # A new agent has the time from the record, so the age of the commit survives a restart of all agents.
    assert view.head is not None
    written_at_s = datetime.datetime.fromisoformat(view.head.time).timestamp()
    assert value(metrics, "checkpoint_commit_timestamp_seconds", **labels) == written_at_s
    again = RunLog(open_store(f"file://{tmp_path}/run"), writer="b")
    run_log.append(lambda _: Recovery(1, 1.0, 1.0, 1.0, 1.0, 4.5), generation=1)
    assert again.refresh().committed_at_s == written_at_s
    (family,) = metrics.run_info.collect()
    assert family.samples[0].labels["run_id"] == view.run_id
