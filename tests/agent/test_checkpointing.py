"""The agent's checkpoints: where a new generation resumes, and which node is the cause of a lost checkpoint."""

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from elastic_pt.agent.checkpointing import Checkpointing, Lost, choose_resume
from elastic_pt.chaos.s3_faults import ACCESS_DENIED, EXPIRED_TOKEN, Cut, Hang, S3Fault
from elastic_pt.chaos.s3_proxy import FaultProxy
from elastic_pt.checkpoint.digest import digest
from elastic_pt.checkpoint.history import StepHistory
from elastic_pt.checkpoint.index import read_manifest
from elastic_pt.checkpoint.layout import checkpoint_directory
from elastic_pt.checkpoint.upload import KeptShard, refuse_node
from elastic_pt.errors import AccessDenied, CheckpointError, StoreError
from elastic_pt.membership.decision.settled import Settled
from elastic_pt.membership.node import Formed, Node
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Cause, CauseKind, Checkpoint, Commit, InMemory
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from elastic_pt.telemetry.catalogue import Metrics
from tests.checkpoint.world import (
    RUN_ID,
    expected_digest,
    full_tensors,
    local_rows,
    training_state,
    write_buffer,
)
from tests.membership.bucket import WatchedStore
from tests.membership.world import generation, member
from tests.train.world import config_for

WAIT_S = 90.0
DEADLINE_S = 6.0
State = tuple[int, int]
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
    released: Callable[[int, int, range | None], object] = lambda *_: None,
    settle_s: float = 5.0,
    states: Mapping[State, Mapping[int, tuple[Path, None]]] = MappingProxyType({}),
    store: Store | None = None,
) -> Checkpointing:
    """The checkpoints of a node in generation 3 of two nodes with two workers each."""
    members = tuple(replace(member(name, workers=2), incarnation=f"abc{name}") for name in "ab")
    formed = SimpleNamespace(
        generation=replace(generation(), number=3, members=members), node_rank=node_rank
    )
    store = store or open_store(f"file://{folder}/run")
    run_log = RunLog(store, writer="a")
    if run_log.refresh().length == 0:
        for number in (1, 2, 3):
            found = replace(formed.generation, number=number)
            run_log.append(lambda _, found=found: found, generation=number - 1)  # type: ignore[misc]
    node = SimpleNamespace(
        member=members[node_rank],
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
        states=SimpleNamespace(
            checkpoints=lambda: tuple(states), kept_state=lambda *state: states.get(state, {})
        ),
        release=lambda generation, step, ranks: (released(generation, step, ranks), None)[1],
    )


def ends(event: threading.Event) -> Callable[[int, int, range | None], object]:
    """Sets the event when a checkpoint is over: all of its buffers are released."""
    return lambda generation, step, ranks: event.set() if ranks is None else None


def stage(checkpointing: Checkpointing, folder: Path, rank: int, step: int = 7) -> Path:
    """A worker of generation 3 keeps its state of a step for a checkpoint."""
    rows = local_rows(full_tensors(), rank, 4)
    path = write_buffer(folder / "staging", rank, rows, training_state(step), generation=3)
    checkpointing.save(kept(3, rank, step))
    return path


def kept(generation: int, rank: int, step: int = 7) -> dict[str, object]:
    """The message of a worker that keeps its state of a step in its first buffer."""
    message = {"kind": "snapshot", "checkpoint": True, "step": step, "rank": rank}
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
        mirrors_have_step: Callable[[Collection[str]], bool],
    ) -> Settled:
        """The first wait ends because the checkpoint is given up, before the mirrors have asked."""
        assert step == 7
        waits.append((timeout_s, given_up(), mirrors_have_step({"b-1"})))
        return Settled("memory" if held and not given_up() else "", "")

    node.await_settled, node.must_reform = await_settled, lambda _: False
    message = {"kind": "skipped", "step": 7, "rank": 3, "generation": 3, "why": "no space left"}
    checkpointing.save(message)
    assert (
        bool(checkpointing.wait(node.formed, lambda step, stay: (step, stay) == (7, {"b-1"})))
        == held
    )
    timeout_s = config_for(tmp_path).elastic.heartbeat_timeout_s
    assert waits == [(5.0, True, True), (timeout_s, False, True)]
    checkpointing.close(WAIT_S)


def test_a_refusal_of_another_node_is_not_the_committing_nodes_failure(tmp_path: Path) -> None:
    """A node without room loses the checkpoint for all nodes, but only that node is the cause."""
    (tmp_path / "staging").mkdir()
    released = threading.Event()
    committing = member_of(tmp_path, node_rank=0, released=ends(released))
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
    checkpointing = member_of(tmp_path, node_rank=0, released=ends(released))
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
    committing = member_of(tmp_path, 0, ends(released), settle_s=1.0)
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


def test_node_that_does_not_commit_has_the_time_of_the_commit(tmp_path: Path) -> None:
    """Every node's gauges follow the newest commit, so an alert does not depend on which node commits."""
    (tmp_path / "staging").mkdir()
    over = [threading.Event(), threading.Event()]
    nodes = [member_of(tmp_path, rank, ends(over[rank])) for rank in (0, 1)]
    for rank in range(4):
        stage(nodes[rank // 2], tmp_path, rank)
    assert over[0].wait(WAIT_S)
    # As the membership does, once it hears of a record.
    nodes[1]._committer._log.refresh()
    assert over[1].wait(WAIT_S)
    values = [
        [
            node._metrics.registry.get_sample_value(f"elastic_pt_checkpoint_{name}")
            for name in ("commits_total", "committed_step", "commit_timestamp_seconds")
        ]
        for node in nodes
    ]
    assert [each[:2] for each in values] == [[1.0, 7.0], [0.0, 7.0]]
    for each in values:
        assert time.time() - WAIT_S < (each[2] or 0.0) <= time.time()
    for number, node in enumerate(nodes):
        found = node._metrics.registry.get_sample_value
        assert found("elastic_pt_checkpoint_upload_seconds_count") == 2.0, "of two workers"
        stored = sorted(tmp_path.glob("run/ckpt/*/shard-*.safetensors"))[2 * number :][:2]
        sizes = sum(each.stat().st_size for each in stored)
        assert found("elastic_pt_checkpoint_upload_bytes_total") == sizes > 0
    for node in nodes:
        node.close(WAIT_S)


def test_upload_that_a_newer_one_replaces_is_logged_and_counted(tmp_path: Path) -> None:
    """While an upload hangs, only the newest checkpoint waits. The one that it replaces is an event and a number."""
    (tmp_path / "staging").mkdir()
    go_on, begun = threading.Event(), threading.Event()

    class Hanging(WatchedStore):
        """A store that takes no file before the test says so."""

        def _ask(self, verb: str, key: str, *arguments: Any) -> Any:
            if "/shard-" in key:
                begun.set()
                assert go_on.wait(WAIT_S)
            return super()._ask(verb, key, *arguments)

    checkpointing = member_of(
        tmp_path, 1, store=cast(Store, Hanging(open_store(f"file://{tmp_path}/run")))
    )
    with capture_logs() as events:
        for step in (7, 8, 9):
            for rank in (2, 3):
                stage(checkpointing, tmp_path, rank, step)
            assert begun.wait(WAIT_S)
    dropped = [each for each in events if each["event"] == "upload_dropped"]
    assert [each["step"] for each in dropped] == [8]
    skips = checkpointing._metrics.registry.get_sample_value("elastic_pt_checkpoint_skips_total")
    assert skips == 1.0
    go_on.set()
    checkpointing.close(WAIT_S)


def test_buffers_that_nobody_expects_are_freed(tmp_path: Path) -> None:
    """At a stop and at a start all kept states are released, except those that may still be committed."""
    (tmp_path / "staging").mkdir()
    released: list[State] = []
    states: dict[State, dict[int, tuple[Path, None]]] = {(2, 7): {}, (3, 7): {}, (3, 8): {}}
    checkpointing = member_of(
        tmp_path, 0, lambda generation, step, _: released.append((generation, step)), states=states
    )
    checkpointing.save(kept(3, 0))
    for act in (checkpointing.stopped, lambda: checkpointing.starts(generation("a"))):
        released.clear()
        act()
        assert sorted(released) == [(2, 7), (3, 8)]
    checkpointing.close(0.1)


def test_the_mirror_of_a_lost_node_uploads_its_part(tmp_path: Path) -> None:
    """Node a and its mirror b saved step 7. Node a is lost before it has uploaded anything: b uploads both, and commits."""
    (tmp_path / "staging").mkdir()
    states: dict[State, dict[int, tuple[Path, None]]] = {(3, 7): {}}
    over = threading.Event()
    mirror = member_of(tmp_path, 1, ends(over), states=states)
    for rank in (2, 3):
        stage(mirror, tmp_path, rank)
    for rank in (0, 1):
        rows = local_rows(full_tensors(), rank, 4)
        path = write_buffer(tmp_path / "staging", rank, rows, training_state(7), generation=3)
        states[3, 7][rank] = (path, None)
    run_log = mirror._committer._log
    alone = replace(
        generation(),
        number=4,
        members=run_log.view.generations[-1].members[1:],
        memory=InMemory(3, 9, ()),
    )
    run_log.append(lambda _: alone, generation=3)
    mirror.starts(alone)
    assert over.wait(WAIT_S)
    assert [(each.generation, each.step) for each in run_log.view.checkpoints] == [(3, 7)]
    assert mirror.lost() is None
    mirror.close(WAIT_S)


FILES = ("*/shard-*", "*/notice-*")
"""Files are not taken, and no refusal either; the log and the rest work."""
TROUBLES: dict[str, tuple[S3Fault, tuple[str, ...]]] = {
    "outage": (Cut(), ("*",)),
    "no permission": (ACCESS_DENIED, FILES),
    "expired credentials": (EXPIRED_TOKEN, FILES),
    "no answer": (Hang(), FILES),
}


@pytest.mark.moto
def test_commits_resume_after_each_trouble_of_the_bucket(
    tmp_path: Path, moto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F28, F29: the attempt fails and holds no worker longer than the deadline; then the next checkpoint is committed, whole.

    The refusals fail too, so the committing node never learns that the attempt has failed.
    """
    (tmp_path / "staging").mkdir()
    direct = open_store(f"{moto_url}/run")
    heard = threading.Condition()
    released: set[tuple[int, int]] = set()

    def release(node: int) -> Callable[[int, int, range | None], object]:
        def note(generation: int, step: int, ranks: range | None) -> None:
            with heard:
                released.add((node, step))
                heard.notify_all()

        return note

    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        log = RunLog(direct, writer="test")
        assert log.refresh().length == 0
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        nodes = []
        for rank in (0, 1):
            store = open_store(f"{moto_url}/run", timeout_s=DEADLINE_S)
            nodes.append(member_of(tmp_path, rank, release(rank), WAIT_S, store=store))

        def save(step: int) -> None:
            for rank in range(4):
                stage(nodes[rank // 2], tmp_path, rank, step)

        for number, (fault, keys) in enumerate(TROUBLES.values(), start=1):
            for key in keys:
                proxy.strike(fault, methods=() if key == "*" else ["PUT"], key=key)
            save(10 * number)
            with heard:
                both = {(0, 10 * number), (1, 10 * number)}
                assert heard.wait_for(lambda both=both: both <= released, WAIT_S)  # type: ignore[misc]
            proxy.mend()
            save(10 * number + 1)
            give_up_at_s = time.monotonic() + WAIT_S
            while [each.step for each in log.refresh().checkpoints[:1]] != [10 * number + 1]:
                assert time.monotonic() < give_up_at_s, (number, log.view.checkpoints)
                threading.Event().wait(0.05)
        for node in nodes:
            node.close(WAIT_S)
    manifest = read_manifest(direct, log.view.checkpoints[0], RUN_ID)
    assert digest(direct, manifest) == expected_digest(full_tensors())


def test_a_store_that_refuses_to_delete_is_told_once(tmp_path: Path) -> None:
    """Each commit tries to delete what expired. Without the right to, the run goes on, and one event tells the remedy."""
    checkpointing = member_of(tmp_path, 0)
    with capture_logs() as events:
        for failure in (AccessDenied("no"), StoreError("slow"), AccessDenied("no")):
            checkpointing.untidy(failure)
    assert [each["event"] for each in events] == ["tidy_denied", "tidy_failed"]
    assert "checkpoint.tidy = false" in events[0]["cause"]
