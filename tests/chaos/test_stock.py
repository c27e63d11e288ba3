"""What stock torchrun's runs came to, by the steps that its workers began."""

from dataclasses import replace

import pytest

from chaos_tests.stock import pause_and_loss
from tests.chaos.made_up import fault, played, struck, training


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (training(40.0, 7, 14), (27.2, 2)),
        ([*training(16.0, 7, 20), *training(40.0, 18, 24)], (20.0, 2)),
        (training(40.0, 6, 8), (None, None)),
        ([], (None, None)),
    ],
    ids=["at once", "it restarts later", "no new step", "no step"],
)
def test_pause_and_loss(
    after: list[tuple[float, int]], expected: tuple[float | None, int | None]
) -> None:
    """A pause ends with a new step, not with one that is done again."""
    spec = struck(14.0)
    run = played(spec, steps=[*training(10.0, 0, 9), *after])
    assert pause_and_loss(run.progress, spec) == expected


def test_a_join_pauses_only_who_trains() -> None:
    """The others train on until the newcomer is there."""
    spec = replace(struck(11.0, fault("join")), nodes=("node-2",))
    run = played(spec, steps=[*training(10.0, 0, 9), *training(20.0, 10, 12)])
    pause_s, lost = pause_and_loss(run.progress, spec)
    assert pause_s == pytest.approx(6.4)
    assert lost == 0
