"""The fence under load: takeover races, and zombies that wake up after one, on real stores.

A takeover race of generation g starts all writers from one barrier, each in a separate process, with a separate
store and log. The node that made generation g commits on its behalf repeatedly; all
others propose generation g + 1, each for itself. The winner is the one that commits in the next race.

    barrier ─► owner of g:  COMMIT, COMMIT, ... FencedError        ─► each reports its view
               the others:  GENERATION g + 1, or FencedError

A zombie is a process that stops itself (SIGSTOP) before or after a create, and continues after a takeover.
"""

import hashlib
import json
import multiprocessing
import os
import random
import secrets
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import repeat
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from elastic_pt.errors import FencedError
from elastic_pt.runlog.log import RunLog, RunView, fold
from elastic_pt.runlog.records import (
    Body,
    Checkpoint,
    Commit,
    Generation,
    Member,
    Quarantine,
    Record,
    Stop,
)
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

RUNS = 10
"""Runs with races in parallel, because a race mostly waits for the store."""
RACES_PER_RUN = {"file": 100, "s3": 30}
"""By the store's scheme: a race on S3 takes ten times as long."""
WRITERS = 4
COMMITS_MAX = 3
ZOMBIE_ROUNDS = 3
PATIENCE_S = 60.0

# Not fork: the stores of this process have threads. Not forkserver: it may have other AWS variables.
CONTEXT = multiprocessing.get_context("spawn")


def seed_of_this_run() -> int:
    """A seed for each run, printed; `ELASTIC_PT_SEED` repeats one."""
    seed = int(os.environ.get("ELASTIC_PT_SEED") or secrets.randbits(32))
    print(f"ELASTIC_PT_SEED={seed}")
    return seed


def generation(number: int, node: str) -> Generation:
    """A generation of one node."""
    member = Member(node, f"{node}-life", "127.0.0.1", 1, 1, 1)
    return Generation(number, (member,), (8,), "127.0.0.1", 1, None, "takeover")


def commit(view: RunView, number: int) -> Commit:
    """A checkpoint of generation `number`, for any newest generation."""
    step = view.length
    newest = Checkpoint(step, number, f"ckpt/{step:010d}-g{number}-abcd", 1, "0" * 64, None)
    return Commit((newest, *view.checkpoints[:1]), "history/x")


def owner_of(view: RunView) -> str:
    """The node that made the newest generation."""
    assert view.generation is not None
    return view.generation.members[0].node


@dataclass(frozen=True)
class Told:
    """The end of one append, as its writer reports it."""

    writer: str
    race: int
    """The newest generation in the writer's view."""
    wanted: str
    """The kind of record."""
    fenced: bool
    length: int
    """Number of records in the writer's view."""
    view: str
    """Hash of the writer's whole view."""


def hash_of(view: RunView) -> str:
    """SHA-256 over the content of a view."""
    return hashlib.sha256(repr(view).encode()).hexdigest()


def attempt(log: RunLog, writer: str, race: int, make: Callable[[RunView], Body]) -> Told:
    """One append on behalf of generation `race`, and the writer's view afterwards."""
    wanted = type(make(log.view)).__name__
    try:
        view, fenced = log.append(make, generation=race), False
    except FencedError:
        view, fenced = log.view, True
    return Told(writer, race, wanted, fenced, view.length, hash_of(view))


def races_for(url: str) -> range:
    """The races for one run, by the generation that is taken over."""
    return range(1, RACES_PER_RUN[url.partition(":")[0]] + 1)


def race_for_run(url: str, writer: str, seed: int, barrier: Barrier) -> list[Told]:
    """One writer's part in all races for one run, and its view after each append."""
    choice = random.Random(f"{seed} {url} {writer}")
    told: list[Told] = []
    try:
        log = RunLog(open_store(url, timeout_s=30.0), writer=writer)
        log.refresh()
        for race in races_for(url):
            owns = owner_of(log.view) == writer
            barrier.wait(PATIENCE_S)
            # A seeded delay, so that takeovers and commits meet at different points.
            if choice.random() < 0.5:
                log.refresh()
            if not owns:
                told.append(attempt(log, writer, race, lambda _: generation(race + 1, writer)))
                barrier.wait(PATIENCE_S)
                continue
            for _ in range(choice.randint(1, COMMITS_MAX)):
                told.append(attempt(log, writer, race, lambda view: commit(view, race)))
                if told[-1].fenced:
                    break
            barrier.wait(PATIENCE_S)
            if not told[-1].fenced:
                told.append(attempt(log, writer, race, lambda view: commit(view, race)))
    except BaseException:
        barrier.abort()
        raise
    return told


def write_in_races(
    urls: list[str], writer: str, seed: int, barriers: list[Barrier], told_path: Path
) -> None:
    """Process of one writer: takes part in the races for every run, one thread each, and writes its views."""
    with ThreadPoolExecutor(len(urls)) as pool:
        told = pool.map(race_for_run, urls, repeat(writer), repeat(seed), barriers)
    told_path.write_text(json.dumps([[asdict(each) for each in run] for run in told]))


def prefixes(records: list[Record]) -> list[RunView]:
    """The view at every length of the log."""
    views = [RunView()]
    for record in records:
        views.append(fold(views[-1], record))
    return views


def check_one_lineage(records: list[Record]) -> None:
    """Each generation once and in order, and each commit by, and on behalf of, the newest one before it."""
    views = prefixes(records)
    numbers = [each.body.number for each in records if isinstance(each.body, Generation)]
    assert numbers == list(range(1, len(numbers) + 1))
    for before, record in zip(views[:-1], records, strict=True):
        if isinstance(record.body, Commit):
            newest = before.generation_number
            assert (record.generation, record.body.newest.generation) == (newest, newest)
            assert record.writer == owner_of(before)


def check_beliefs(records: list[Record], told: list[Told]) -> None:
    """Every writer's view is a prefix of the log, and the log holds what they appended and nothing else."""
    views = [hash_of(view) for view in prefixes(records)]
    for each in told:
        assert each.view == views[each.length], f"{each.writer} in race {each.race}"
    appended = {each.length - 1: each for each in told if not each.fenced}
    assert len(appended) == sum(not each.fenced for each in told)
    assert sorted(appended) == list(range(1, len(records)))
    for index, each in appended.items():
        body = records[index].body
        assert (each.writer, each.wanted) == (records[index].writer, type(body).__name__)


@pytest.fixture(params=["file", pytest.param("ceph", marks=pytest.mark.ceph)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty run directory: on a local disk, and on a real S3 server."""
    if request.param == "file":
        return f"file://{tmp_path}/run"
    return f"{request.getfixturevalue('ceph_url')}/run"


@contextmanager
def running(processes: list[BaseProcess]) -> Iterator[None]:
    """Started processes that are killed afterwards, in any state."""
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_every_takeover_race_leaves_one_lineage(url: str, tmp_path: Path) -> None:
    """One of the nodes that take over a generation succeeds, and no writer of the old one appends after it."""
    seed, names = seed_of_this_run(), [f"writer-{number}" for number in range(WRITERS)]
    urls = [f"{url}-{number}" for number in range(RUNS)]
    for each in urls:
        start = RunLog(open_store(each), writer=names[0])
        start.append(lambda _: generation(1, names[0]), generation=0)
    barriers = [CONTEXT.Barrier(WRITERS) for _ in urls]
    paths = [tmp_path / f"{name}.json" for name in names]
    writers: list[BaseProcess] = [
        CONTEXT.Process(target=write_in_races, args=(urls, name, seed, barriers, path), daemon=True)
        for name, path in zip(names, paths, strict=True)
    ]
    with running(writers):
        for writer in writers:
            writer.join()
        assert [writer.exitcode for writer in writers] == [0] * WRITERS
    told_by_writer = [json.loads(path.read_text()) for path in paths]
    races = races_for(url)
    commits = 0
    for number, each in enumerate(urls):
        told = [Told(**words) for runs in told_by_writer for words in runs[number]]
        records = list(RunLog(open_store(each), writer="judge").records())
        check_one_lineage(records)
        check_beliefs(records, told)
        assert prefixes(records)[-1].generation_number == len(races) + 1
        won = [word.race for word in told if word.wanted == "Generation" and not word.fenced]
        assert sorted(won) == list(races)
        # All but the winner: the owner of the old generation, and the other proposers of the new one.
        lost = Counter(word.race for word in told if word.fenced)
        assert lost == dict.fromkeys(races, WRITERS - 1)
        commits += sum(isinstance(record.body, Commit) for record in records)
    # If the owner is always too late, or never, there was no race.
    total = RUNS * len(races)
    assert 0.1 * total < commits < 0.9 * total * (1 + COMMITS_MAX) / 2


class Moment(StrEnum):
    """Where a zombie stops itself."""

    BEFORE = "before its append"
    INSIDE = "between its read of the log and its create"
    AFTER = "after its create, before the answer"


class StandingStill:
    """A store that stops its own process at one moment of the next create."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.moment: Moment | None = None

    def create(self, key: str, data: bytes) -> None:
        """As the store's own, with the stop before or after it."""
        self.stand_still(Moment.INSIDE)
        self._store.create(key, data)
        self.stand_still(Moment.AFTER)

    def stand_still(self, moment: Moment) -> None:
        """Stop until SIGCONT, if this is the moment; once."""
        if self.moment is moment:
            self.moment = None
            signal.raise_signal(signal.SIGSTOP)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


BODIES: dict[str, Callable[[RunView, int], Body]] = {
    "Commit": commit,
    "Generation": lambda _, number: generation(number + 1, "zombie"),
    "Quarantine": lambda _, number: Quarantine(f"ckpt/of-{number}", "bad"),
    "Stop": lambda view, _: Stop("completed", view.length),
}


def write_as_zombie(url: str, parent: Connection) -> None:
    """Process of a zombie: appends the requested record, and stops itself at the given moment."""
    store = StandingStill(open_store(url, timeout_s=30.0))
    log = RunLog(store, writer="zombie")
    while order := json.loads(parent.recv_bytes()):
        race = log.refresh().generation_number
        store.moment = Moment(order["moment"])
        store.stand_still(Moment.BEFORE)
        told = attempt(log, "zombie", race, lambda view: BODIES[order["wanted"]](view, race))
        parent.send_bytes(json.dumps(asdict(told)).encode())


def test_a_zombie_appends_nothing(url: str) -> None:
    """A process that was stopped during an append and was replaced is fenced when it wakes up."""
    orders = [
        *((Moment.BEFORE, wanted) for wanted in BODIES),
        *((Moment.INSIDE, wanted) for wanted in BODIES),
        (Moment.AFTER, "Commit"),
    ] * ZOMBIE_ROUNDS
    random.Random(seed_of_this_run()).shuffle(orders)
    log = RunLog(open_store(url), writer="successor")
    log.append(lambda _: generation(1, "zombie"), generation=0)
    here, there = CONTEXT.Pipe()
    zombie = CONTEXT.Process(target=write_as_zombie, args=(url, there), daemon=True)
    told: list[Told] = []
    with running([zombie]):
        for moment, wanted in orders:
            here.send_bytes(json.dumps({"moment": moment, "wanted": wanted}).encode())
            assert zombie.pid is not None
            _, status = os.waitpid(zombie.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), f"the zombie ended with {status}"
            race = log.refresh().generation_number
            new = generation(race + 1, "successor")
            told.append(attempt(log, "successor", race, lambda _: new))
            told.append(attempt(log, "successor", race + 1, lambda view: commit(view, race + 1)))
            os.kill(zombie.pid, signal.SIGCONT)
            assert here.poll(PATIENCE_S)
            told.append(Told(**json.loads(here.recv_bytes())))
            assert (told[-1].wanted, told[-1].fenced) == (wanted, moment is not Moment.AFTER)
            # The zombie owns the next generation again, so that it can lose it.
            back = generation(race + 2, "zombie")
            told.append(attempt(log, "successor", race + 1, lambda _: back))
    records = list(RunLog(open_store(url), writer="judge").records())
    check_one_lineage(records)
    check_beliefs(records, told)
    assert sum(record.writer == "zombie" for record in records) == ZOMBIE_ROUNDS
