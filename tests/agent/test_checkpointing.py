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
from elastic_pt.checkpoint.upload import KeptShard, refuse_node
from elastic_pt.errors import CheckpointError
from elastic_pt.membership.node import Formed, Node
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Cause, CauseKind, Checkpoint, Commit
from elastic_pt.store.open import open_store
from elastic_pt.telemetry.catalogue import Metrics
from tests.checkpoint.world import RUN_ID, full_tensors, local_rows, training_state, write_buffer
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
    released: Callable[[int, int], None] = lambda *_: None,
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
        kept=tuple,
    )


def stage(checkpointing: Checkpointing, folder: Path, rank: int) -> Path:
    """A worker of generation 3 keeps its state of step 7 for a checkpoint."""
    rows = local_rows(full_tensors(), rank, 4)
    path = write_buffer(folder / "staging", rank, rows, training_state(7), generation=3)
    checkpointing.save(kept(3, rank))
    return path


def kept(generation: int, rank: int) -> dict[str, object]:
    """The message of a worker that keeps its state of step 7 in its first buffer."""
    message = {"kind": "snapshot", "checkpoint": True, "step": 7, "rank": rank}
    return message | {"generation": generation, "buffer": 0, "seconds": 0.1}


def test_a_node_without_room_is_the_cause_of_the_loss(tmp_path: Path) -> None:
    """A skipped checkpoint is lost through this node; a message of an earlier generation changes nothing."""
    checkpointing = member_of(tmp_path, node_rank=1)
    assert checkpointing.lost() is None
    message = {"kind": "skipped", "step": 7, "rank": 3, "generation": 3, "why": "no space left"}
    checkpointing.save(message)
    assert checkpointing.lost() == Lost(3, 7, "no space left", own=True)
    checkpointing.save(message | {"step": 8, "generation": 2})
    assert checkpointing.saved_step == 7
    checkpointing.close(WAIT_S)


def test_a_refusal_of_another_node_is_not_the_committing_nodes_failure(tmp_path: Path) -> None:
    """A node without room loses the checkpoint for all nodes, but only that node is the cause."""
    (tmp_path / "staging").mkdir()
    released = threading.Event()
    committing = member_of(tmp_path, node_rank=0, released=lambda *_: released.set())
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
    checkpointing = member_of(tmp_path, node_rank=0, released=lambda *_: released.set())
    directory = checkpoint_directory(7, 3, "abca")
    refuse_node(
        open_store(f"file://{tmp_path}/run"),
        KeptShard(tmp_path, RUN_ID, directory, 1, range(2)),
        "the store failed",
    )
    stage(checkpointing, tmp_path, 0)
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
    committing = member_of(tmp_path, 0, lambda *_: released.set(), settle_s=1.0)
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
    """A state of the same step from a worker of an earlier generation is not uploaded."""
    (tmp_path / "staging").mkdir()
    checkpointing = member_of(tmp_path, node_rank=1)
    checkpointing.save(kept(generation=2, rank=2))
    assert checkpointing.saved_step == 0
    checkpointing.close(WAIT_S)


def test_buffers_of_stopped_workers_are_freed(tmp_path: Path) -> None:
    """At a stop and at a start all kept states that are not being uploaded are released."""
    released: list[tuple[int, int]] = []
    checkpointing = member_of(tmp_path, 0, lambda *state: released.append(state))
    checkpointing._kept = lambda: ((2, 7), (3, 8))
    for act in (checkpointing.stopped, checkpointing.starts):
        released.clear()
        act()
        assert sorted(released) == [(2, 7), (3, 8)]
    checkpointing.close(10)
