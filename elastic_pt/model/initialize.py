"""Initial weights. They depend only on the seed and on the parameter's name, shape and depth.

Every parameter has its own counter-based generator with the key SHA-256(seed, name). A rank computes the full value of
a parameter and keeps its rows. So the weights of a run are the same for any number of ranks, any order of construction
and any set of other parameters. numpy's Philox and ziggurat method use no vector instructions, so the bits do not
depend on the processor.

Matrices are normal with standard deviation 0.02. The two matrices that write into the residual stream are scaled
by 1/sqrt(2 · layers), so that its variance does not grow with depth (GPT-2). Norm gains are 1.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

STANDARD_DEVIATION = 0.02
RESIDUAL_OUTPUTS = ("attention.output.weight", "feed_forward.down.weight")


def initial_value(name: str, shape: Sequence[int], *, layers: int, seed: int) -> Tensor:
    """The full initial value of one parameter: float32 on the CPU, of the global `shape`."""
    if len(shape) < 2:
        return torch.ones(tuple(shape))
    deviation = STANDARD_DEVIATION
    if name.endswith(RESIDUAL_OUTPUTS):
        deviation /= math.sqrt(2 * layers)
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    generator = numpy.random.Generator(
        numpy.random.Philox(key=int.from_bytes(digest[:16], "little"))
    )
    values = generator.standard_normal(size=tuple(shape), dtype=numpy.float32)
    values *= numpy.float32(deviation)
    return torch.from_numpy(values)


@torch.no_grad()
def fill_(model: nn.Module, *, layers: int, seed: int) -> None:
    """Set every parameter of a materialised model to its initial value. Ranks do not communicate.

    Parameters are plain tensors or DTensors. Each rank fills its own rows of a DTensor. At most one
    full parameter is in memory at a time.
    """
    for name, parameter in model.named_parameters():
        assign_(parameter, initial_value(name, parameter.shape, layers=layers, seed=seed))


@torch.no_grad()
def assign_(parameter: Tensor, full: Tensor) -> None:
    """Copy a full value into a parameter, or this rank's rows of it into a sharded one. Does not communicate."""
    if parameter.shape != full.shape:
        raise ValueError(f"shape {tuple(full.shape)}: expected {tuple(parameter.shape)}")
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    if parameter.placements != (Shard(0),):
        raise ValueError(f"placements {parameter.placements}: expected (Shard(0),)")
    mesh = parameter.device_mesh
    parameter.to_local().copy_(full[shard_rows(full.shape[0], mesh.get_local_rank(), mesh.size())])


def shard_rows(rows: int, rank: int, world_size: int) -> slice:
    """The rows of `rank` in a Shard(0) DTensor (as in FSDP2): equal parts rounded up; the last ranks may have none."""
    share = -(-rows // world_size)
    return slice(min(rank * share, rows), min((rank + 1) * share, rows))
