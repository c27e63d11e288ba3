"""Initial weights."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from elastic_pt.config import TrainSection
from elastic_pt.model.initialize import fill_, initial_value
from elastic_pt.model.parallel import parallelize
from elastic_pt.model.transformer import Transformer, build_on_meta

FIRST_VALUES = ["0.0235638656", "0.00639445661", "-0.0402883142", "0.0056448644"]


def test_value_depends_on_seed_and_name_only() -> None:
    """A parameter's value is a function of seed, name, shape and depth. Another seed or name gives another value."""
    value = initial_value("blocks.0.attention.qkv.weight", (48, 16), layers=2, seed=1)
    again = initial_value("blocks.0.attention.qkv.weight", (48, 16), layers=2, seed=1)
    assert torch.equal(value, again)
    for name, seed in [("blocks.1.attention.qkv.weight", 1), ("blocks.0.attention.qkv.weight", 2)]:
        assert not torch.equal(value, initial_value(name, (48, 16), layers=2, seed=seed))


def test_bits_are_those_of_the_first_release() -> None:
    """The first values never change, so that old runs can be repeated."""
    value = initial_value("embedding.weight", (2, 2), layers=2, seed=0)
    assert [f"{x:.9g}" for x in value.flatten().tolist()] == FIRST_VALUES


def test_scales() -> None:
    """The standard deviation is 0.02 for matrices and 0.02 / sqrt(2 layers) for residual outputs. Norms are one."""
    plain = initial_value("blocks.0.feed_forward.gate_up.weight", (500, 400), layers=8, seed=0)
    output = initial_value("blocks.0.feed_forward.down.weight", (500, 400), layers=8, seed=0)
    assert math.isclose(plain.std().item(), 0.02, rel_tol=0.01)
    assert math.isclose(output.std().item(), 0.005, rel_tol=0.01)
    assert abs(plain.mean().item()) < 2e-4
    assert torch.equal(initial_value("norm.weight", (7,), layers=8, seed=0), torch.ones(7))


def test_shards_are_rows_of_the_full_value(build: Callable[..., Transformer]) -> None:
    """Each rank of a sharded model gets its rows of the values of an unsharded model."""
    whole = build(seed=3, qk_norm=True)
    world = 3
    pieces: dict[str, list[torch.Tensor]] = {}
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            model = build_on_meta(whole.config, whole.vocabulary)
            mesh = init_device_mesh("cpu", (world,))
            parallelize(model, mesh, TrainSection(), torch.float32)
            model.to_empty(device="cpu")
            fill_(model, layers=whole.config.layers, seed=3)
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor)
                pieces.setdefault(name, []).append(parameter.to_local().detach().clone())
        finally:
            dist.destroy_process_group()
    for name, parameter in whole.named_parameters():
        assert torch.equal(torch.cat(pieces[name]), parameter)
