"""The agent's checkpoints: where a new generation resumes, and which node is the cause of a lost checkpoint."""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from elastic_pt.agent.checkpointing import Checkpointing, Lost, choose_resume
from elastic_pt.checkpoint.history import StepHistory
from elastic_pt.checkpoint.layout import checkpoint_directory
from elastic_pt.checkpoint.shard_file import Staging, write_shard
from elastic_pt.checkpoint.upload import StagedShard, refuse_node
from elastic_pt.errors import CheckpointError
from elastic_pt.membership.decision.settled import Settled
from elastic_pt.membership.node import Formed, Node
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Cause, CauseKind, Checkpoint, Commit
from elastic_pt.store.open import open_store
from elastic_pt.telemetry.catalogue import Metrics
from tests.checkpoint.world import RUN_ID, full_tensors, local_rows, training_state
from tests.membership.bucket import WatchedStore
from tests.membership.world import generation, member
from tests.train.world import config_for

WAIT_S = 20.0
COMMITTED = Checkpoint(7, 1, "ckpt/0000000007-g1-abcd", 1, "0" * 64, 1.0)


@pytest.fixture
def bucket(tmp_path: Path) -> WatchedStore:
    """A run with one checkpoint, committed by generation 1 of node a, that has lost its files."""
    bucket = WatchedStore(open_store(f"file://{tmp_path}"))
    log = RunLog(bucket, writer="a")
    log.append(lambda _: generation("a"), generation=0)
    log.append(lambda _: Commit((COMMITTED,), "history/x"), generation=1)
    return bucket


def test_a_member_resumes_from_its_own_commit_without_a_check(bucket: WatchedStore) -> None:
    """A recovery makes no requests for files that were checked at their commit, moments ago."""
    log = RunLog(bucket, writer="a")
    view = log.refresh()
    bucket.requests.clear()
    assert choose_resume(bucket, log, view, member("a").incarnation) == COMMITTED
    assert bucket.requests.total() == 0


def test_new_nodes_check_every_file_first(bucket: WatchedStore) -> None:
    """A node that resumes a run, perhaps days later, checks each checkpoint and quarantines unusable ones."""
    log = RunLog(bucket, writer="z")
    with pytest.raises(CheckpointError, match="none of the committed checkpoints is usable"):
        choose_resume(bucket, log, log.refresh(), member("z").incarnation)
    assert log.refresh().quarantined == {COMMITTED.directory}


def member_of(
    folder: Path,
    node_rank: int,
    released: Callable[[int], None] = lambda _: None,
    settle_s: float = 5.0,
) -> Checkpointing:
    """The checkpoints of a node in generation 3 of two nodes with two workers each."""
    formed = SimpleNamespace(
        generation=replace(
            generation(),
            number=3,
            members=tuple(
                replace(member(name, workers=2), incarnation=f"abc{name}") for name in "ab"
            ),
        ),
        node_rank=node_rank,
    )
    store = open_store(f"file://{folder}/run")
    run_log = RunLog(store, writer="a")
    run_log.refresh()
    node = SimpleNamespace(
        member=member("ab"[node_rank], workers=2),
        must_reform=lambda _: False,
        view=SimpleNamespace(run_id=RUN_ID),
        notice_log=lambda: None,
        formed=cast(Formed, formed),
    )
    node.failure = partial(Node.failure, cast(Node, node))
    return Checkpointing(
        config_for(folder, f"elastic.settle_timeout_s={settle_s}"),
        store,
        run_log,
        cast(Node, node),
        Metrics(),
        folder / "staging",
        StepHistory(),
        release=released,
    )


def stage(checkpointing: Checkpointing, folder: Path, rank: int) -> None:
    """A worker of generation 3 stages its shard of step 7."""
    path = Staging(folder / "staging", 3).path(7, rank)
    write_shard(path, local_rows(full_tensors(), rank, 4), training_state(7))
    message = {"kind": "staged", "step": 7, "rank": rank, "generation": 3}
    checkpointing.save(message | {"path": str(path), "seconds": 0.1})


def test_a_node_without_room_is_the_cause_of_the_loss(tmp_path: Path) -> None:
    """A skipped checkpoint is lost through this node; a message of an earlier generation changes nothing."""
    checkpointing = member_of(tmp_path, node_rank=1)
    assert checkpointing.lost() is None
    message = {"kind": "skipped", "step": 7, "rank": 3, "generation": 3, "why": "no space left"}
    checkpointing.save(message)
    assert checkpointing.lost() == Lost(3, 7, "no space left", own=True)
    checkpointing.save(message | {"step": 8, "generation": 2})
    assert checkpointing.staged_step == 7
    checkpointing.close(WAIT_S)


@pytest.mark.parametrize("held", [True, False], ids=["held", "not held"])
def test_state_in_memory_saves_a_planned_change_without_room_for_a_checkpoint(
    held: bool, tmp_path: Path
) -> None:
    """A checkpoint that is given up fails the change only if the state does not get into memory either."""
    checkpointing = member_of(tmp_path, node_rank=1)
    node, waits = cast(SimpleNamespace, checkpointing._node), []

    def await_settled(
        generation: object,
        step: int,
        timeout_s: float,
        given_up: Callable[[], bool],
        mirrored: Callable[[], bool],
    ) -> Settled:
        """The first wait ends because the checkpoint is given up, before the mirrors have asked."""
        assert step == 7
        waits.append((timeout_s, given_up(), mirrored()))
        return Settled("memory" if held and not given_up() else "", "")

    node.await_settled = await_settled
    message = {"kind": "skipped", "step": 7, "rank": 3, "generation": 3, "why": "no space left"}
    checkpointing.save(message)
    assert bool(checkpointing.wait(node.formed, lambda step: step == 7)) == held
    timeout_s = config_for(tmp_path).elastic.heartbeat_timeout_s
    assert waits == [(5.0, True, True), (timeout_s, False, True)]
    checkpointing.close(WAIT_S)


def test_a_refusal_of_another_node_is_not_the_committing_nodes_failure(tmp_path: Path) -> None:
    """A node without room loses the checkpoint for all nodes, but only that node is the cause."""
    (tmp_path / "staging").mkdir()
    released = threading.Event()
    committing = member_of(tmp_path, node_rank=0, released=lambda _: released.set())
    full = member_of(tmp_path, node_rank=1)
    full.save({"kind": "skipped", "step": 7, "rank": 2, "generation": 3, "why": "no space left"})
    for rank in (0, 1):
        stage(committing, tmp_path, rank)
    assert released.wait(WAIT_S)
    lost = committing.lost()
    assert lost is not None
    assert not lost.own
    assert "no space left" in lost.why
    assert committing.failure() is None
    assert full.failure() == Cause(
        CauseKind.GAVE_UP, "b", "the checkpoint of step 7 was not committed: no space left"
    )
    committing.close(WAIT_S)
    full.close(WAIT_S)


def test_a_refusal_of_the_committing_node_is_its_own_failure(tmp_path: Path) -> None:
    """The committing node may read its own refusal before its upload thread reports it: it is still the cause."""
    (tmp_path / "staging").mkdir()
    released = threading.Event()
    checkpointing = member_of(tmp_path, node_rank=0, released=lambda _: released.set())
    path = Staging(tmp_path / "staging", 3).path(7, 0)
    write_shard(path, local_rows(full_tensors(), 0, 4), training_state(7))
    directory = checkpoint_directory(7, 3, "abca")
    refuse_node(
        open_store(f"file://{tmp_path}/run"),
        StagedShard(path, RUN_ID, directory, 1, range(2)),
        "the store failed",
    )
    checkpointing.save(
        {"kind": "staged", "step": 7, "rank": 0, "generation": 3, "path": str(path), "seconds": 0.1}
    )
    assert released.wait(WAIT_S)
    failure = checkpointing.failure()
    assert failure is not None
    assert "the store failed" in failure.detail
    checkpointing.close(WAIT_S)


@pytest.mark.parametrize(("staged", "own"), [((0, 1), False), ((0,), True)], ids=["other", "own"])
def test_a_missing_notice_is_the_failure_of_its_node(
    tmp_path: Path, staged: tuple[int, ...], own: bool
) -> None:
    """When a notice does not come in time, the committing node is the cause only if the notice is its own."""
    (tmp_path / "staging").mkdir()
    released = threading.Event()
    committing = member_of(tmp_path, 0, lambda _: released.set(), settle_s=1.0)
    for rank in staged:
        stage(committing, tmp_path, rank)
    assert released.wait(WAIT_S)
    lost = committing.lost()
    assert lost is not None
    assert lost.own == own
    assert f"notice-0000{0 if own else 2}.json: missing after 1.0 s" in lost.why
    assert (committing.failure() is None) != own
    committing.close(WAIT_S)


def test_a_shard_of_an_earlier_generation_is_dropped(tmp_path: Path) -> None:
    """A file of the same step from a worker of an earlier generation is dropped; its name is different."""
    (tmp_path / "staging").mkdir()
    checkpointing = member_of(tmp_path, node_rank=1)
    old, new = (Staging(tmp_path / "staging", number).path(7, 2) for number in (2, 3))
    assert old != new
    for path in (old, new):
        path.write_bytes(b"x")
    checkpointing.save(
        {"kind": "staged", "step": 7, "rank": 2, "generation": 2, "path": str(old), "seconds": 0.1}
    )
    assert checkpointing.staged_step == 0
    assert [path.name for path in (tmp_path / "staging").iterdir()] == [new.name]
    checkpointing.close(WAIT_S)


def test_files_of_dead_workers_are_swept_from_staging(tmp_path: Path) -> None:
    """At a stop and at a start all shards that are not being uploaded are removed; other files stay."""
    staging = tmp_path / "staging"
    staging.mkdir()
    checkpointing = member_of(tmp_path, node_rank=0)
    for act in (checkpointing.stopped, checkpointing.starts):
        left = ("0000000007-g2-rank-0.safetensors", ".0000000008-g3-rank-1.safetensors.4711.tmp")
        for name in (*left, "agent.sock", "assignment.json"):
            (staging / name).write_bytes(b"x")
        act()
        assert {path.name for path in staging.iterdir()} == {"agent.sock", "assignment.json"}
    checkpointing.close(10)
