"""A world of one worker in this process, for parts that need a training state but no agents."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.cuda.sizes import Shape
from elastic_pt.config import Config
from elastic_pt.model.optimizer import local_rows
from elastic_pt.train.exact import make_deterministic
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Control, StepResult, run_step


@contextmanager
def process_group(device: torch.device) -> Iterator[DeviceMesh]:
    """Join a world of one: NCCL on CUDA, else gloo."""
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=HashStore(),
        rank=0,
        world_size=1,
        device_id=device if cuda else None,
    )
    try:
        assert dist.group.WORLD is not None
        yield DeviceMesh.from_group(dist.group.WORLD, device.type)
    finally:
        dist.destroy_process_group()


@contextmanager
def training_state(
    shape: Shape, vocabulary: int, mesh: DeviceMesh, device: torch.device, *overrides: str
) -> Iterator[TrainState]:
    """A state with random weights. Its memory is freed at the end."""
    config = shape.config(device.type, *overrides)
    make_deterministic(config.train, device)
    state = TrainState(config, vocabulary, mesh, device)
    # Not `state.initialize`: it takes about ten seconds on the CPU for a billion weights.
    with torch.no_grad():
        for parameter in state.model.parameters():
            rows = local_rows(parameter)
            rows.normal_(std=0.02) if rows.dim() > 1 else rows.fill_(1.0)
    try:
        yield state
    finally:
        del state
        torch.use_deterministic_algorithms(False)
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def random_tokens(config: Config, vocabulary: int, device: torch.device) -> torch.Tensor:
    """The tokens of one step of a world of one."""
    train = config.train
    shape = (train.slots, train.micro_batch, config.data.sequence_length + 1)
    return torch.randint(vocabulary, shape, device=device)


def step(state: TrainState, tokens: torch.Tensor) -> StepResult:
    """Do one optimizer step. It is complete on the device when this returns."""
    result = run_step(state, tokens, Control(False, False))
    synchronize(state.device)
    return result


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
