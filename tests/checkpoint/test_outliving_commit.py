"""Commits after a change of members: another node takes over, in the order of steps, and the history has no gap."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from elastic_pt.checkpoint.commit import CommitRules, Committer, directory_of
from elastic_pt.checkpoint.history import StepHistory
from elastic_pt.checkpoint.verify import verify
from elastic_pt.errors import StoreError
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Checkpoint, Commit, Generation, InMemory, Record
from elastic_pt.store.open import open_store
from tests.checkpoint.committing import WAIT_S, DisturbedStore
from tests.checkpoint.world import full_tensors, stage, training_state, upload_nodes
from tests.membership.world import generation, member


def named(node: str) -> str:
    """The incarnation of a node."""
    return f"abc{node}"


class Run:
    """A run with a log, and committers of several nodes that share a bucket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"file://{folder / 'run'}"
        self.log = RunLog(open_store(self.url), writer="test")
        self.nodes: list[Node] = []

    def begin(self, resume_step: int, *nodes: str) -> Generation:
        """The next generation of one-worker nodes, which resumes from memory."""
        number = self.log.refresh().generation_number + 1
        found = replace(
            generation(),
            number=number,
            members=tuple(replace(member(each), incarnation=named(each)) for each in nodes),
            memory=InMemory(number - 1, resume_step, ()) if resume_step else None,
        )
        self.log.append(lambda _: found, generation=number - 1)
        for node in self.nodes:
            node.log.refresh()
        return found

    def upload(self, of: Generation, step: int, *ranks: int) -> None:
        """Some nodes upload their parts of a checkpoint."""
        run_id, size = self.log.refresh().run_id, len(of.members)
        directory = directory_of(of, step)
        shards = stage(
            self.folder, full_tensors(), size, directory, training_state(step), run_id=run_id
        )
        upload_nodes(open_store(self.url), [shards[rank] for rank in ranks])

    def commits(self) -> list[tuple[Record, Commit]]:
        """The COMMITs of the log with their envelopes."""
        return [
            (record, record.body)
            for record in self.log.records()
            if isinstance(record.body, Commit)
        ]


class Node:
    """The committer of one node, and what it reported."""

    def __init__(self, run: Run, name: str, timeout_s: float = WAIT_S) -> None:
        self.store = DisturbedStore(open_store(run.url))
        self.log = RunLog(self.store, writer=name)
        self.log.refresh()
        self.ends: dict[int, Exception | None] = {}
        self._heard = threading.Condition()
        rules = CommitRules(keep=9, keep_every_steps=0, last_step=99, timeout_s=timeout_s)
        self.committer = Committer(self.store, self.log, StepHistory(), named(name), rules, self)
        run.nodes.append(self)

    def train(self, of: Generation, first: int, last: int) -> None:
        """Its workers do some steps."""
        for step in range(first, last + 1):
            self.committer.note_step(of.number, {"step": step, "loss": float(step)})

    def committed(self, checkpoint: Checkpoint) -> None:
        """See `CommitListener`."""

    def untidy(self, failure: Exception) -> None:
        """See `CommitListener`."""

    def ended(self, generation: Generation, step: int, failure: Exception | None) -> None:
        """See `CommitListener`."""
        with self._heard:
            self.ends[step] = failure
            self._heard.notify_all()

    def end_of(self, step: int) -> Exception | None:
        """Why the checkpoint of a step failed, once it is over; None if it did not."""
        with self._heard:
            assert self._heard.wait_for(lambda: step in self.ends, WAIT_S)
            return self.ends[step]

    def refresh_until(self, condition: Callable[[], bool]) -> None:
        """Read the log, as the membership does, until something holds."""
        give_up_at_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < give_up_at_s
            self.log.refresh()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run without generations."""
    return Run(tmp_path)


def test_another_node_commits_after_the_committing_node_is_lost(run: Run) -> None:
    """Node a is lost after its upload. Node b commits in generation 2 what generation 1 saved, with the whole history."""
    first = run.begin(0, "a", "b")
    b, c = Node(run, "b"), Node(run, "c")
    b.train(first, 1, 12)
    b.committer.expect(10, first)
    run.upload(first, 10, 0)
    second = run.begin(12, "c", "b")
    c.train(second, 13, 14)
    run.upload(first, 10, 1)
    assert b.end_of(10) is None
    ((record, commit),) = run.commits()
    assert (record.generation, commit.newest.generation, commit.newest.step) == (2, 1, 10)
    assert commit.newest.loss == 10.0
    lines = [json.loads(line) for line in open_store(run.url).read(commit.history).splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert verify(open_store(run.url), commit.newest, run.log.refresh().run_id) == []


def test_a_checkpoint_of_another_lineage_is_given_up(run: Run) -> None:
    """Generation 2 resumed before the step: the checkpoint is complete in the bucket, and is not committed."""
    first = run.begin(0, "a", "b")
    b = Node(run, "b")
    with capture_logs() as events:
        b.committer.expect(10, first)
        run.begin(9, "b")
        run.upload(first, 10, 0, 1)
        assert b.end_of(10) is None
    assert run.commits() == []
    abandoned = [each for each in events if each["event"] == "commit_abandoned"]
    assert [(each["step"], each["directory"]) for each in abandoned] == [
        (10, directory_of(first, 10))
    ]


def test_a_store_that_fails_delays_the_commit(run: Run) -> None:
    """An error of the store at the COMMIT is an event, and the commit is tried again: the checkpoint is not lost."""
    first = run.begin(0, "a", "b")
    a = Node(run, "a")
    errors = [StoreError("no answer")]

    def before(verb: str, key: str) -> None:
        if key.startswith("log/") and errors:
            raise errors.pop()

    a.store.before = before  # type: ignore[method-assign]
    with capture_logs() as events:
        run.upload(first, 10, 0, 1)
        a.committer.expect(10, first)
        assert a.end_of(10) is None
    assert not errors
    delayed = [each for each in events if each["event"] == "commit_delayed"]
    assert [(each["step"], each["cause"]) for each in delayed] == [(10, "no answer")]
    assert [commit.newest.step for _, commit in run.commits()] == [10]


def test_a_newer_commit_ends_an_older_checkpoint_quietly(run: Run) -> None:
    """While a part of step 10 is missing, generation 2 commits step 20. Step 10 is not committed after it."""
    first = run.begin(0, "a", "b")
    b = Node(run, "b")
    b.committer.expect(10, first)
    run.upload(first, 10, 1)
    second = run.begin(12, "b", "c")
    b.committer.expect(20, second)
    run.upload(second, 20, 0, 1)
    assert b.end_of(20) is None
    assert b.end_of(10) is None
    run.upload(first, 10, 0)
    b.committer.close(WAIT_S)
    assert [commit.newest.step for _, commit in run.commits()] == [20]


def test_a_missing_notice_ends_the_checkpoint_at_its_timeout(run: Run) -> None:
    """The error names the key and the timeout; nodes that do not commit give the checkpoint up without an error."""
    first = run.begin(0, "a", "b")
    run.upload(first, 10, 0)
    a, b = Node(run, "a", timeout_s=0.3), Node(run, "b", timeout_s=0.3)
    for node in (a, b):
        node.committer.expect(10, first)
    assert "notice-00001.json: missing after 0.3 s" in str(a.end_of(10))
    assert b.end_of(10) is None


def test_a_fenced_commit_is_tried_again_with_the_newer_generation(run: Run) -> None:
    """A generation begins just before the COMMIT is created. Its writer is still a member, so it commits in that one."""
    first = run.begin(0, "a", "b")
    a = Node(run, "a")
    once = [10]

    def before(verb: str, key: str) -> None:
        if key.startswith("log/") and once:
            run.nodes.clear()
            run.begin(once.pop(), "b", "a")

    a.store.before = before  # type: ignore[method-assign]
    run.upload(first, 10, 0, 1)
    a.committer.expect(10, first)
    # The log says that b commits now, because it is first. It is lost; then only a is left.
    a.refresh_until(lambda: a.log.view.generation_number == 2)
    run.begin(10, "a")
    a.refresh_until(lambda: a.log.view.commit is not None)
    assert a.end_of(10) is None
    ((record, commit),) = run.commits()
    assert (record.generation, commit.newest.step) == (3, 10)


def test_the_history_begins_after_the_commit_that_came_first(run: Run) -> None:
    """Another node commits step 5 just before this one commits step 10: no line of a step is in both histories."""
    first = run.begin(0, "a", "b")
    a = Node(run, "a")
    a.train(first, 1, 10)
    other = Checkpoint(5, 1, directory_of(first, 5), 1, "0" * 64, None)
    once = [Commit((other,), "history/x")]

    def before(verb: str, key: str) -> None:
        if key.startswith("log/") and once:
            commit = once.pop()
            run.log.append(lambda _: commit, generation=1)

    a.store.before = before  # type: ignore[method-assign]
    run.upload(first, 10, 0, 1)
    a.committer.expect(10, first)
    assert a.end_of(10) is None
    _, commit = run.commits()[-1]
    lines = [json.loads(line) for line in open_store(run.url).read(commit.history).splitlines()]
    assert [line["step"] for line in lines] == [6, 7, 8, 9, 10]
    assert [each.step for each in commit.checkpoints] == [10, 5]


def test_more_checkpoints_than_the_limit_end_the_oldest_and_not_the_committer(run: Run) -> None:
    """After a long trouble of the bucket many are due. The oldest is given up, even while it is looked at; the others go on."""
    first = run.begin(0, "a")
    node = Node(run, "a")
    node.train(first, 1, 20)
    for step in range(1, 9):
        node.committer.expect(step, first)
    added = [9]

    def before(verb: str, key: str) -> None:
        if key.startswith("log/") and added:
            node.committer.expect(added.pop(), first)

    node.store.before = before
    run.upload(first, 8, 0)
    assert node.end_of(8) is None
    assert node.end_of(1) is None
    node.committer.expect(10, first)
    run.upload(first, 10, 0)
    assert node.end_of(10) is None
    assert [body.newest.step for _, body in run.commits()] == [8, 10]
