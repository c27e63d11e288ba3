"""The digest depends on the training state and not on the number of writers."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_pt.checkpoint.digest import canonical_order, digest, iterate_weights
from elastic_pt.checkpoint.index import read_manifest
from elastic_pt.checkpoint.layout import FullManifest
from elastic_pt.errors import CheckpointError
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from tests.checkpoint.world import (
    RUN_ID,
    SHAPES,
    expected_digest,
    flip,
    full_tensors,
    memory_store,
    same_bits,
    write_checkpoint,
)


def published(
    store: Store, folder: Path, tensors: dict[str, torch.Tensor], world_size: int
) -> FullManifest:
    """The manifest of a checkpoint of these tensors."""
    return read_manifest(store, write_checkpoint(store, folder, tensors, world_size), RUN_ID)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.dictionaries(
        st.sampled_from(["a", "a.b", "a-b", "B", "layers.10.w", "layers.2.w"]),
        st.lists(st.integers(1, 11), min_size=1, max_size=2).map(tuple),
        min_size=1,
    ),
    world_size=st.integers(1, 9),
)
def test_the_digest_is_that_of_the_whole_tensors(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], world_size: int
) -> None:
    """The digest is the documented function of the tensors, for any number of files."""
    store = memory_store()
    tensors = full_tensors(shapes)
    assert digest(store, published(store, tmp_path, tensors, world_size)) == expected_digest(
        tensors
    )


def test_the_digest_does_not_depend_on_store_and_number_of_workers(tmp_path: Path) -> None:
    """Tensors of several blocks have one digest for W = 1, 2, 5 and 9, in a directory and in memory."""
    tensors = full_tensors(SHAPES)
    found = set()
    for world_size in (1, 2, 5, 9):
        url = f"file://{tmp_path}/run-{world_size}"
        for store in (memory_store(), open_store(url, timeout_s=5.0)):
            found.add(digest(store, published(store, tmp_path, tensors, world_size)))
    assert found == {expected_digest(tensors)}


def test_one_changed_bit_changes_the_digest(tmp_path: Path) -> None:
    """A changed bit in the weights or in either moment changes the digest."""
    tensors = full_tensors({"w": (3, 2)})
    found = {expected_digest(tensors)}
    for name in tensors:
        changed = {key: full.clone() for key, full in tensors.items()}
        changed[name].view(torch.int32)[2, 1] ^= 1
        store = memory_store()
        found.add(digest(store, published(store, tmp_path, changed, 2)))
    assert len(found) == 4


def test_the_order_is_weights_then_moments_by_parameter() -> None:
    """Weights come first, then exp_avg and exp_avg_sq of each parameter."""
    store = memory_store()
    names = ["model/b", "exp_avg_sq/a", "exp_avg/b", "model/a", "exp_avg/a", "exp_avg_sq/b"]

    class Named:
        tensors = dict.fromkeys(names)

    order = canonical_order(Named())  # type: ignore[arg-type]
    assert order == [
        "model/a",
        "model/b",
        "exp_avg/a",
        "exp_avg_sq/a",
        "exp_avg/b",
        "exp_avg_sq/b",
    ]
    assert store.keys("") == []


def test_corrupt_bytes_have_no_digest(tmp_path: Path) -> None:
    """A flipped bit raises an error and does not give another digest."""
    store = memory_store()
    manifest = published(store, tmp_path, full_tensors({"w": (3, 2)}), 2)
    for name in ("exp_avg/w", "model/w"):
        key, piece = manifest.tensors[name].pieces[1]
        flip(store, key, piece.offset, 0)
        with pytest.raises(CheckpointError, match=f"{name} block 0"):
            digest(store, manifest)
    with pytest.raises(CheckpointError, match="model/w block 0"):
        list(iterate_weights(store, manifest))


def test_narrow_types_are_widened_and_others_refused(tmp_path: Path) -> None:
    """bfloat16 counts as the float32 of the same value. Types that float32 cannot represent have no digest."""
    store = memory_store()
    narrow = {"model/w": torch.randn(5, 3).to(torch.bfloat16)}
    assert digest(store, published(store, tmp_path, narrow, 2)) == expected_digest(narrow)
    for wide in (torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.int64)):
        store = memory_store()
        with pytest.raises(CheckpointError, match="float32"):
            digest(store, published(store, tmp_path, {"model/w": wide}, 1))


def test_whole_tensors_come_sorted_under_their_parameter_names(tmp_path: Path) -> None:
    """Export and evaluation get each whole weight, without the prefix, bit for bit."""
    store = memory_store()
    tensors = full_tensors(SHAPES)
    manifest = published(store, tmp_path, tensors, 4)
    read = list(iterate_weights(store, manifest))
    assert [name for name, _ in read] == sorted(SHAPES)
    assert all(same_bits(tensor, tensors[f"model/{name}"]) for name, tensor in read)
