"""What `chaos live` does to a run and what it refuses to do, on a log without agents."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_pt.chaos.live import Disturbance, LiveKind, choose, strike
from elastic_pt.config import parse_config
from elastic_pt.errors import ConfigError, NotDone
from elastic_pt.report.status import Run
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Control, Verb
from elastic_pt.store.open import open_store
from tests.report.planted_run import PlantedRun

NODES = ("node-0", "node-1", "node-2")

OpenRun = Callable[..., Run]


@pytest.fixture
def planted(tmp_path: Path) -> PlantedRun:
    """A run that trains with three nodes."""
    made = PlantedRun(tmp_path)
    made.generation(NODES)
    return made


@pytest.fixture
def open_run(tmp_path: Path, planted: PlantedRun) -> OpenRun:
    """Opens it as the command does, with overrides of its configuration."""

    def opened(*overrides: str) -> Run:
        store = open_store(f"file://{tmp_path}")
        text = f'[run]\nurl = "{tmp_path}"\n[data]\nurl = "data"\n'
        config = parse_config(text, source="test", overrides=overrides)
        return Run(store, RunLog(store, writer="elastic-pt"), config)

    return opened


def disturb(run: Run, disturbance: Disturbance) -> None:
    """Disturb it, and do not wait for what nobody does."""
    strike(run, disturbance, by="me", pause_s=60.0, timeout_s=0.0)


def verbs(run: Run) -> list[Verb]:
    """What was asked of it, in order."""
    bodies = [each.body for each in run.log.records()]
    return [each.request.verb for each in bodies if isinstance(each, Control)]


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_that_is_not_allowed_is_refused_before_anything_else(
    seed: int, open_run: OpenRun
) -> None:
    """Whatever chance would do first: 20 disturbances must not end with a mistake after the seventh."""
    kinds = [LiveKind.PAUSE, LiveKind.KILL]
    with pytest.raises(ConfigError, match=r"elastic.chaos = false .* expected true"):
        choose(open_run(), kinds, 1, random.Random(seed))
    choose(open_run("elastic.chaos=true"), kinds, 1, random.Random(seed))


def test_as_many_nodes_as_the_run_needs_are_left(open_run: OpenRun) -> None:
    """Only members are struck, and never more than allowed."""
    run = open_run("elastic.nodes_min=2")
    one = choose(run, [LiveKind.DRAIN], 1, random.Random(1))
    assert {each.node for each in one.members} < set(NODES)
    with pytest.raises(ConfigError, match="3 nodes train; expected at least 4"):
        choose(run, [LiveKind.DRAIN], 2, random.Random(1))


def test_nothing_is_done_if_the_members_have_changed_since_the_question(
    open_run: OpenRun, planted: PlantedRun
) -> None:
    """Whoever answers after minutes has agreed to what was shown."""
    run = open_run("elastic.chaos=true")
    chosen = [choose(run, [kind], 1, random.Random(1)) for kind in LiveKind]
    planted.generation(NODES[:2])
    for each in chosen:
        with pytest.raises(NotDone, match="nothing done, as the members have changed"):
            disturb(run, each)
    assert verbs(run) == []
    assert run.store.keys("chaos/") == []


@pytest.mark.parametrize("moment", ["before it stands still", "while it stands still"])
def test_a_pause_ends_with_the_command(
    moment: str, open_run: OpenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal must not leave a run that stands still."""

    def interrupt(_: float) -> None:
        raise SystemExit(143)

    run = open_run()
    disturbance = choose(run, [LiveKind.PAUSE], 1, random.Random(1))
    monkeypatch.setattr(time, "sleep", interrupt)
    if moment == "while it stands still":
        monkeypatch.setattr("elastic_pt.chaos.live.is_done", lambda *_: True)
    with pytest.raises(SystemExit):
        strike(run, disturbance, by="me", pause_s=60.0, timeout_s=60.0)
    assert verbs(run) == [Verb.PAUSE, Verb.RESUME]
