"""The log has one order and one lineage, and a fenced writer cannot append."""

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_pt.errors import FencedError, LogDamaged
from elastic_pt.runlog.log import (
    BARS_KEPT,
    GENERATIONS_KEPT,
    RunLog,
    RunView,
    fold,
    record_key,
)
from elastic_pt.runlog.records import (
    ORIGIN,
    Body,
    Checkpoint,
    Commit,
    Generation,
    Kind,
    Member,
    Quarantine,
    Record,
    Recovery,
    Reopen,
    Stop,
)
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store


def generation(number: int, *nodes: str) -> Generation:
    """A generation of one-worker nodes."""
    members = tuple(Member(node, f"{node}-life", "127.0.0.1", 1, 1, 1) for node in nodes or ("a",))
    return Generation(number, members, (8,) * len(members), "127.0.0.1", 1, None, "test")


def commit(step: int, number: int, *older: Checkpoint) -> Commit:
    """A commit of one step, with older ones kept."""
    newest = Checkpoint(step, number, f"ckpt/{step:010d}-g{number}-abcd", 1, "0" * 64, 1.0)
    return Commit((newest, *older), "history/x")


def test_late_reader_gets_the_view_of_a_follower(tmp_path: Path) -> None:
    """Opening by a listing and pointers gives the same view as reading every record, except for older generations."""
    store = open_store(f"file://{tmp_path}")
    writer = RunLog(store, writer="a")
    writer.append(lambda _: generation(1), generation=0)
    number = 1
    for step in range(1, 40):
        if step % 5 == 0:
            number += 1
            writer.append(lambda _: generation(number), generation=number - 1)
        elif step % 7 == 0:
            directory = writer.view.checkpoints[0].directory
            writer.append(lambda _: Quarantine(directory, "bad"), generation=number)
        elif step % 6 == 0:
            writer.append(lambda _: Quarantine("", "flaps", "b", step), generation=number)
        elif step % 8 == 0:
            writer.append(lambda _: Recovery(number, 1, 2, 3, 4, step), generation=number)
        else:
            writer.append(
                lambda view: commit(step, number, *view.checkpoints[:2]), generation=number
            )
        late = RunLog(store, writer="b").refresh()
        replayed = RunView()
        for record in RunLog(store, writer="c").records():
            replayed = fold(replayed, record)
        assert replayed == writer.view
        newest = dataclasses.replace(replayed, generations=replayed.generations[-1:])
        assert late == newest
        assert late.run_id == replayed.run_id != ""
    assert [each.number for each in replayed.generations] == list(range(1, number + 1))
    assert [bar.seconds for _, bar in late.bars] == [6, 12, 18, 24, 36]
    assert late.recovery == Recovery(7, 1, 2, 3, 4, 32)


def test_view_keeps_only_the_newest_generations_and_bars() -> None:
    """A view keeps only the newest generations and quarantines of nodes, so it stays small in a long run."""
    view = RunView()
    for index in range(300):
        bodies: list[Body] = [generation(index + 1), Quarantine("", "flaps", "b", 1.0)]
        for body in bodies:
            view = fold(view, Record(view.length, index + 1, "a", "n", "", ORIGIN, {}, body))
    assert [each.number for each in view.generations] == list(range(301 - GENERATIONS_KEPT, 301))
    assert [index for index, _ in view.bars] == list(range(601 - 2 * BARS_KEPT, 600, 2))


def test_quarantine_of_a_node_keeps_all_checkpoints() -> None:
    """A QUARANTINE of a node does not affect checkpoints."""
    view = RunView(commit=commit(5, 1))
    body = Quarantine("", "flaps", "b", 1.0)
    after = fold(view, Record(0, 1, "a", "n", "", ORIGIN, {}, body))
    assert after.checkpoints == view.checkpoints
    assert after.quarantined == frozenset()
    assert after.bars == ((0, body),)


def test_one_of_many_writers_wins_each_generation(tmp_path: Path) -> None:
    """If several nodes propose the same generation, the log has one of them and the others are fenced."""
    store = open_store(f"file://{tmp_path}")
    RunLog(store, writer="first").append(lambda _: generation(1), generation=0)
    outcomes: list[str] = []

    def race(name: str) -> None:
        log = RunLog(store, writer=name)
        for number in range(2, 12):
            try:
                log.append(lambda _: generation(number, name), generation=number - 1)
                outcomes.append(f"{number} {name}")
            except FencedError:
                continue

    threads = [threading.Thread(target=race, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    generations = [
        r.body for r in RunLog(store, writer="x").records() if isinstance(r.body, Generation)
    ]
    assert [each.number for each in generations] == list(range(1, len(generations) + 1))
    assert sorted(outcomes) == sorted(f"{g.number} {g.members[0].node}" for g in generations[1:])


def test_fenced_writer_appends_nothing(tmp_path: Path) -> None:
    """After a newer generation, or a STOP, every append of the old generation is refused and leaves no record."""
    store = open_store(f"file://{tmp_path}")
    old, new = RunLog(store, writer="old"), RunLog(store, writer="new")
    old.append(lambda _: generation(1), generation=0)
    new.append(lambda _: generation(2), generation=1)
    for body in (
        commit(5, 1),
        Quarantine("ckpt/x", "bad"),
        Quarantine("", "flaps", "b", 9.0),
        Recovery(1, 1, 1, 1, 1, 4),
        Stop("completed", 5),
    ):
        with pytest.raises(FencedError, match="replaced by generation 2"):
            old.append(lambda _: body, generation=1)
    with pytest.raises(FencedError, match="is there already"):
        old.append(lambda _: generation(2), generation=1)
    new.append(lambda _: Stop("completed", 5), generation=2)
    with pytest.raises(FencedError, match="the run has ended"):
        new.append(lambda _: commit(6, 2), generation=2)
    assert new.refresh().length == 3


def test_append_that_loses_a_race_is_built_again(tmp_path: Path) -> None:
    """An append that loses its number is built again from the view with the winner's record."""
    store = open_store(f"file://{tmp_path}")
    one, two = RunLog(store, writer="one"), RunLog(store, writer="two")
    one.append(lambda _: generation(1), generation=0)
    two.refresh()
    one.append(lambda _: commit(10, 1), generation=1)
    view = two.append(lambda view: commit(20, 1, *view.checkpoints), generation=1)
    assert [each.step for each in view.checkpoints] == [20, 10]


class Meeting:
    """A store that answers none of the first reads of a record before the next read has come."""

    def __init__(self, store: Store, reads: int) -> None:
        self._store, self._reads = store, reads
        self._came, self._changed = 0, threading.Condition()
        self.waits = True

    def read(self, key: str) -> bytes:
        """Wait for another read."""
        if self.waits:
            with self._changed:
                self._came += 1
                before = self._came
                self._changed.notify_all()
                assert self._changed.wait_for(
                    lambda: self._came > before or self._came >= self._reads, 60.0
                )
        return self._store.read(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_known_records_are_read_ahead(tmp_path: Path) -> None:
    """Records of the view are read several at a time, in order. One that is appended meanwhile is read too."""
    store = open_store(f"file://{tmp_path}")
    writer = RunLog(store, writer="a")
    writer.append(lambda _: generation(1), generation=0)
    for step in range(1, 100):
        writer.append(lambda _: commit(step, 1), generation=1)
    meeting = Meeting(store, reads=90)
    reader = RunLog(cast("Store", meeting), writer="b")
    meeting.waits = False
    reader.refresh()
    meeting.waits = True
    found = []
    for record in reader.records():
        found.append(record.index)
        if record.index == 99:
            meeting.waits = False
            writer.append(lambda _: commit(100, 1), generation=1)
    assert found == list(range(101))


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_altered_record_breaks_the_hash_chain(tmp_path: Path, victim: int) -> None:
    """A reader of the whole log detects a change of any record but the newest."""
    log = RunLog(open_store(f"file://{tmp_path}"), writer="a")
    log.append(lambda _: generation(1), generation=0)
    for step in (1, 2, 3):
        log.append(lambda _: commit(step, 1), generation=1)
    path = tmp_path / record_key(victim)
    document = json.loads(path.read_bytes())
    document["writer"] = "mallory"
    path.chmod(0o644)
    path.write_text(json.dumps(document))
    with pytest.raises(LogDamaged, match="altered"):
        list(RunLog(open_store(f"file://{tmp_path}"), writer="b").records())


@pytest.mark.parametrize("victim", range(6))
def test_no_record_is_created_in_a_gap_of_the_log(tmp_path: Path, victim: int) -> None:
    """If any record but the last is missing, its number is not used again, so no second lineage can begin there."""
    store = open_store(f"file://{tmp_path}")
    log = RunLog(store, writer="a")
    log.append(lambda _: generation(1), generation=0)
    for step in range(1, 7):
        log.append(lambda view: commit(step, 1, *view.checkpoints[:2]), generation=1)
    (tmp_path / record_key(victim)).unlink()
    late = RunLog(store, writer="b")
    try:
        assert late.append(lambda _: generation(2), generation=1).length == 8
    except LogDamaged as error:
        assert record_key(victim) in str(error)  # noqa: PT017
    with pytest.raises(LogDamaged, match="missing"):
        list(RunLog(store, writer="c").records())
    assert store.size(record_key(victim)) is None


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_invalid_record_bytes_raise_an_error_with_the_key(data: bytes) -> None:
    """For any bytes, reading gives a record or one error that names the key."""
    with pytest.raises(LogDamaged, match="log/7"):
        Record.from_bytes(data, key="log/7")


def test_quarantined_checkpoints_do_not_exist(tmp_path: Path) -> None:
    """A checkpoint exists if and only if the newest COMMIT keeps it and no QUARANTINE names it."""
    log = RunLog(open_store(f"file://{tmp_path}"), writer="a")
    log.append(lambda _: generation(1), generation=0)
    log.append(lambda _: commit(10, 1), generation=1)
    log.append(lambda view: commit(20, 1, *view.checkpoints), generation=1)
    view = log.append(lambda view: Quarantine(view.checkpoints[0].directory, "flip"), generation=1)
    assert [each.step for each in view.checkpoints] == [10]
    assert [r.body.newest.step for r in log.chain(view.head, Kind.COMMIT)] == [20, 10]  # type: ignore[union-attr]


def test_only_a_reopen_lifts_a_stop(tmp_path: Path) -> None:
    """After a REOPEN the run continues in the same lineage, for a follower and for a late reader."""
    store = open_store(f"file://{tmp_path}")
    writer = RunLog(store, writer="a")
    writer.append(lambda _: generation(1), generation=0)
    with pytest.raises(FencedError, match="has not ended"):
        writer.append(lambda _: Reopen("why not", False, 0), generation=1)
    for number in (1, 2):
        writer.append(lambda _: Stop("the same failure 3 times", 5), generation=number)
        with pytest.raises(FencedError, match="has ended"):
            writer.append(lambda _: generation(number + 1), generation=number)
        writer.append(lambda _: Reopen("mended", False, 5), generation=number)
        late = RunLog(store, writer="b").refresh()
        for view in (writer.view, late):
            assert view.stop is None
            assert view.reopened_generation == number
            assert view.platform == {}
        writer.append(lambda _: generation(number + 1), generation=number)
    writer.append(lambda _: Stop("completed", 9), generation=3)
    for platform in (False, True):
        with pytest.raises(FencedError, match="complete"):
            writer.append(lambda _: Reopen("more", platform, 9), generation=3)
    late = RunLog(store, writer="b").refresh()
    assert late.stop == Stop("completed", 9)
    assert [record.kind for record in writer.records()].count(Kind.REOPEN) == 2


def test_reopen_frees_the_platform_until_the_next_generation(tmp_path: Path) -> None:
    """A REOPEN with `platform` frees the run from its platform until a generation names one again."""
    store = open_store(f"file://{tmp_path}")
    writer = RunLog(store, writer="a")

    def on(number: int, platform: dict[str, str]) -> Generation:
        return dataclasses.replace(generation(number), platform=platform)

    writer.append(lambda _: on(1, {"processor": "one"}), generation=0)
    assert writer.view.platform == {"processor": "one"}
    writer.append(lambda _: Reopen("no more of these", True, 0), generation=1)
    assert writer.view.platform is None
    assert RunLog(store, writer="b").refresh().platform is None
    writer.append(lambda _: on(2, {"processor": "other"}), generation=1)
    assert writer.view.platform == {"processor": "other"}
    assert RunLog(store, writer="b").refresh().platform == {"processor": "other"}


def permanent(step: int, before: int | None, *older: Checkpoint) -> Commit:
    """A commit of a permanent checkpoint."""
    newest = dataclasses.replace(commit(step, 1).newest, permanent=True)
    return Commit((newest, *older), "history/x", permanent_before=before)


def test_the_chain_of_permanent_checkpoints_is_followed_from_any_commit(tmp_path: Path) -> None:
    """After ordinary commits, quarantines and generations, all permanent checkpoints are still found, newest first."""
    store = open_store(f"file://{tmp_path}")
    log = RunLog(store, writer="a")
    log.append(lambda _: generation(1), generation=0)
    assert list(log.permanent(log.view)) == []
    wanted: list[int] = []
    for step in range(1, 30):
        if step % 7 == 0:
            wanted.insert(0, step)
            log.append(lambda view: permanent(step, view.permanent_record), generation=1)
        elif step % 6 == 0:
            log.append(lambda view: Quarantine(view.checkpoints[0].directory, "bad"), generation=1)
        else:
            ordinary = commit(step, 1)
            log.append(
                lambda view: dataclasses.replace(ordinary, permanent_before=view.permanent_record),
                generation=1,
            )
        late = RunLog(store, writer="b")
        for reader in (log, late):
            view = reader.refresh()
            assert [each.step for each, _ in reader.permanent(view)] == wanted
            assert [each.step for each in reader.usable(view) if each.permanent] == wanted


def test_a_quarantined_permanent_checkpoint_is_listed_but_not_usable(tmp_path: Path) -> None:
    """It stays in the chain, so it is listed and never removed; no run resumes from it."""
    log = RunLog(open_store(f"file://{tmp_path}"), writer="a")
    log.append(lambda _: generation(1), generation=0)
    for step in (10, 20):
        log.append(lambda view: permanent(step, view.permanent_record), generation=1)
    view = log.append(lambda view: Quarantine(view.checkpoints[0].directory, "bad"), generation=1)
    assert [each.step for each, _ in log.permanent(view)] == [20, 10]
    assert [each.step for each in log.usable(view)] == [10]


@pytest.mark.parametrize("before", [0, 1, 2, 99])
def test_a_broken_chain_of_permanent_checkpoints_is_damage(tmp_path: Path, before: int) -> None:
    """A pointer to a record of another kind, to an ordinary commit, to the record itself or beyond the end raises `LogDamaged`."""
    log = RunLog(open_store(f"file://{tmp_path}"), writer="a")
    log.append(lambda _: generation(1), generation=0)
    log.append(lambda _: commit(5, 1), generation=1)
    view = log.append(lambda _: permanent(10, before), generation=1)
    with pytest.raises(LogDamaged, match=r"not the COMMIT of a permanent|missing from the middle"):
        list(log.permanent(view))
