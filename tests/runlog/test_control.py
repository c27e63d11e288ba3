"""What operators ask of a run through its log: which requests hold, and when they are carried out."""

import dataclasses
from pathlib import Path

import pytest

from elastic_pt.errors import FencedError
from elastic_pt.runlog.control import ask, carried_out, is_done
from elastic_pt.runlog.log import RunLog, RunView, fold
from elastic_pt.runlog.records import (
    Body,
    Checkpoint,
    Commit,
    Generation,
    InMemory,
    Member,
    Recovery,
    Reopen,
    Request,
    Stop,
    Verb,
)
from elastic_pt.store.open import open_store


class Run:
    """A run's log, and a reader that opens it anew after each record."""

    def __init__(self, folder: Path) -> None:
        self._url = f"file://{folder}"
        self.log = RunLog(open_store(self._url), writer="a")
        self.append(self.generation(1))

    def generation(self, number: int) -> Generation:
        """A generation of one node."""
        members = (Member("a", "a1", "127.0.0.1", 1, 1, 1),)
        return Generation(number, members, (8,), "127.0.0.1", 1, None, "test")

    def append(self, body: Body) -> RunView:
        """Append for the newest generation. A late reader and a replay must see what a follower sees."""
        number = self.log.view.generation_number
        view = self.log.append(lambda _: body, generation=number)
        late = RunLog(open_store(self._url), writer="b").refresh()
        replayed = RunView()
        for record in self.log.records():
            replayed = fold(replayed, record)
        assert replayed == view
        assert (late.requests, late.control) == (view.requests, view.control)
        return view

    def commit(self, step: int, request: int = -1) -> RunView:
        """Commit a checkpoint."""
        newest = Checkpoint(step, 1, f"ckpt/{step}", 1, "0" * 64, None)
        return self.append(Commit((newest,), "history", request=request))

    def ask(self, verb: Verb, node: str = "", by: str = "ann@desk") -> Request:
        """Ask for something; what the log makes of it."""
        control = ask(self.log.view, Request(verb, by, node=node))
        self.append(control)
        return control.request

    def holds(self) -> list[tuple[Verb, str, bool]]:
        """The requests that hold."""
        return [(each.verb, each.node, each.done) for each in self.log.view.requests]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with one generation."""
    return Run(tmp_path)


def test_a_checkpoint_is_asked_for_until_a_commit_meets_it(run: Run) -> None:
    """A COMMIT that was on its way before the request does not meet it; one with its index does, for older ones too."""
    first, before = run.ask(Verb.CHECKPOINT), run.log.view
    run.commit(10)
    assert not is_done(run.log.view, first, before)
    second = run.ask(Verb.CHECKPOINT)
    assert run.holds() == [(Verb.CHECKPOINT, "", False)]
    run.commit(20, second.index)
    assert is_done(run.log.view, first, before)
    assert is_done(run.log.view, second, before)
    assert run.holds() == []


@pytest.mark.parametrize("verb", [Verb.PAUSE, Verb.STOP])
def test_a_generation_that_makes_the_promised_commit_may_begin(run: Run, verb: Verb) -> None:
    """A pause and a stop promise a commit: a generation with newer steps in memory makes it, until the pause is done."""
    run.commit(10)
    request = run.ask(verb)

    def begin(step: int) -> None:
        memory = InMemory(1, step, (0,))
        run.append(dataclasses.replace(run.generation(2), memory=memory))

    with pytest.raises(FencedError, match="no generation may begin"):
        begin(10)
    if verb is Verb.PAUSE:
        run.append(carried_out(run.log.view, request))
        with pytest.raises(FencedError, match="no generation may begin"):
            begin(11)
        request = run.ask(verb)
    begin(11)
    assert run.log.view.generation_number == 2


def test_a_pause_holds_until_a_resume(run: Run) -> None:
    """While it holds no generation may begin, whoever asks; once all workers have stopped it is done and still holds."""
    run.ask(Verb.CHECKPOINT)
    pause, before = run.ask(Verb.PAUSE), run.log.view
    with pytest.raises(FencedError, match="no generation may begin: pause asked for by ann@desk"):
        run.append(run.generation(2))
    run.commit(10)
    assert not is_done(run.log.view, pause, before)
    run.append(carried_out(run.log.view, pause))
    assert is_done(run.log.view, pause, before)
    assert run.holds() == [(Verb.PAUSE, "", True)], "everything is committed"
    with pytest.raises(FencedError, match="no generation may begin"):
        run.append(run.generation(2))
    with pytest.raises(FencedError, match="not asked for any more"):
        carried_out(run.log.view, pause)
    held = run.log.view
    resume = run.ask(Verb.RESUME, by="bob@desk")
    assert run.holds() == []
    assert not is_done(run.log.view, resume, held)
    run.append(run.generation(2))
    assert not is_done(run.log.view, resume, held)
    run.append(Recovery(2, 0.1, 0.1, 0.1, 0.1, 0.4))
    assert is_done(run.log.view, resume, held)


def test_a_resume_without_a_pause_changes_nothing(run: Run) -> None:
    """It is done at once, and so is one of a pause that no worker has stopped for yet."""
    before = run.log.view
    resume = run.ask(Verb.RESUME)
    assert is_done(run.log.view, resume, before)
    run.ask(Verb.PAUSE)
    before = run.log.view
    resume = run.ask(Verb.RESUME)
    assert is_done(run.log.view, resume, before)
    assert run.holds() == []


def test_a_drain_holds_until_its_node_has_left(run: Run) -> None:
    """Each node has a drain of its own; that of one node says nothing of another one, and a new generation ends none."""
    a, b = run.ask(Verb.DRAIN, "a"), run.ask(Verb.DRAIN, "b")
    before = run.log.view
    assert run.log.view.request(Verb.DRAIN, "a") == a
    run.append(carried_out(run.log.view, a))
    assert run.holds() == [(Verb.DRAIN, "b", False)]
    assert is_done(run.log.view, a, before)
    run.append(run.generation(2))
    assert not is_done(run.log.view, b, before)


@pytest.mark.parametrize("verb", [Verb.PAUSE, Verb.STOP, Verb.DRAIN, Verb.CHECKPOINT])
def test_an_end_and_a_reopen_end_every_request(run: Run, verb: Verb) -> None:
    """What was asked of a run that has ended does not hold up the one that goes on after a REOPEN."""
    request, before = run.ask(verb, "a" if verb is Verb.DRAIN else ""), run.log.view
    run.append(Stop("stopped by ann@desk", 0))
    assert is_done(run.log.view, request, before)
    with pytest.raises(FencedError, match="has ended"):
        run.ask(Verb.RESUME)
    run.append(Reopen("again", False, 0))
    assert run.holds() == []
    run.append(run.generation(2))
    run.ask(Verb.CHECKPOINT)
    assert run.holds() == [(Verb.CHECKPOINT, "", False)]


def test_a_request_is_told_with_who_asked() -> None:
    """One line for people: what, of which node, within which time, by whom and why."""
    request = Request(Verb.DRAIN, "ann@desk", "new memory", "b", 30.0)
    assert str(request) == "drain of node b within 30 s asked for by ann@desk: new memory"
    assert str(Request(Verb.PAUSE, "ann@desk")) == "pause asked for by ann@desk"
    assert dataclasses.replace(request, why="").origin == "by ann@desk"
