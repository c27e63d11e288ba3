"""The order of rows: mixtures are exact after every prefix, and permutations are bijections."""

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastic_pt.data.order import PERIOD_MAX, Mixture, permute, whole_weights
from elastic_pt.errors import DataError

relative_weights = st.lists(st.integers(1, 400), min_size=1, max_size=12)


FROZEN_SOURCES = [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]
FROZEN_ROWS = [8, 9, 5, 4, 10, 6, 7, 1, 2, 0, 3]
FROZEN_FAR_ROWS = [942186036, 358548328, 810863705]


def assert_exact_after_every_prefix(mixture: Mixture, start: int, rows: int) -> None:
    """Count the sources from `start` on and compare with the shares, using only whole numbers."""
    sources, index = mixture.locate(np.arange(start, start + rows, dtype=np.int64))
    n = np.arange(start + 1, start + rows + 1, dtype=np.int64)
    for source, per_period in enumerate(mixture.rows_per_period):
        mine = sources == source
        if not mine.any():
            continue
        before = int(index[mine][0])
        np.testing.assert_array_equal(index[mine], np.arange(before, before + mine.sum()))
        count = before + np.cumsum(mine)
        deviation = np.abs(count * mixture.period - n * per_period)
        assert deviation.max() <= mixture.period


@given(relative_weights)
@settings(max_examples=80, deadline=None)
@example([1])
@example([1, 999_999])
@example([1, 1, 1, 999_997])
@example([1] * 40 + [960])
def test_mixture_is_exact_to_one_row_after_every_prefix(weights: list[int]) -> None:
    """After any number of rows, each source is within one row of its share."""
    mixture = Mixture([float(weight) for weight in weights])
    assert mixture.shares == tuple(Fraction(weight, sum(weights)) for weight in weights)
    assert_exact_after_every_prefix(mixture, 0, min(3 * mixture.period, 1_100_000))


def test_mixture_keeps_a_weight_of_one_millionth() -> None:
    """The smallest weight gets one row in a million, and the others get their exact shares."""
    mixture = Mixture([1e-6, 0.3, 0.699999])
    assert mixture.rows_per_period == (1, 300_000, 699_999)
    assert_exact_after_every_prefix(mixture, 0, 2_000_000)


@given(st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=8))
@settings(max_examples=8, deadline=None)
def test_weights_without_a_common_denominator_are_kept_to_a_millionth(weights: list[float]) -> None:
    """Such weights are rounded by at most one millionth; the mixture follows the rounded ones exactly."""
    mixture = Mixture(weights)
    for share, weight in zip(mixture.shares, weights, strict=True):
        assert abs(float(share) - weight / sum(weights)) <= 1 / PERIOD_MAX + 1e-12
    assert_exact_after_every_prefix(mixture, 0, mixture.period)


def test_decimal_weights_become_exact_fractions() -> None:
    """0.1 means one tenth, not the nearest binary number, and thirds stay thirds."""
    assert whole_weights([0.1, 0.2, 0.7]) == (1, 2, 7)
    assert whole_weights([1 / 3, 1 / 3, 1 / 3]) == (1, 1, 1)
    assert whole_weights([3.0, 1.0]) == (3, 1)


def test_no_weight_is_rounded_to_zero() -> None:
    """A hundred sources of about one millionth keep at least a row each, and the sum is the period."""
    whole = whole_weights([1.0, 0.3141592] + [1.51234567e-6] * 100)
    assert min(whole) == 1
    assert sum(whole) == PERIOD_MAX


@pytest.mark.parametrize(
    "weights", [[], [0.0], [-1.0], [float("nan")], [float("inf")], [1.0, 1e-7]]
)
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    """An impossible weight raises `DataError`; without it, a source might never be read."""
    with pytest.raises(DataError, match=r"expected|at least one source"):
        whole_weights(weights)


def test_seek_far_ahead_is_fast_and_exact() -> None:
    """Row 10**12 of a mixture costs as much as row 0 and keeps the bound."""
    mixture = Mixture([1e-6, 0.3, 0.699999])
    start = time.perf_counter()
    mixture.locate(np.array([10**12], dtype=np.int64))
    permute(np.array([10**12 - 7]), 10**12, seed=1, source=0, epoch=10**6)
    assert time.perf_counter() - start < 0.1
    assert_exact_after_every_prefix(mixture, 10**12 - 17, 10_000)


@pytest.mark.parametrize(
    "rows",
    [1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 97, 255, 256, 257, 1023, 1024, 1025, 7919, 65537],
)
def test_a_permutation_is_a_bijection(rows: int) -> None:
    """Every row comes exactly once per epoch, for primes and for the neighbours of powers of two."""
    for epoch in range(3):
        order = permute(np.arange(rows), rows, seed=5, source=1, epoch=epoch)
        np.testing.assert_array_equal(np.sort(order), np.arange(rows))


@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 99), st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_a_bijection_under_every_key(
    rows: int, seed: int, source: int, epoch: int
) -> None:
    """Every seed, source and epoch gives a bijection, and each place can be computed alone."""
    order = permute(np.arange(rows), rows, seed=seed, source=source, epoch=epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(rows))
    place = epoch % rows
    alone = permute(np.array([place]), rows, seed=seed, source=source, epoch=epoch)
    assert alone[0] == order[place]


def test_each_seed_source_and_epoch_has_its_own_order() -> None:
    """Two permutations of 1000 rows that differ in one part of the key agree in about one place."""

    def order(**key: int) -> np.ndarray:
        return permute(np.arange(1000), 1000, **{"seed": 0, "source": 0, "epoch": 0, **key})

    for other in (order(seed=1), order(source=1), order(epoch=1)):
        assert (order() == other).sum() < 12
    assert (order() == np.arange(1000)).sum() < 12


def test_permutation_scatters_neighbours() -> None:
    """The order looks random: neighbours are a third of the rows apart on average, as in a random order."""
    order = permute(np.arange(100_000), 100_000, seed=3, source=0, epoch=0)
    assert np.abs(np.diff(order)).mean() == pytest.approx(100_000 / 3, rel=0.02)
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02


def test_order_of_rows_is_frozen() -> None:
    """A run that began with an older release reads the same rows; any change needs a new ORDER_VERSION."""
    mixture = Mixture([0.5, 0.3, 0.2])
    assert mixture.locate(np.arange(10))[0].tolist() == FROZEN_SOURCES
    assert permute(np.arange(11), 11, seed=42, source=1, epoch=2).tolist() == FROZEN_ROWS
    far = permute(np.arange(3), 10**9 + 7, seed=42, source=0, epoch=0).tolist()
    assert far == FROZEN_FAR_ROWS
