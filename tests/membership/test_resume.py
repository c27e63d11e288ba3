"""The choice of the state in memory from which a new generation resumes."""

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elastic_pt.membership.decision.resume import newest_in_memory, why_not_memory
from elastic_pt.membership.decision.status import Held, NodeStatus, Unusable
from elastic_pt.runlog.records import Generation, InMemory, Member

MEMBERS = tuple(Member(name, f"{name}-1", "127.0.0.1", 1, 1, 1) for name in "abcd")


def generation(number: int = 3, memory: InMemory | None = None) -> Generation:
    """The newest generation, of four nodes with one worker each."""
    return Generation(number, MEMBERS, (2, 2, 2, 2), "127.0.0.1", 1, None, "test", memory=memory)


def held(step: int, rank: int, *, number: int = 3, end: int = 0) -> Held:
    """Rows of the workers from `rank` on, of four."""
    return Held(number, step, rank, end or rank + 1, 4)


def statuses(*told: tuple[Held, ...]) -> dict[str, NodeStatus]:
    """The members' reports of the rows that they hold, in the order of members."""
    return {
        member.incarnation: dataclasses.replace(NodeStatus.first(member, {}), held=each)
        for member, each in zip(MEMBERS, told, strict=False)
    }


RING = ((held(7, 0), held(7, 1)), (held(7, 1), held(7, 2)), (held(7, 2), held(7, 3)), (held(7, 3), held(7, 0)))  # fmt: skip
"""Each node holds its own worker's rows of step 7, and a copy of the next node's."""


@pytest.mark.parametrize("lost", range(4))
def test_loss_of_any_node_leaves_the_state_in_memory(lost: int) -> None:
    """With one copy in a ring any single node may be lost. The others hold all rows together."""
    others = [member for member in MEMBERS if member is not MEMBERS[lost]]
    found = newest_in_memory(generation(), others, statuses(*RING), 0)
    assert found is not None
    assert (found.generation, found.step) == (3, 7)
    all_held = statuses(*RING)
    for rank, source in enumerate(found.sources):
        offered = all_held[others[source].incarnation].held
        assert any(each.first_rank <= rank < each.end_rank for each in offered)


def test_loss_of_a_node_with_its_mirror_needs_the_bucket() -> None:
    """If two neighbours are lost, the only two copies of a worker's rows are lost."""
    assert newest_in_memory(generation(), MEMBERS[:2], statuses(*RING), 0) is None
    why = why_not_memory(generation(), MEMBERS[:2], statuses(*RING), 0)
    assert why == "no member holds the rows of worker 3 of generation 3 at step 7"
    why = why_not_memory(generation(), MEMBERS[:1], statuses(*RING), 0)
    assert why.endswith("of worker 2 of generation 3 at step 7 (and of 1 more)")
    assert newest_in_memory(generation(), MEMBERS[::2], statuses(*RING), 0) is not None


def test_newest_complete_step_is_chosen() -> None:
    """A newer step with missing rows is not used. Rows of two steps are never mixed."""
    told = [(*each, held(8, rank)) for rank, each in enumerate(RING)]
    found = newest_in_memory(generation(), MEMBERS[1:], statuses(*told), 0)
    assert found is not None
    assert found.step == 7
    found = newest_in_memory(generation(), MEMBERS, statuses(*told), 0)
    assert found is not None
    assert found.step == 8


def test_snapshots_of_two_generations_are_never_mixed() -> None:
    """Snapshots of one step from two generations are two states, even with equal bits."""
    told = [(held(7, 0, number=2, end=2),), (held(7, 2, end=4),)]
    before = InMemory(2, 7, (0, 0, 0, 0))
    assert newest_in_memory(generation(3, before), MEMBERS[:2], statuses(*told), 0) is None


def test_state_that_the_generation_resumed_from_counts() -> None:
    """Until a new generation has its own snapshot, the state that it resumed from counts. An older one does not."""
    told = statuses((held(7, 0, number=2, end=4),))
    assert newest_in_memory(generation(3), MEMBERS, told, 0) is None
    assert why_not_memory(generation(3), MEMBERS, told, 0) == (
        "no member holds a state of generation 3"
    )
    assert newest_in_memory(generation(3, InMemory(2, 6, (0,) * 4)), MEMBERS, told, 0) is None
    found = newest_in_memory(generation(3, InMemory(2, 7, (0,) * 4)), MEMBERS, told, 0)
    assert found == InMemory(2, 7, (0, 0, 0, 0), ((), (), (), ()))


def test_newer_checkpoint_wins_over_memory() -> None:
    """The state in memory is used if its step is not older than the committed one."""
    assert newest_in_memory(generation(), MEMBERS, statuses(*RING), 8) is None
    why = why_not_memory(generation(), MEMBERS, statuses(*RING), 8)
    assert why == "the bucket has step 8, memory only step 7"
    assert newest_in_memory(generation(), MEMBERS, statuses(*RING), 7) is not None


def test_state_that_a_member_could_not_read_is_not_chosen_again() -> None:
    """A state that a node could not read is not used again. Each new generation would fail in the same way."""
    told = statuses(*RING)
    reader = MEMBERS[2].incarnation
    told[reader] = dataclasses.replace(told[reader], unusable=(Unusable(3, 7, -1, ""),))
    assert newest_in_memory(generation(), MEMBERS, told, 0) is None
    assert why_not_memory(generation(), MEMBERS, told, 0) == (
        "all copies of the rows of worker 0 of generation 3 at step 7 are unusable (and of 3 more)"
    )


def test_bad_copy_is_left_out_and_the_other_one_is_taken() -> None:
    """One copy that a member could not read says nothing of the other copy of the same rows."""
    told = statuses(*RING)
    reader = MEMBERS[2].incarnation
    told[reader] = dataclasses.replace(told[reader], unusable=(Unusable(3, 7, 1, "a-1"),))
    found = newest_in_memory(generation(), MEMBERS, told, 0)
    assert found is not None
    assert found.holders(1) == (1,)
    assert found.holders(2) == (1, 2)
    # Both copies of a row are bad: an older whole state is taken, if there is one.
    both = (Unusable(3, 7, 1, "a-1"), Unusable(3, 7, 1, "b-1"))
    told[reader] = dataclasses.replace(told[reader], unusable=both)
    assert newest_in_memory(generation(), MEMBERS, told, 0) is None
    why = why_not_memory(generation(), MEMBERS, told, 0)
    assert why == "all copies of the rows of worker 1 of generation 3 at step 7 are unusable"
    older = {
        name: dataclasses.replace(each, held=(*each.held, Held(3, 6, 0, 4, 4)))
        for name, each in told.items()
    }
    found = newest_in_memory(generation(), MEMBERS, older, 0)
    assert found is not None
    assert found.step == 6


@example([[(3, 1, 0, 4), (3, 2, 0, 1)], [], [], []])
@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 5), st.integers(1, 5)),
            max_size=6,
        ),
        min_size=4,
        max_size=4,
    )
)
def test_chosen_state_is_always_held_whole(offers: list[list[tuple[int, int, int, int]]]) -> None:
    """For any reports, each source of the chosen state has reported these rows of exactly that state."""
    told = statuses(
        *(tuple(Held(number, step, first, end, 4) for number, step, first, end in each) for each in offers)
    )  # fmt: skip
    found = newest_in_memory(generation(), MEMBERS, told, 0)
    whole = {
        step
        for step in range(1, 4)
        if all(
            any(
                (each.generation, each.step) == (3, step)
                and each.first_rank <= rank < each.end_rank <= 4
                for status in told.values()
                for each in status.held
            )
            for rank in range(4)
        )
    }
    assert (found.step if found else 0) == max(whole, default=0)
    assert (why_not_memory(generation(), MEMBERS, told, 0) == "") is (found is not None)
    if found is None:
        return
    assert len(found.sources) == 4
    for rank, source in enumerate(found.sources):
        assert any(
            (each.generation, each.step) == (found.generation, found.step)
            and each.first_rank <= rank < each.end_rank <= 4
            for each in told[MEMBERS[source].incarnation].held
        )
