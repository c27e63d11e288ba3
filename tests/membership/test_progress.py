"""The frontier of a run, and which steps a new generation has to do again, with a real log and pulse."""

import pytest

from elastic_pt.membership.decision.progress import pulse_bytes, step_in_pulse
from elastic_pt.membership.pulse import KEY
from elastic_pt.runlog.records import Checkpoint, Generation
from tests.membership.bucket import WatchedStore
from tests.membership.fleet import TICK_S, Fleet
from tests.membership.world import LIMITS


def steps(generation: Generation | None) -> tuple[int | None, int, int]:
    """What the generation before reached, the frontier, and the steps that were lost between them."""
    assert generation is not None
    return generation.reached_step, generation.frontier_step, generation.lost_steps


def lose(fleet: Fleet, *names: str) -> Generation | None:
    """These nodes die; returns the generation of the others, whose workers then start."""
    generation = fleet.log.generation
    assert generation is not None
    fleet.dead.update(names)
    fleet.spend(generation.number, *(each.node for each in generation.members))
    fleet.pass_time(1.0)
    assert fleet.log.generation_number == generation.number + 1
    fleet.run()
    return fleet.log.generation


def test_frontier_stays_while_steps_are_done_again(fleet: Fleet) -> None:
    """A generation that begins during the redo lost no step if it resumes where the others stopped, but does old steps."""
    fleet.form("a", "b")
    fleet.step(150, "a", "b")
    assert steps(lose(fleet, "b")) == (150, 150, 150)
    fleet.step(41, "a")
    checkpoint = Checkpoint(41, 2, "ckpt/41", 1, "0" * 64, None)
    fleet.choose_resume = lambda _: checkpoint
    fleet.start("c")
    fleet.pass_time(2.0)
    assert "c joins" in fleet.drains
    fleet.spend(2, "a")
    fleet.pass_time(2.0)
    assert fleet.log.generation_number == 3
    assert steps(fleet.log.generation) == (41, 150, 0)


def test_steps_are_lost_once(fleet: Fleet) -> None:
    """A generation that breaks before its first step loses nothing more: its nodes still state an earlier one's step."""
    fleet.form("a", "b", "c", "d")
    fleet.step(100, *"abcd")
    assert steps(lose(fleet, "d")) == (100, 100, 100)
    assert steps(lose(fleet, "c")) == (0, 100, 0)
    fleet.step(30, "a", "b")
    assert steps(lose(fleet, "b")) == (30, 100, 30)


def test_new_fleet_takes_the_frontier_from_the_pulse(fleet: Fleet, bucket: WatchedStore) -> None:
    """If no member is left, the last pulse says how far they were; without one the number of lost steps is unknown."""
    fleet.form("a", "b")
    fleet.step(64, "a", "b")
    fleet.nodes["a"].step_pulse()
    for names, reached in (("cd", 64), ("ef", None)):
        fleet.dead.update(fleet.nodes)
        fleet.start(*names)
        for _ in range(round((LIMITS.elastic.takeover_s + 4.0) / TICK_S)):
            fleet.pass_time(TICK_S)
            for node in fleet.alive():
                node.step_pulse()
            # Their workers never start, so that they write no pulse.
        assert steps(fleet.log.generation) == (reached, 64, reached or 0)
    assert step_in_pulse(bucket.read(KEY), 1) == 64


@pytest.mark.parametrize("pulse", [None, b"", b'[1, "a1", 4]', b"{}", b"7", b'[1, "a1", 4, null]'])
def test_pulse_that_tells_no_step_is_ignored(pulse: bytes | None) -> None:
    """A pulse of an earlier version, of another generation, or damaged, is no pulse with a step."""
    assert step_in_pulse(pulse, 1) is None
    assert step_in_pulse(pulse_bytes(2, "a1", 4, 9), 1) is None
    assert step_in_pulse(pulse_bytes(1, "a1", 4, 9), 1) == 9
