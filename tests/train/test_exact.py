"""The bits of a run do not depend on how many workers computed it."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_pt.train.exact import DyadicSum, Rounds, fold, row_square_sums
from tests.train.world import config_for, train_through

EVERYTHING = (
    "model.qk_norm=true",
    "train.z_loss=0.001",
    "train.clip_norm=0.5",
    "train.weight_decay=0.3",
)


def tree_sum(values: list[torch.Tensor]) -> torch.Tensor:
    """The definition: split at the largest power of two below the number of slots."""
    if len(values) == 1:
        return values[0]
    half = 1 << (len(values) - 1).bit_length() - 1
    return tree_sum(values[:half]) + tree_sum(values[half:])


@settings(deadline=None, max_examples=200)
@given(slots=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_any_order_of_arrival_gives_the_bits_of_the_tree(slots: int, seed: int) -> None:
    """For any order of arrival, the sum has the bits of the canonical tree."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(5, generator=generator) * 10.0 ** (slot % 7 - 3) for slot in range(slots)]
    order = list(range(slots))
    random.Random(seed).shuffle(order)
    tree = DyadicSum(slots)
    for slot in order:
        tree.add(slot, values[slot].clone())
    assert torch.equal(tree.take_root(), tree_sum(values))


@pytest.mark.parametrize(("slots", "world_size"), [(8, 3), (64, 4), (512, 64), (100, 7), (17, 17)])
def test_few_partial_sums_are_pending(slots: int, world_size: int) -> None:
    """With slots assigned round by round, at most log2(V) + 1 partial sums are pending."""
    rounds, tree, most = Rounds(slots, world_size), DyadicSum(slots), 0
    for index in range(rounds.count):
        rounds.index = index
        for rank in range(world_size):
            if (slot := rounds.slot_of(rank)) < slots:
                tree.add(slot, torch.ones(1))
        most = max(most, len(tree._pending))
    assert tree.take_root().item() == slots
    assert most <= slots.bit_length()


@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 70),
    cut=st.integers(0, 30),
    seed=st.integers(0, 999),
)
def test_a_rows_square_sum_does_not_depend_on_its_neighbours(
    rows: int, columns: int, cut: int, seed: int
) -> None:
    """Cutting a tensor between any two rows leaves every row's sum of squares the same, bit for bit."""
    tensor = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    cut = min(cut, rows)
    parts = torch.cat([row_square_sums(tensor[:cut]), row_square_sums(tensor[cut:])])
    assert torch.equal(parts, row_square_sums(tensor))
    assert torch.allclose(parts, tensor.double().square().sum(1))


def test_fold_adds_up() -> None:
    """The fold is a sum: each element counts once, whatever the length."""
    for width in range(1, 70):
        assert fold(torch.arange(width, dtype=torch.float64)).item() == width * (width - 1) / 2


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[float]]:
    """20 steps in a world of one, with everything on and untied heads."""
    directory = tmp_path_factory.mktemp("reference")
    config = config_for(directory, *EVERYTHING, "model.tied_embeddings=false")
    return train_through(config, [(1, 20)])


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 7, 8])
def test_the_digest_is_that_of_a_world_of_one(
    world_size: int, reference: tuple[str, list[float]], tmp_path: Path
) -> None:
    """After 20 steps weights, optimizer state and every loss have the bits of W = 1, for every W up to V = 8."""
    config = config_for(tmp_path, *EVERYTHING, "model.tied_embeddings=false")
    assert train_through(config, [(world_size, 20)]) == reference


@pytest.mark.distributed
def test_resizing_during_a_run_changes_no_bit(
    reference: tuple[str, list[float]], tmp_path: Path
) -> None:
    """A run that passes through worlds of 3, 1, 8, 5 and 2, resharding in between, ends with the same bits."""
    config = config_for(tmp_path, *EVERYTHING, "model.tied_embeddings=false")
    assert train_through(config, [(3, 4), (1, 7), (8, 11), (5, 16), (2, 20)]) == reference


@pytest.mark.distributed
@pytest.mark.parametrize(
    "overrides", [(), ("train.global_batch=6",), ("train.global_batch=5", "train.micro_batch=1")]
)
def test_tied_heads_and_odd_numbers_of_slots(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """Tied embeddings, and V that is no power of two, are as independent of W."""
    expected = train_through(config_for(tmp_path / "1", *overrides), [(1, 6)])
    for world_size in (2, 3, 5):
        config = config_for(tmp_path / str(world_size), *overrides)
        assert train_through(config, [(world_size, 6)]) == expected


@pytest.mark.distributed
def test_native_learns_the_same_within_rounding(
    reference: tuple[str, list[float]], tmp_path: Path
) -> None:
    """numerics = native takes the library's reduce-scatter, and its losses differ from exact by rounding only."""
    config = config_for(
        tmp_path, *EVERYTHING, "model.tied_embeddings=false", "train.numerics='native'"
    )
    digest, losses = train_through(config, [(3, 20)])
    assert digest != reference[0]
    assert losses == pytest.approx(reference[1], rel=1e-5)
