"""When a generation that stopped as planned may end, and which of its leaving members must stay for one more."""

import dataclasses
from itertools import product

import pytest

from elastic_pt.membership.decision.settled import Settled, needed, settled
from elastic_pt.membership.decision.status import (
    MESH_NODES_MAX,
    Held,
    NodePhase,
    NodeStatus,
    is_news,
)
from elastic_pt.runlog.records import (
    Cause,
    CauseKind,
    Checkpoint,
    Generation,
    Member,
    Request,
    Verb,
)

MEMBERS = tuple(Member(name, f"{name}-1", "127.0.0.1", 1, 1, 1) for name in "abcd")
WORLD = Generation(3, MEMBERS, (2, 2, 2, 2), "127.0.0.1", 1, None, "test")
NAMES = [each.node for each in MEMBERS]


def held(step: int, rank: int, *, number: int = 3) -> Held:
    """The rows of one worker of four."""
    return Held(number, step, rank, rank + 1, 4)


def ring(step: int, *, number: int = 3) -> dict[str, tuple[Held, ...]]:
    """Each node holds its own worker's rows of a step, and a copy of the next node's."""
    return {
        name: (held(step, rank, number=number), held(step, (rank + 1) % 4, number=number))
        for rank, name in enumerate(NAMES)
    }


def statuses(
    told: dict[str, tuple[Held, ...]], leaving: str = "", gone: str = ""
) -> dict[str, NodeStatus]:
    """The reports of the members that are not gone."""
    return {
        each.incarnation: dataclasses.replace(
            NodeStatus.first(each, {}), held=told[each.node], leaving=each.node in leaving
        )
        for each in MEMBERS
        if each.node not in gone
    }


def found(
    told: dict[str, NodeStatus], *requests: Request, commits: tuple[int, ...] = ()
) -> Settled:
    """Where step 7 is safe; generation 3 has committed these steps."""
    checkpoints = [Checkpoint(step, 3, f"ckpt/{step}", 1, "0" * 64, None) for step in commits]
    return settled(WORLD, 7, told, checkpoints, requests)


def test_state_held_by_all_members_waits_for_no_commit() -> None:
    """A join ends the generation as soon as the members hold each row of its last step."""
    assert found(statuses(ring(7))) == Settled("memory", "a, b, c, d hold step 7")


def test_commit_counts_whatever_is_in_memory() -> None:
    """A commit of this generation at or after the step settles it. One of an earlier step does not."""
    nothing = statuses(dict.fromkeys(NAMES, ()))
    assert found(nothing, commits=(7,)) == Settled("bucket", "step 7 is committed")
    assert not found(nothing, commits=(6,))


def test_commit_of_another_generation_does_not_count() -> None:
    """A commit of the same step by an earlier generation belongs to other steps of training."""
    old = Checkpoint(7, 2, "ckpt/7", 1, "0" * 64, None)
    assert not settled(WORLD, 7, statuses(dict.fromkeys(NAMES, ())), [old], [])


@pytest.mark.parametrize("way", ["leaving", "gone"])
@pytest.mark.parametrize(("first", "second"), list(product(NAMES, NAMES)))
def test_only_members_that_stay_count(first: str, second: str, way: str) -> None:
    """In a ring of four, one or two members may go, unless one of them is the other's only mirror."""
    if way == "leaving":
        told = statuses(ring(7), leaving=first + second)
    else:
        told = statuses(ring(7), gone=first + second)
    neighbours = abs(NAMES.index(first) - NAMES.index(second)) in (1, 3)
    assert bool(found(told)) == (not neighbours)


def test_missing_rows_are_named() -> None:
    """While rows are missing, the reason names their workers."""
    told = statuses(ring(7), leaving="bc")
    reason = "step 7 is not committed; not held by members that stay: 2"
    assert found(told) == Settled("", reason)


def test_rows_of_another_step_or_generation_are_missing() -> None:
    """A state is never put together from two steps or two generations."""
    for other in (ring(6), ring(8), ring(7, number=2)):
        assert not found(statuses(ring(7) | {name: other[name] for name in "ab"}))


def test_resting_member_counts_as_one_that_goes() -> None:
    """A node that rests is not in the next generation, so it gives it no rows."""
    told = statuses(ring(7))
    for name in "bc":
        told[f"{name}-1"] = dataclasses.replace(told[f"{name}-1"], resting="no space")
    assert not found(told)


def test_whole_fleet_that_leaves_waits_for_the_bucket() -> None:
    """If no member stays, nobody could resume from memory."""
    reason = "step 7 is not committed, and no member stays"
    assert found(statuses(ring(7), leaving="abcd")) == Settled("", reason)


@pytest.mark.parametrize("verb", [Verb.PAUSE, Verb.STOP])
def test_promise_of_a_commit_is_kept(verb: Verb) -> None:
    """A pause and a stop promise a commit: operators may switch all machines off afterwards."""
    request = Request(verb, "ann@desk", index=7)
    assert not found(statuses(ring(7)), request)
    assert found(statuses(ring(7)), request, commits=(7,))


@pytest.mark.parametrize("verb", [Verb.PAUSE, Verb.STOP])
@pytest.mark.parametrize("way", ["waits", "has left"])
def test_promise_does_not_count_after_another_member_ended_the_generation(
    verb: Verb, way: str
) -> None:
    """A member that ended before the request may be gone with its part: no commit of this step may be possible."""
    request = Request(verb, "ann@desk", index=7)
    ended = dataclasses.replace(
        NodeStatus.first(MEMBERS[1], {}), held=ring(7)["b"], leaving=way == "has left", spent=3
    )
    told, gone = statuses(ring(7), gone="b"), {"b-1": ended}
    if way == "waits":
        told, gone = told | gone, {}
    assert settled(WORLD, 7, told, [], [request], gone).tier == "memory"
    for other in (
        dataclasses.replace(ended, spent=2),
        dataclasses.replace(ended, broken=3),
        dataclasses.replace(ended, failure=Cause(CauseKind.GAVE_UP, "b", "not committed")),
    ):
        assert not settled(WORLD, 7, told | {"b-1": other}, [], [request])


def test_other_requests_promise_nothing() -> None:
    """A checkpoint that is asked for stays in force until a commit meets it; a drain needs none."""
    for verb in (Verb.CHECKPOINT, Verb.DRAIN):
        assert found(statuses(ring(7)), Request(verb, "ann@desk", node="b", index=7))


def test_member_of_a_large_fleet_follows_a_leader() -> None:
    """With many members, most know the leaders only. A leader ends the generation when it has seen all rows."""
    count = MESH_NODES_MAX + 1
    members = tuple(Member(f"n{n:02}", f"n{n:02}", "127.0.0.1", 1, 1, 1) for n in range(count))
    world = Generation(3, members, (1,) * count, "127.0.0.1", 1, None, "test")
    told = {each.incarnation: NodeStatus.first(each, {}) for each in (members[0], members[-1])}
    assert not settled(world, 7, told, [], [])
    told["n00"] = dataclasses.replace(told["n00"], spent=3)
    assert settled(world, 7, told, [], []).tier == "memory"
    # Also if this member and all leaders leave: others stay.
    out = {each: dataclasses.replace(said, leaving=True) for each, said in told.items()}
    assert settled(world, 7, out, [], []).tier == "memory"
    gone = {"n00": out.pop("n00")}
    assert settled(world, 7, out, [], [], gone).tier == "memory"
    # The leader ended because the generation was broken: it has seen nothing.
    told["n00"] = dataclasses.replace(told["n00"], broken=3)
    assert not settled(world, 7, told, [], [])


# ---- members that must stay ---------------------------------------------------------------------------


def kept(told: dict[str, NodeStatus], leaving: str, committed_step: int = 0) -> list[str]:
    """The leaving members that must stay, by name."""
    stay = [
        each for each in MEMBERS if each.node not in leaving and told[each.incarnation] is not None
    ]
    out = [each for each in MEMBERS if each.node in leaving]
    return [each.node for each in needed(WORLD, stay, out, told, committed_step)]


def test_leaving_member_with_the_only_copy_stays() -> None:
    """If two neighbours leave, the mirror of the other one stays for one more generation, and no other node does."""
    assert kept(statuses(ring(7)), "b") == []
    assert kept(statuses(ring(7)), "bd") == []
    assert kept(statuses(ring(7)), "bc") == ["b"]


def test_leaving_member_is_not_needed_for_a_committed_state() -> None:
    """A state that is not newer than the bucket's keeps no node from leaving. Neither does one without members."""
    assert kept(statuses(ring(7)), "bc", committed_step=7) == []
    assert kept(statuses(ring(7)), "bc", committed_step=6) == ["b"]
    assert kept(statuses(ring(7)), "abcd") == []
    assert kept(statuses(dict.fromkeys(NAMES, ())), "bc") == []


# ---- how peers learn of it ----------------------------------------------------------------------------


def test_new_rows_are_news_once_the_workers_have_stopped() -> None:
    """Peers wait for what a settling node holds. While workers run it changes with each step and wakes no peer."""
    status = NodeStatus.first(MEMBERS[0], {})
    for phase, news in ((NodePhase.RUNNING, False), (NodePhase.SETTLING, True)):
        before = dataclasses.replace(status, phase=phase, held=(held(7, 0),))
        older = dataclasses.replace(before, held=(dataclasses.replace(held(7, 0), age_s=1.0),))
        assert not is_news(older, before)
        more = dataclasses.replace(before, held=(held(7, 0), held(7, 1)))
        assert is_news(more, before) == news
