"""Chooses a worker's device and types, and applies recomputation, compilation and sharding to a model.

`parallelize` is a plain function. The model does not depend on it.

The order matters. Recomputation is inside the compiled region. FSDP2 is outside of both, so that it gathers weights
before a compiled block. Parameter names do not change: blocks are not wrapped in modules, only their `forward` is
replaced.

Untested so far: everything here on CUDA. `benchmarks/cuda/run.sh` runs it on a machine with one GPU.
"""

import functools
from typing import Any

import torch
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from elastic_pt.config import TrainSection
from elastic_pt.errors import ConfigError
from elastic_pt.model.transformer import Transformer

# Selective checkpointing saves these: they are expensive to compute and cheap to keep. The rest is recomputed.
SAVED_OPERATIONS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
    )
)


def resolve_device(train: TrainSection, local_rank: int = 0) -> torch.device:
    """The device of a worker. Raises `ConfigError` if the configuration requires CUDA and there is none.

    If this node has more workers than CUDA devices, the workers share the devices.
    """
    available = torch.cuda.is_available()
    if train.device == "cuda" and not available:
        raise ConfigError(
            'train.device = "cuda": this machine has no CUDA device; expected "auto" or "cpu"'
        )
    if train.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def choose_backend(device: torch.device, store: Store, world_size: int) -> str:
    """The collective library of a generation: NCCL if every worker has its own CUDA device, else gloo.

    NCCL refuses two ranks on one device. gloo copies CUDA tensors through host memory: slow, but enough for a test.
    Communicates over `store`: on CUDA every worker of the generation must call it once.
    """
    if device.type != "cuda":
        return "gloo"
    uuid = torch.cuda.get_device_properties(device).uuid
    return "gloo" if any_shared(str(uuid), store, world_size) else "nccl"


def any_shared(name: str, store: Store, world_size: int) -> bool:
    """Whether two of `world_size` workers have the same `name`. All get the same answer. Communicates."""
    if store.add(f"device/{name}", 1) > 1:
        store.set("device-shared", "yes")
    # A worker is counted after it has reported a shared device, so the last one counted sees all reports.
    if store.add("devices-counted", 1) == world_size:
        store.set("devices-compared", "yes")
    store.wait(["devices-compared"])
    return store.check(["device-shared"])


def resolve_compute_dtype(train: TrainSection, device: torch.device) -> torch.dtype:
    """Type of activations and matrix products; `auto` is bfloat16 on CUDA and float32 on the CPU."""
    if train.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if train.compute_dtype == "bfloat16" else torch.float32


def parallelize(
    model: Transformer, mesh: DeviceMesh, train: TrainSection, compute_dtype: torch.dtype
) -> None:
    """Recompute, compile and shard `model` in place, as `train` says. Runs in every worker.

    Afterwards the parameters are float32 DTensors, sharded by rows over the one-dimensional `mesh`.
    Weights are gathered in `compute_dtype`; gradients are reduced in float32. The model may still be on
    the meta device: `to_empty` and `initialize.fill_` come after this.
    """
    optimize_blocks(model, train)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,
        # The rotary tables are an input of each block and stay float32.
        cast_forward_inputs=False,
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def optimize_blocks(model: Transformer, train: TrainSection) -> None:
    """The part of `parallelize` that needs no process group: recomputation and compilation, in place."""
    for block in model.blocks:
        if train.activation_checkpointing != "none":
            options: dict[str, Any] = {}
            if train.activation_checkpointing == "selective":
                options["context_fn"] = _selective_contexts
            # There is no dropout, so there is no random state to save.
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **options
            )
        if train.compile:
            # One kernel per shape. Otherwise the tiny pass of a worker without a slot makes the compiler
            # generate one kernel for several shapes, and the bits could depend on the number of workers.
            block.compile(dynamic=False)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_save_or_recompute)  # type: ignore[no-untyped-call]


def _save_or_recompute(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    if operation in SAVED_OPERATIONS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
