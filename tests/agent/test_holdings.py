"""What a node holds in memory and may forget: the pure rules."""

from elastic_pt.agent.holdings import MIRROR_S, Copy, Holdings
from elastic_pt.checkpoint.snapshot import Buffer
from elastic_pt.membership.decision.status import Unusable
from elastic_pt.runlog.records import Generation, InMemory, Member
from elastic_pt.runlog.state import State

MEMBERS = tuple(Member(name, f"{name}-1", "127.0.0.1", 1, 1, 1) for name in "abc")


def generation(number: int, memory: InMemory | None = None) -> Generation:
    """A generation of three nodes with one worker each."""
    return Generation(
        number,
        MEMBERS,
        (2, 2, 2),
        "127.0.0.1",
        1,
        None,
        "test",
        memory=memory,
        mirrors=((2,), (0,), (1,)),
    )


def copy(number: int, step: int, rank: int, *, file: int = 0) -> Copy:
    """A buffer with a whole state."""
    return Copy(Buffer(number, rank, file), step, 100, b"", 0.0)


def first_node(memory: InMemory | None = None, number: int = 2) -> Holdings:
    """Node a. It is mirrored by node c, and holds step 5 of generation 1: its own rows, and a copy of node b's."""
    holdings = Holdings()
    holdings.starts(generation(1), 0)
    for rank in (0, 1):
        assert holdings.add(copy(1, 5, rank))
    holdings.starts(generation(number, memory or InMemory(1, 5, (0, 1, 2), ((), (0,), ()))), 0)
    return holdings


def states(holdings: Holdings) -> set[tuple[int, int, int, int]]:
    """Generation, step and ranks of what is held."""
    return {
        (each.generation, each.step, each.first_rank, each.end_rank) for each in holdings.held(0.0)
    }


def test_planned_change_does_not_wait_for_a_mirror_that_goes() -> None:
    """A mirror that leaves may be gone before it has this node's last step. It is not waited for; others are."""
    node = first_node()
    assert not node.is_complete(6, {"a-1", "b-1"}), "it does not hold it itself"
    node.add(copy(2, 6, 0))
    assert node.take_complete() is None
    assert not node.is_complete(6, {"a-1", "b-1", "c-1"})
    assert node.is_complete(6, {"a-1", "b-1"})
    node.acknowledge("c-1", 6, copied=True)
    assert node.is_complete(6, {"a-1", "b-1", "c-1"})
    assert not node.is_complete(7, {"a-1", "b-1"})


def test_mirror_without_room_holds_nobody_up_and_counts_as_no_copy() -> None:
    """The workers go on, but the state has no copy there: an older one that has copies must not be forgotten."""
    node = first_node()
    node.add(copy(2, 6, 0))
    assert node.take_complete() is None
    node.acknowledge("c-1", 6, copied=False)
    assert (node.take_complete(), node.mirrors_have_room) == (6, False)
    assert states(node) == {(1, 5, 0, 2), (2, 6, 0, 1)}
    # It has found room.
    node.add(copy(2, 7, 0, file=1))
    node.acknowledge("c-1", 7, copied=True)
    assert (node.take_complete(), node.mirrors_have_room) == (7, True)
    node.forget_others()
    assert states(node) == {(2, 6, 0, 1), (2, 7, 0, 1)}


def test_kept_copy_that_is_overwritten_is_not_kept() -> None:
    """A mirror overwrites a step that its neighbour has released, and may learn of that afterwards. It must not upload it."""
    node = first_node()
    node.add(copy(2, 6, 1))
    node.neighbour_keeps(2, range(1, 2), [6])
    assert list(node.checkpoint(State(2, 6))) == [1]
    node.drop(Buffer(2, 1, 0))
    assert (node.checkpoint(State(2, 6)), node.checkpoints) == ({}, ())


def test_step_that_was_overwritten_is_not_complete() -> None:
    """A stop may overwrite the step that a mirror has: then no node may forget what came before it."""
    node = first_node()
    for step, file in ((6, 0), (7, 1), (8, 0)):
        node.add(copy(2, step, 0, file=file))
    node.acknowledge("c-1", 6, copied=True)
    assert node.take_complete() is None
    node.acknowledge("c-1", 7, copied=True)
    assert node.take_complete() == 7


def test_mirror_that_never_ends_is_waited_for_no_longer() -> None:
    """Checkpoints wait for mirrors, so one that fails for ever must not keep the run from committing."""
    node = first_node()
    node.add(copy(2, 6, 0))
    assert (node.expire(MIRROR_S - 1.0), node.take_complete()) == ([], None)
    assert node.expire(MIRROR_S) == ["c-1"]
    assert (node.take_complete(), node.mirrors_have_room) == (6, False)
    assert node.expire(2 * MIRROR_S) == []


def test_report_of_a_node_that_is_no_mirror_changes_nothing() -> None:
    """Only the mirrors that the generation has chosen hold the workers up."""
    node = first_node()
    node.add(copy(2, 6, 0))
    node.acknowledge("b-1", 6, copied=True)
    assert node.take_complete() is None
    node.acknowledge("b-1", 6, copied=False)
    assert node.mirrors_have_room


def test_state_older_than_a_commit_is_forgotten() -> None:
    """It is never chosen again. A state of the committed step itself is: memory is faster than the bucket."""
    node = first_node()
    assert not node.forget_before(5)
    assert states(node) == {(1, 5, 0, 2)}
    assert node.forget_before(6)
    assert states(node) == set()
    # The newest generation's own states stay.
    node.add(copy(2, 6, 0))
    assert not node.forget_before(9)
    assert states(node) == {(2, 6, 0, 1)}


def test_spare_copies_make_room_and_the_first_copy_of_every_row_stays() -> None:
    """Nodes without room forget copies at the same time. The copy that is read first stays on its node."""
    memory = InMemory(1, 5, (0, 1, 2), ((), (0,), ()))
    node = first_node(memory)
    assert node.forget_spares()
    assert states(node) == {(1, 5, 0, 1)}
    assert not node.forget_spares()
    assert states(node) == {(1, 5, 0, 1)}
    # Where this node's copy is the one that is read first, it stays.
    node = first_node(InMemory(1, 5, (0, 0, 2), ((), (1,), ())))
    assert not node.forget_spares()


def test_damaged_copy_is_unusable_at_once_and_alone() -> None:
    """One wrong byte says nothing of the other copies."""
    node = first_node()
    node.copy_failed((1, 5), 1, "b-1", damaged=True)
    assert node.unusable == (Unusable(1, 5, 1, "b-1"),)


def test_node_that_does_not_answer_is_given_up_in_the_second_generation() -> None:
    """Several workers may fail in one start. A node that fails in two generations is not asked a third time."""
    memory = InMemory(1, 5, (0, 1, 2), ((), (0,), ()))
    node = first_node(memory)
    for _ in range(8):
        node.copy_failed((1, 5), 1, "b-1", damaged=False)
    assert node.unusable == ()
    node.starts(generation(3, memory), 0)
    node.copy_failed((1, 5), 1, "b-1", damaged=False)
    assert node.unusable == (Unusable(1, 5, 1, "b-1"),)
    # A generation that resumes from another state forgets it: the reports in heartbeats stay small.
    node.starts(generation(4), 0)
    assert node.unusable == ()
