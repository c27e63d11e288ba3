"""Recomputation, compilation and sharding do not change names and losses."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from elastic_pt.config import TrainSection
from elastic_pt.errors import ConfigError
from elastic_pt.model.initialize import fill_
from elastic_pt.model.parallel import (
    any_shared,
    optimize_blocks,
    parallelize,
    resolve_compute_dtype,
    resolve_device,
)
from elastic_pt.model.transformer import Transformer, build_on_meta

Build = Callable[..., Transformer]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def loss_and_gradients(model: Transformer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rows = torch.randint(0, 211, (2, 41), generator=torch.Generator().manual_seed(0))
    loss = model(rows[:, :-1], rows[:, 1:], z_loss=1e-3).total
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_changes_no_bit(build: Build, how: str) -> None:
    """Loss, gradients and names are the same with activation checkpointing, bit for bit."""
    expected_loss, expected = loss_and_gradients(build(qk_norm=True))
    model = build(qk_norm=True)
    optimize_blocks(model, TrainSection.model_validate({"activation_checkpointing": how}))
    loss, gradients = loss_and_gradients(model)
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def kept_bytes(model: Transformer) -> int:
    """The number of bytes that forward keeps for backward."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rows = torch.zeros(8, 65, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(rows)
    assert hidden.requires_grad
    return sum(kept.values())


def test_recomputation_saves_memory(build: Build) -> None:
    """Full activation checkpointing keeps less than a third of the bytes."""
    model = build(layers=4)
    without = kept_bytes(model)
    optimize_blocks(model, TrainSection(activation_checkpointing="full"))
    assert kept_bytes(model) < without / 3


@pytest.mark.parametrize("how", ["none", "selective"])
def test_compilation_keeps_the_loss(build: Build, how: str) -> None:
    """A compiled block gives the loss and the gradients of an eager block, except for rounding."""
    expected_loss, expected = loss_and_gradients(build(layers=1))
    model = build(layers=1)
    optimize_blocks(
        model, TrainSection.model_validate({"compile": True, "activation_checkpointing": how})
    )
    loss, gradients = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0.0)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("tied", [True, False])
def test_sharding_changes_no_bit(build: Build, tied: bool) -> None:
    """A model sharded over one worker has the loss, gradients and names of the plain one."""
    plain = build(tied_embeddings=tied)
    expected_loss, expected = loss_and_gradients(plain)
    model = build_on_meta(plain.config, plain.vocabulary)
    train = TrainSection(activation_checkpointing="full")
    parallelize(model, init_device_mesh("cpu", (1,)), train, torch.float32)
    model.to_empty(device="cpu")
    fill_(model, layers=2, seed=0)
    loss, gradients = loss_and_gradients(model)
    assert torch.equal(loss, expected_loss)
    assert list(gradients) == list(expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient.to_local(), expected[name])  # type: ignore[attr-defined]


@pytest.mark.usefixtures("alone")
def test_bfloat16_computes_on_float32_masters(build: Build) -> None:
    """With bfloat16 compute, weights and gradients stay float32. The loss equals that of float32 within 1 %."""
    plain = build()
    expected_loss, _ = loss_and_gradients(plain)
    model = build()
    parallelize(model, init_device_mesh("cpu", (1,)), TrainSection(), torch.bfloat16)
    loss, gradients = loss_and_gradients(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    torch.testing.assert_close(loss, expected_loss, rtol=1e-2, atol=0.0)
    assert not torch.equal(loss, expected_loss)


def test_device_and_type_follow_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto uses the available device. A device that is not available is a `ConfigError`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(TrainSection()) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"train\.device"):
        resolve_device(TrainSection(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert resolve_device(TrainSection(), local_rank=2) == torch.device("cuda", 2)
    assert resolve_device(TrainSection(device="cpu")) == torch.device("cpu")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert resolve_compute_dtype(TrainSection(), cuda) == torch.bfloat16
    assert resolve_compute_dtype(TrainSection(), cpu) == torch.float32
    assert resolve_compute_dtype(TrainSection(compute_dtype="float32"), cuda) == torch.float32
    assert resolve_compute_dtype(TrainSection(compute_dtype="bfloat16"), cpu) == torch.bfloat16


@pytest.mark.parametrize(
    ("names", "shared"), [("abc", False), ("aba", True), ("aaa", True), ("a", False)]
)
def test_all_workers_get_the_same_answer_whether_a_device_is_shared(
    names: str, shared: bool
) -> None:
    """Every worker gets the same answer: true if two of them use one device, which NCCL refuses."""
    store = dist.HashStore()
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: any_shared(name, store, len(names)), names))
    assert answers == [shared] * len(names)


def test_more_workers_than_devices_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a node has more workers than CUDA devices, the devices are assigned again, from the first on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = [resolve_device(TrainSection(), local_rank).index for local_rank in range(5)]
    assert devices == [0, 1, 0, 1, 0]
