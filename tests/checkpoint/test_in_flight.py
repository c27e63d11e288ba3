"""Which checkpoints may still be committed after a change of members, and by which node."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.checkpoint.in_flight import committer, over
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Checkpoint, Commit, Generation, InMemory, Stop
from tests.membership.world import generation, member


def of(number: int, resume_step: int, *nodes: str) -> Generation:
    """A generation that resumed from memory."""
    memory = InMemory(number - 1, resume_step, ()) if resume_step else None
    return replace(generation(*nodes), number=number, memory=memory)


def committed(step: int) -> Commit:
    """A commit of a step."""
    return Commit((Checkpoint(step, 1, f"ckpt/{step}", 1, "0" * 64, None),), "history/x")


@pytest.mark.parametrize(
    ("later", "why"),
    [
        ([], ""),
        ([of(5, 120, "b", "c")], ""),
        ([of(5, 150, "b", "c"), of(6, 121, "b")], ""),
        ([of(5, 119, "b", "c")], "generation 5 resumed from step 119, before step 120"),
        (
            [of(5, 100, "b"), of(6, 130, "b")],
            "generation 5 resumed from step 100, before step 120",
        ),
        ([of(5, 0, "b")], "generation 5 resumed from step 0, before step 120"),
        ([of(5, 120, "c")], "no member of generation 4 is left in generation 5"),
    ],
)
def test_each_later_generation_must_have_resumed_at_or_after_the_step(
    later: list[Generation], why: str
) -> None:
    """Step 120 of generation 4 may be committed while all later generations train from it, and a member is left."""
    view = RunView(generations=(of(4, 100, "a", "b"), *later))
    assert over(view, 4, 120) == why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"commit": committed(119)}, ""),
        ({"commit": committed(120)}, "step 120 is committed"),
        ({"commit": committed(130)}, "step 130 is committed"),
        ({"commit": committed(130), "quarantined": frozenset({"ckpt/130"})}, ""),
        ({"stop": Stop("asked", 5)}, "the run has ended: asked"),
        ({"generations": (of(5, 120, "a"),)}, "the log as it was read has no generation 4"),
    ],
)
def test_a_newer_commit_ends_all_attempts_before_it(changes: dict[str, object], why: str) -> None:
    """COMMITs stay in the order of steps, and nothing is committed after the end of the run."""
    view = RunView(generations=(of(4, 100, "a"),))
    assert over(replace(view, **changes), 4, 120) == why  # type: ignore[arg-type]


def test_the_first_member_that_was_there_commits() -> None:
    """In rank order of the newest generation; its members that joined later do not know the checkpoint."""
    view = RunView(generations=(of(4, 0, "a", "b", "c"), of(5, 120, "d", "c", "b")))
    assert committer(view, 4) == member("c")
    assert committer(view, 5) == member("d")
    assert committer(view, 3) is None
    assert committer(RunView(), 4) is None


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4)), min_size=2, max_size=8), st.data()
)
def test_only_ancestors_of_the_state_in_training_are_committed(
    changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    """For any run: a state may be committed if and only if each of its steps was done in the lineage of the newest generation.

    A generation goes back by some steps and does others. Each step is known by the generation that did it.
    """
    line: list[int] = []
    generations, saved = [], {}
    for number, (back, steps) in enumerate(changes, start=1):
        line = line[: max(0, len(line) - back)]
        generations.append(of(number, len(line), "a"))
        for _ in range(steps):
            line = [*line, number]
            saved[number, len(line)] = line
    number, step = data.draw(st.sampled_from(sorted(saved)))
    view = RunView(generations=tuple(generations))
    resumed = line[: generations[-1].resume_step]
    ancestor = number == len(changes) or resumed[:step] == saved[number, step]
    assert (over(view, number, step) == "") == ancestor
