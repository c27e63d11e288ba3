"""A worker from start to end: join the world, build the state, restore it, train, end.

Composition root of the worker process, which is disposable: it is forked for one generation and killed with
SIGKILL when that generation is broken. The fork server calls `main` in a process that it has just forked.

    main ─► join_world ─► TrainState ─► Checkpoints.load ─► SlotLoader ─► train.loop.train
"""

import dataclasses
import datetime
import math
import os
from contextlib import closing
from pathlib import Path
from typing import Final

import structlog
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from elastic_pt.checkpoint.copier import copier_for
from elastic_pt.config import Config, parse_config
from elastic_pt.data.blocks import DamagedBlock
from elastic_pt.data.cache import ShardCache, cache_directory
from elastic_pt.data.lanes import lanes_of
from elastic_pt.data.loader import SlotLoader
from elastic_pt.data.manifest import TOKEN_BYTES
from elastic_pt.data.patience import await_manifest
from elastic_pt.data.plan import DataPlan
from elastic_pt.data.shards import TokenReader
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.membership.address import without_dns
from elastic_pt.model.parallel import choose_backend, resolve_device
from elastic_pt.store.open import open_store
from elastic_pt.telemetry.events import EventContext, EventOutput, configure_events
from elastic_pt.telemetry.redaction import Redactor, secrets_in, without_credentials
from elastic_pt.train.checkpoints import Checkpoints
from elastic_pt.train.damage import damaged_span, ignored_tokens
from elastic_pt.train.evaluation import Evaluation
from elastic_pt.train.exact import make_deterministic
from elastic_pt.train.loop import train
from elastic_pt.train.snapshots import MemorySnapshots
from elastic_pt.train.state import TrainState
from elastic_pt.workers.assignment import SOCKET_NAME, Assignment, read_assignment
from elastic_pt.workers.channel import WorkerSide
from elastic_pt.workers.forking import begin_worker
from elastic_pt.workers.heartbeat import Heartbeat, WorkerPhase

log = structlog.get_logger("elastic_pt.train.worker")

_DEVICES_PREFIX: Final = "devices"
_WORKERS_PREFIX: Final = "workers"


def main(config_text: str, scratch_path: str, environment: dict[str, str]) -> str:
    """Train until the run or this generation ends; returns the outcome. Worker process."""
    begin_worker(environment)
    scratch = Path(scratch_path)
    config = parse_config(config_text, source="the run's configuration")
    assignment = read_assignment(scratch)
    local_rank = int(os.environ["LOCAL_RANK"])
    resume_step = assignment.resume_step
    progress = Heartbeat(scratch, local_rank, assignment.generation, resume_step)
    agent = WorkerSide(scratch / SOCKET_NAME, assignment.generation)
    configure_events(
        EventContext(
            assignment.node,
            run=without_credentials(config.run.url),
            rank=int(os.environ["RANK"]),
            changing=lambda: {"generation": assignment.generation, "step": progress.step},
        ),
        EventOutput(
            config.telemetry.log_level,
            config.telemetry.log_format,
            Redactor([*assignment.secrets, *secrets_in(os.environ)]),
            (agent,),
        ),
    )
    agent.send("activity", activity="start")
    device = resolve_device(config.train, local_rank)
    make_deterministic(config.train, device)
    mesh = join_world(config, assignment, device)
    data_store = open_store(config.data.url, timeout_s=config.store.deadline_s)
    progress.enter(WorkerPhase.DATA, resume_step)
    manifest = await_manifest(data_store, config.store.deadline_s)
    progress.enter(WorkerPhase.START, resume_step)
    state = TrainState(config, manifest.vocab_size, mesh, device)
    checkpoints = Checkpoints(config, manifest, assignment, agent, progress.enter)
    agent.send("activity", activity="restore")
    progress.enter(WorkerPhase.RESTORE, resume_step)
    checkpoints.load(state)
    agent.send("activity", activity="train")
    snapshots = MemorySnapshots(
        config.checkpoint.snapshot_every_steps,
        assignment.generation,
        scratch,
        agent,
        state,
        checkpoints.describe,
        copier_for(device),
    )
    plan = DataPlan(
        manifest,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        lanes=lanes_of(
            assignment.order_version, config.train.micro_batch, config.data.shuffle_window_tokens
        ),
    )
    reader = TokenReader(
        manifest,
        data_store,
        cache=ShardCache(cache_directory(config.data.cache), config.data.cache_bytes),
        timeout_s=config.store.deadline_s,
        ignored=ignored_tokens(manifest, assignment.ignored),
    )
    if state.rank == 0:
        warn_of_small_cache(config, plan, int(os.environ["LOCAL_WORLD_SIZE"]) / state.world_size)
    evaluation = Evaluation(config, plan, reader) if config.evaluation.every_steps else None
    loader = SlotLoader(
        plan,
        reader,
        slots=range(state.rank, config.train.slots, state.world_size),
        first_step=state.steps_done,
        last_step=config.train.steps,
        micro_batch=config.train.micro_batch,
        prefetch_steps=config.data.prefetch_steps,
    )
    # The reader first: what the loader still reads then ends soon.
    with loader, closing(reader):
        try:
            outcome = train(
                config,
                state,
                iter(loader),
                agent,
                checkpoints,
                snapshots,
                progress.enter,
                evaluation,
            )
        except DamagedBlock as error:
            if config.data.on_damage == "skip" and error.split == "train":
                span = damaged_span(error, reader, manifest, data_store)
                agent.send("damaged", **dataclasses.asdict(span))
            raise
        # The copy of the last state may still go on, on a GPU.
        snapshots.settle()
        progress.enter(WorkerPhase.END, state.steps_done)
    # No worker closes connections while another worker may still read from them.
    dist.barrier()
    dist.destroy_process_group()
    agent.close()
    return outcome


def warn_of_small_cache(config: Config, plan: DataPlan, share: float) -> None:
    """Tell that blocks will be fetched more than once. `share`: of the slots, what this machine has."""
    open_tokens = plan.open_tokens(math.ceil(share * config.train.slots))
    open_bytes = open_tokens * TOKEN_BYTES[plan.manifest.token_type]
    # Local files are read in place.
    if open_bytes > config.data.cache_bytes and not config.data.url.startswith("file://"):
        log.warning(
            "data_cache_small",
            cache_bytes=config.data.cache_bytes,
            open_bytes=open_bytes,
            reason="blocks are fetched more than once; expected data.cache_bytes of at least open_bytes",
        )


def join_world(config: Config, assignment: Assignment, device: torch.device) -> DeviceMesh:
    """Connect to the other workers of this generation, over the generation's own store."""
    failpoint(Failpoint.WORLD_JOINING, assignment.resume_step)
    timeout = datetime.timedelta(seconds=config.elastic.collective_timeout_s)
    world_size = int(os.environ["WORLD_SIZE"])
    with without_dns():
        store = TCPStore(
            assignment.store_address, assignment.store_port, is_master=False, timeout=timeout
        )
        backend = choose_backend(device, PrefixStore(_DEVICES_PREFIX, store), world_size)
        if device.type == "cuda" and backend == "gloo":
            log.warning("cuda_device_is_shared", backend=backend, device=str(device))
        dist.init_process_group(
            backend,
            store=PrefixStore(_WORKERS_PREFIX, store),
            rank=int(os.environ["RANK"]),
            world_size=world_size,
            timeout=timeout,
            device_id=device if backend == "nccl" else None,
        )
        # Not `init_device_mesh`: where there is CUDA it replaces a gloo group by a new one.
        group = dist.group.WORLD
        assert group is not None
        return DeviceMesh.from_group(group, device.type)
