"""The script that stock torchrun runs for comparison: FSDP2 and torch.distributed.checkpoint, the same model, synthetic data.

    torchrun ... benchmarks/torchrun_peer.py DIRECTORY [--timeout 60] [--checkpoint-steps 5]

It follows torch's documentation: join the world, shard, resume from the newest complete checkpoint, train, save every
few steps. Rank 0 of each world appends one JSON line per completed step to `DIRECTORY/steps.jsonl`. The first line of
a world also has the start time of its process and the duration of each part.
"""

import argparse
import ctypes
import datetime
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from elastic_pt import failpoints
from elastic_pt.config import ModelSection
from elastic_pt.model.initialize import fill_
from elastic_pt.model.transformer import build_on_meta

MODEL = ModelSection(layers=2, width=64, heads=2, kv_heads=1)
VOCABULARY, LENGTH, GLOBAL_BATCH, KEPT = 320, 64, 8, 3
PR_SET_PDEATHSIG = 1
METADATA = ".metadata"
"""The file that torch.distributed.checkpoint writes last. A checkpoint without it is not complete."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--timeout", type=float, required=True, help="of collectives, in seconds")
    parser.add_argument("--checkpoint-steps", type=int, required=True)
    parser.add_argument("--sequence-length", type=int, default=LENGTH)
    parser.add_argument("--steps", type=int, default=0, help="then end; 0: never")
    return parser.parse_args()


def process_start_s() -> float:
    """Unix time at which this process was created, to the precision of the kernel's clock tick."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(") ")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s


def agree_on_checkpoint(directory: Path) -> tuple[str, int]:
    """Name and step of the newest complete checkpoint, ("", 0) if there is none. Communicates."""
    complete = [path.parent.name for path in directory.glob(f"step-*/{METADATA}")]
    chosen = [max(complete, default="")]
    dist.broadcast_object_list(chosen)
    return chosen[0], int(chosen[0].removeprefix("step-") or 0)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The content of a checkpoint."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def save(directory: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the checkpoint of a step and remove old ones. Communicates."""
    dcp.save(  # type: ignore[attr-defined]
        state_of(model, optimizer), checkpoint_id=directory / f"step-{step:09d}"
    )
    if dist.get_rank() == 0:
        for old in sorted(directory.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, length: int) -> None:
    """One step over the global batch, row by row: rank r of W takes rows r, r + W, ... Communicates."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(VOCABULARY, (GLOBAL_BATCH, length + 1), generator=generator)
    for first in range(0, GLOBAL_BATCH, world_size):
        row = min(first + rank, GLOBAL_BATCH - 1)
        tokens = rows[row : row + 1]
        sums = model(tokens[:, :-1], tokens[:, 1:].contiguous())
        # FSDP2 averages over ranks. A rank without a row must still take part, with weight zero.
        weight = world_size if first + rank < GLOBAL_BATCH else 0
        (sums.total * (weight / (GLOBAL_BATCH * length))).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    # Waits for all ranks, like a script that logs the norm.
    assert isinstance(norm, DTensor)
    norm.full_tensor().item()


def main() -> None:
    """Train until the last step, or until this process is ended."""
    failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
    began_s, entered_s = process_start_s(), time.time()
    # A killed torchrun does not end its workers. The benchmark must end them.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    options = parse_arguments()
    checkpoints = options.directory / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=options.timeout))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    # The first collective makes the connections.
    dist.barrier()
    joined_s = time.time()
    model = build_on_meta(MODEL, VOCABULARY)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    fill_(model, layers=MODEL.layers, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    name, step = agree_on_checkpoint(checkpoints)
    if name:
        state = state_of(model, optimizer)
        dcp.load(  # type: ignore[attr-defined]
            state, checkpoint_id=checkpoints / name
        )
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    restored_s = time.time()
    durations = {
        "began_s": began_s,
        "fork_s": entered_s - began_s,
        "group_s": joined_s - entered_s,
        "restore_s": restored_s - joined_s,
    }
    with (options.directory / "steps.jsonl").open("a", encoding="utf-8") as lines:
        while not options.steps or step < options.steps:
            # Where a chaos run may strike.
            failpoints.failpoint(failpoints.Failpoint.STEP_FORWARD, step)
            train_step(model, optimizer, step, options.sequence_length)
            step += 1
            if dist.get_rank() == 0:
                line = {
                    "time_s": time.time(),
                    "step": step,
                    "world_size": dist.get_world_size(),
                    "restarts": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
                    "pid": os.getpid(),
                    **durations,
                }
                lines.write(json.dumps(line) + "\n")
                lines.flush()
            if step % options.checkpoint_steps == 0:
                save(checkpoints, step, model, optimizer)


if __name__ == "__main__":
    main()
