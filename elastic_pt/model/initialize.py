"""Initial weights that depend on the seed and on the parameter's name, shape and depth only.

Every parameter has its own counter-based generator, keyed by SHA-256(seed, name). A rank that holds some
rows of a parameter makes the full value and keeps its rows, so the weights of a run are the same for
every number of ranks, every order of construction and every set of other parameters. Philox and the
ziggurat method of numpy use no vector instructions, so the processor does not show in the bits either.

Matrices are normal with standard deviation 0.02; the two that write into the residual stream are scaled
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
    """Give every parameter of a materialised model its initial value; ranks do not communicate.

    Parameters are plain tensors or DTensors; of the latter each rank fills its own rows. At most one
    full parameter is in memory at a time.
    """
    for name, parameter in model.named_parameters():
        assign_(parameter, initial_value(name, parameter.shape, layers=layers, seed=seed))


@torch.no_grad()
def assign_(parameter: Tensor, full: Tensor) -> None:
    """Copy a full value into a parameter, or this rank's rows of it into a sharded one. Communicates nothing."""
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
    """The rows of a Shard(0) DTensor (FSDP2's too) that `rank` holds: equal parts rounded up, so the last ranks may have none."""
    share = -(-rows // world_size)
    return slice(min(rank * share, rows), min((rank + 1) * share, rows))
