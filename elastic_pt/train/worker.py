"""A worker's life: join the world, build the state, get it back from a checkpoint, train, end.

Composition root of the worker process, which is disposable: it is forked for one generation and killed with
SIGKILL when that generation has no future. `main` is what the agent's fork server calls.

    main ─► join_world ─► TrainState ─► restore | initialize ─► SlotLoader ─► train.loop.train
"""

import datetime
import os
from pathlib import Path
from typing import Final

import torch

# `torch.use_deterministic_algorithms` imports it, which takes 0.3 s: once in the fork server, not in each worker.
import torch._inductor.config
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from elastic_pt.checkpoint.layout import CheckpointReference
from elastic_pt.checkpoint.restore import load_rows, read_index
from elastic_pt.checkpoint.shard_file import Staging
from elastic_pt.config import Config, parse_config
from elastic_pt.data.cache import ShardCache, cache_directory
from elastic_pt.data.loader import SlotLoader
from elastic_pt.data.manifest import Manifest
from elastic_pt.data.manifest import read_manifest as read_data_manifest
from elastic_pt.data.plan import DataPlan
from elastic_pt.data.shards import TokenReader
from elastic_pt.errors import CheckpointError, ConfigError
from elastic_pt.membership.lookups import without_dns
from elastic_pt.model.parallel import resolve_device
from elastic_pt.store.open import open_store
from elastic_pt.telemetry.events import configure_events
from elastic_pt.train.exact import make_deterministic
from elastic_pt.train.loop import Identity, train
from elastic_pt.train.state import TrainState
from elastic_pt.workers.assignment import SOCKET_NAME, Assignment, read_assignment
from elastic_pt.workers.channel import WorkerSide
from elastic_pt.workers.heartbeat import Phase, Progress

_WORKERS_PREFIX: Final = "workers"


def main(config_text: str, scratch_path: str) -> str:
    """Train until the run or this generation ends; returns the outcome. Worker process."""
    scratch = Path(scratch_path)
    config = parse_config(config_text, source="the run's configuration")
    assignment = read_assignment(scratch)
    configure_events(config.telemetry.log_level, f"rank {os.environ['RANK']}")
    local_rank = int(os.environ["LOCAL_RANK"])
    resume_step = 0 if assignment.resume is None else assignment.resume.step
    progress = Progress(scratch, local_rank, assignment.generation, resume_step)
    agent = WorkerSide(scratch / SOCKET_NAME)
    agent.send("activity", activity="start")
    device = resolve_device(config.train, local_rank)
    make_deterministic(config.train, device)
    mesh = join_world(config, assignment, device)
    data_store = open_store(config.data.url, timeout_s=config.store.deadline_s)
    manifest = read_data_manifest(data_store)
    state = TrainState(config, manifest.vocab_size, mesh, device)
    agent.send("activity", activity="restore")
    progress.enter(Phase.RESTORE, resume_step)
    restore(config, state, assignment, agent, manifest)
    agent.send("activity", activity="train")
    plan = DataPlan(
        manifest,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
    )
    loader = SlotLoader(
        plan,
        TokenReader(
            manifest,
            data_store,
            cache=ShardCache(
                cache_directory(config.data.cache),
                config.data.cache_bytes,
                readers=int(os.environ["LOCAL_WORLD_SIZE"]),
            ),
        ),
        slots=range(state.rank, config.train.slots, state.world_size),
        first_step=state.steps_done,
        last_step=config.train.steps,
        micro_batch=config.train.micro_batch,
        prefetch_steps=config.data.prefetch_steps,
    )
    with loader:
        outcome = train(
            config,
            state,
            iter(loader),
            agent,
            Staging(scratch, assignment.generation),
            identity(config, manifest),
            progress.enter,
        )
        progress.enter(Phase.END, state.steps_done)
    # Nobody closes connections while another worker may still be reading from them.
    dist.barrier()
    dist.destroy_process_group()
    agent.close()
    return outcome


def join_world(config: Config, assignment: Assignment, device: torch.device) -> DeviceMesh:
    """Connect to the other workers of this generation, over the store made for it alone."""
    timeout = datetime.timedelta(seconds=config.elastic.collective_timeout_s)
    world_size = int(os.environ["WORLD_SIZE"])
    with without_dns():
        store = TCPStore(
            assignment.store_address, assignment.store_port, is_master=False, timeout=timeout
        )
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(_WORKERS_PREFIX, store),
            rank=int(os.environ["RANK"]),
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        return init_device_mesh(device.type, (world_size,))


def identity(config: Config, manifest: Manifest) -> Identity:
    """What checkpoints of this run say about where they come from."""
    return Identity(
        data_fingerprint=manifest.fingerprint,
        tokenizer_sha256=manifest.tokenizer_sha256,
        config_fingerprint=config.fingerprint(),
    )


def restore(
    config: Config, state: TrainState, assignment: Assignment, agent: WorkerSide, data: Manifest
) -> None:
    """Fill this worker's rows from the generation's checkpoint, or from the seed at the start of a run.

    A checkpoint that does not verify is reported to the agent, which quarantines it; the next
    generation resumes from the one before.
    """
    resume = assignment.resume
    if resume is None:
        state.initialize()
        return
    reference = CheckpointReference(
        resume.step,
        resume.generation,
        resume.directory,
        resume.manifest_size,
        resume.manifest_sha256,
    )
    store = open_store(config.run.url, timeout_s=config.store.deadline_s)
    slices = dict(state.slices())
    wanted = {
        name: (each.first_row, each.first_row + each.rows.shape[0]) for name, each in slices.items()
    }
    try:
        index = read_index(store, reference, assignment.run_id, wanted)
        found = Identity(
            index.state.data_fingerprint,
            index.state.tokenizer_sha256,
            index.state.config_fingerprint,
        )
        if found != identity(config, data):
            raise ConfigError(
                f"{resume.directory}: made with another configuration, data or tokenizer ({found})"
            )
        load_rows(
            store,
            index,
            wanted,
            into={name: each.rows for name, each in slices.items()},
        )
    except CheckpointError as error:
        agent.send("unusable", directory=resume.directory, why=str(error))
        raise
    state.steps_done = index.state.step
    state.optimizer.step_count = index.state.optimizer_step
    state.skipped_in_a_row = index.state.skipped_in_a_row
