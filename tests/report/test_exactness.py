"""The log alone shows up to which step a checkpoint is exact, if several platforms computed it."""

import dataclasses

import pytest

from elastic_pt.report.exactness import PlatformChange, platform_changes
from elastic_pt.runlog.records import Body, Checkpoint, Generation, Member, Record, Reopen

FIRST = {"processor": "one", "torch": "2"}
OTHER = {"processor": "two", "torch": "2"}


def generation(number: int, step: int, platform: dict[str, str]) -> Generation:
    """A generation that resumes from `step`."""
    member = Member("a", f"life-{number}", "127.0.0.1", 1, 1, 1)
    resume = Checkpoint(step, number - 1, "ckpt/x", 1, "0" * 64, None) if step else None
    return Generation(number, (member,), (8,), "127.0.0.1", 1, resume, "test", platform=platform)


def changes(*bodies: Body, until: int = 99) -> list[tuple[int, str]]:
    """Step and reason of each change in a log of these bodies, up to generation `until`."""
    records = [Record(i, 0, "a", "n", "t", "p", {}, body) for i, body in enumerate(bodies)]
    return [(each.step, each.why) for each in platform_changes(records, FIRST, until)]


REOPEN = Reopen("no more of one", True, 20)


@pytest.mark.parametrize(
    ("bodies", "found"),
    [
        ((generation(1, 0, FIRST), generation(2, 20, FIRST)), []),
        # Older records have no platform; that of the first node counts.
        ((generation(1, 0, {}), REOPEN, generation(2, 20, OTHER)), [(20, REOPEN.why)]),
        ((generation(1, 0, FIRST), REOPEN, generation(2, 20, OTHER)), [(20, REOPEN.why)]),
        # Nothing was committed: the other platform computes all steps.
        ((generation(1, 0, FIRST), REOPEN, generation(2, 0, OTHER)), []),
        # The operator accepted another one, but the old kind came back.
        ((generation(1, 0, FIRST), REOPEN, generation(2, 20, FIRST)), []),
        # A later version records more names of the same platform, and then those of another one.
        (
            (
                generation(1, 0, FIRST),
                generation(2, 20, FIRST | {"probe": "x"}),
                REOPEN,
                generation(3, 40, FIRST | {"probe": "y"}),
            ),
            [(40, REOPEN.why)],
        ),
        # A name that only explains the probe is no change.
        (
            (generation(1, 0, FIRST | {"driver": "1"}), generation(2, 20, FIRST | {"driver": "2"})),
            [],
        ),
        # Back to the first one: two changes.
        (
            (
                generation(1, 0, FIRST),
                REOPEN,
                generation(2, 20, OTHER),
                Reopen("back", True, 40),
                generation(3, 40, FIRST),
                generation(4, 60, FIRST),
            ),
            [(20, REOPEN.why), (40, "back")],
        ),
        # No step of the other platform was kept: the first platform did them again.
        (
            (
                generation(1, 0, FIRST),
                REOPEN,
                generation(2, 20, OTHER),
                Reopen("back", True, 20),
                generation(3, 20, FIRST),
            ),
            [],
        ),
    ],
)
def test_change_counts_from_the_step_of_the_resume(
    bodies: tuple[Body, ...], found: list[tuple[int, str]]
) -> None:
    """A change counts from the step that its generation resumed from, with the operator's reason."""
    assert changes(*bodies) == found


def test_later_generations_do_not_affect_an_earlier_checkpoint() -> None:
    """Only changes up to the generation that wrote a checkpoint count."""
    bodies = (generation(1, 0, FIRST), REOPEN, generation(2, 20, OTHER))
    assert changes(*bodies, until=1) == []


def test_text_of_a_change_names_the_differences() -> None:
    """The text has each differing value, before and after, and the operator's reason."""
    (change,) = platform_changes(
        [
            Record(i, 0, "a", "n", "t", "p", {}, body)
            for i, body in enumerate((generation(1, 0, FIRST), REOPEN, generation(2, 20, OTHER)))
        ],
        FIRST,
        2,
    )
    assert change == PlatformChange(20, ("processor = 'two' after 'one'",), REOPEN.why)
    assert (
        str(change) == "another platform: processor = 'two' after 'one' (reopened: no more of one)"
    )
    assert "torch" not in str(dataclasses.replace(change))
