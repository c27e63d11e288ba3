"""SHA-256 of the whole training state. It does not depend on the number of workers.

The digest is the SHA-256 of all tensors, one after the other, with nothing between them. Each tensor is its
full (all rows) C-ordered little-endian float32 bytes:

    1. model/<parameter>, for every parameter, sorted by name (by code point)
    2. for every parameter, again sorted: exp_avg/<parameter>, then exp_avg_sq/<parameter>

Tensors that a checkpoint does not have are left out. bfloat16 is widened to float32, which is exact. Other types
are refused, because they would lose bits. For a float32 model the first part equals
`for name in sorted(weights): sha256.update(weights[name].numpy().tobytes())`.
"""

import hashlib
from collections.abc import Iterator
from typing import Final

import torch

from elastic_pt.checkpoint.layout import FullManifest
from elastic_pt.checkpoint.restore import load_rows, read_tensors
from elastic_pt.checkpoint.shard_file import TORCH_DTYPES
from elastic_pt.errors import CheckpointError
from elastic_pt.store.port import Store

_WEIGHTS: Final = "model/"


def digest(store: Store, manifest: FullManifest) -> str:
    """SHA-256 (hex) of weights and optimizer state, as the module describes it. Any process.

    Checks the CRC of every block. Holds at most 160 MiB in memory. Raises `CheckpointError` if bytes are missing or
    wrong, or if a tensor is not float32 or bfloat16.
    """
    result = hashlib.sha256()
    for name, data in read_tensors(store, manifest, canonical_order(manifest)):
        dtype = manifest.tensors[name].dtype
        if dtype == "F32":
            result.update(data)
        elif dtype == "BF16":
            wide = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).to(torch.float32)
            result.update(wide.numpy().data)
        else:
            raise CheckpointError(
                f"{name}: dtype {dtype}; expected float32 or bfloat16 for a digest"
            )
    return result.hexdigest()


def canonical_order(manifest: FullManifest) -> list[str]:
    """The names of all tensors, in the order of the digest."""

    def rank(name: str) -> tuple[bool, str, str]:
        kind, _, parameter = name.partition("/")
        return (kind != "model", parameter, kind)

    return sorted(manifest.tensors, key=rank)


def iterate_weights(store: Store, manifest: FullManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight as `(parameter, whole CPU tensor)`, sorted by parameter. Any process.

    Holds one tensor at a time and checks its CRCs. Raises `CheckpointError` if bytes are missing or wrong.
    """
    for name, entry in manifest.tensors.items():
        if name.startswith(_WEIGHTS):
            tensor = torch.empty(entry.global_shape, dtype=TORCH_DTYPES[entry.dtype])
            load_rows(store, manifest, {name: (0, entry.global_shape[0])}, {name: tensor})
            yield name.removeprefix(_WEIGHTS), tensor
