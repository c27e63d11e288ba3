"""A world of gloo workers without agents: trains some steps from a checkpoint (or the seed) to a checkpoint."""

import datetime
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed import TCPStore
from torch.distributed.device_mesh import init_device_mesh

from elastic_pt.checkpoint.digest import digest
from elastic_pt.checkpoint.index import read_manifest
from elastic_pt.checkpoint.layout import TrainingState, checkpoint_directory
from elastic_pt.checkpoint.publish import publish_manifest
from elastic_pt.checkpoint.restore import load_rows
from elastic_pt.checkpoint.snapshot import Buffer
from elastic_pt.checkpoint.upload import KeptShard
from elastic_pt.config import Config, parse_config
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.open import open_store
from elastic_pt.train.clock import StepTimes
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Control, run_step
from tests.checkpoint.world import collected, nodes_of, upload_nodes, write_buffer

VOCABULARY = 97
RUN_ID = "0123456789abcdef"
Result = TypeVar("Result")
_CONTEXT = torch.multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["elastic_pt.train.loop", "tests.train.world"])


def config_for(url: Path, *overrides: str) -> Config:
    """A tiny model with V = 8 slots of one sequence."""
    text = f'[run]\nurl = "{url}"\n[data]\nurl = "unused"\nsequence_length = 16\n'
    tiny = [
        "model.layers=2",
        "model.width=32",
        "model.heads=4",
        "model.kv_heads=2",
        "train.global_batch=8",
        "train.micro_batch=1",
        "train.steps=20",
        "train.warmup_steps=3",
    ]
    return parse_config(text, source="test", overrides=[*tiny, *overrides])


def tokens_of(step: int, slot: int, config: Config) -> torch.Tensor:
    """Sequences [micro_batch, T + 1] of one slot, a pure function of (step, slot)."""
    generator = torch.Generator().manual_seed(1_000_003 * step + slot)
    shape = (config.train.micro_batch, config.data.sequence_length + 1)
    return torch.randint(VOCABULARY, shape, generator=generator)


def train_through(config: Config, worlds: Iterable[tuple[int, int]]) -> tuple[str, list[float]]:
    """Train with each (world size, last step) in turn, resharding between them; digest and losses at the end."""
    reference, losses = None, []
    for generation, (world_size, last_step) in enumerate(worlds, start=1):
        reference, more = _run_world(config, world_size, generation, reference, last_step)
        losses += more
    assert reference is not None
    store = open_store(config.run.url)
    return digest(store, read_manifest(store, reference, RUN_ID)), losses


def _run_world(
    config: Config,
    world_size: int,
    generation: int,
    resume: Checkpoint | None,
    last_step: int,
) -> tuple[Checkpoint, list[float]]:
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = _CONTEXT.SimpleQueue()
    with tempfile.TemporaryDirectory() as staging:
        arguments = (config, world_size, resume, last_step, master.port, staging, results)
        processes = [
            _CONTEXT.Process(target=_worker, args=(rank, *arguments)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        losses = results.get()
        for process in processes:
            process.join()
            assert process.exitcode == 0, f"a worker of {world_size} exited with {process.exitcode}"
        store = open_store(config.run.url)
        directory = checkpoint_directory(last_step, generation, "abcd")
        nodes = nodes_of(world_size)
        shards = [
            KeptShard(_shard(staging, rank), RUN_ID, directory, rank, nodes[rank])
            for rank in range(world_size)
        ]
        upload_nodes(store, shards)
        return publish_manifest(store, collected(store, directory, world_size)), losses


def _shard(staging: str, rank: int) -> Path:
    return Buffer(1, rank, 0).path(Path(staging))


def _worker(
    rank: int,
    config: Config,
    world_size: int,
    resume: Checkpoint | None,
    last_step: int,
    port: int,
    staging: str,
    results: "torch.multiprocessing.SimpleQueue",
) -> None:
    state = join(rank, config, world_size, port)
    _fill(config, state, resume)
    losses = []
    while state.steps_done < last_step:
        result = run_step(state, tokens_of_worker(state), Control(False, False))
        losses.append(result.loss)
    _save(config, state, Path(staging))
    if rank == 0:
        results.put(losses)
    dist.destroy_process_group()


def join(
    rank: int, config: Config, world_size: int, port: int, vocabulary: int = VOCABULARY
) -> TrainState:
    """Connect to the other workers, and build the state without its values."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(config.train.numerics == "exact")
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (world_size,))
    return TrainState(config, vocabulary, mesh, torch.device("cpu"))


def tokens_of_worker(state: TrainState) -> torch.Tensor:
    """The sequences of this worker's slots in its next step."""
    slots = range(state.rank, state.config.train.slots, state.world_size)
    return torch.stack([tokens_of(state.steps_done, slot, state.config) for slot in slots])


@dataclass(frozen=True)
class Watched:
    """A step as one worker saw it."""

    times: StepTimes
    straggler_wait_s: float
    loss: float
    row_losses: list[float]


def watch_steps(
    config: Config, world_size: int, steps: int, slow: Callable[[TrainState], None] | None = None
) -> list[list[Watched]]:
    """Train from the seed; the steps of each worker, in the order of ranks. `slow` slows the last worker down."""
    return in_world(world_size, _watched, config, steps, slow)


def in_world(world_size: int, work: Callable[..., Result], *arguments: object) -> list[Result]:
    """Call `work(rank, world size, port, *arguments)` in a process for each rank; the results in their order."""
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = _CONTEXT.SimpleQueue()
    processes = [
        _CONTEXT.Process(
            target=_put_result, args=(results, work, rank, world_size, master.port, *arguments)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found: dict[int, Result] = {}
    for _ in processes:
        rank, result = results.get()
        if isinstance(result, Exception):
            # The others may wait for this worker.
            for process in processes:
                process.kill()
            raise result
        found[rank] = result
    for process in processes:
        process.join()
        assert process.exitcode == 0, f"a worker of {world_size} exited with {process.exitcode}"
    return [found[rank] for rank in range(world_size)]


def _put_result(
    results: "torch.multiprocessing.SimpleQueue",
    work: Callable[..., object],
    rank: int,
    *arguments: object,
) -> None:
    try:
        result = work(rank, *arguments)
    except Exception as error:
        result = error
    results.put((rank, result))


def _watched(
    rank: int,
    world_size: int,
    port: int,
    config: Config,
    steps: int,
    slow: Callable[[TrainState], None] | None,
) -> list[Watched]:
    state = join(rank, config, world_size, port)
    state.initialize()
    if slow is not None and rank == world_size - 1:
        slow(state)
    watched = []
    for _ in range(steps):
        state.clock.begin()
        result = run_step(state, tokens_of_worker(state), Control(False, False))
        times = state.clock.end()
        row_losses = result.row_losses.tolist()
        watched.append(Watched(times, result.straggler_wait_s, result.loss, row_losses))
    dist.destroy_process_group()
    return watched


def _fill(config: Config, state: TrainState, resume: Checkpoint | None) -> None:
    if resume is None:
        state.initialize()
        return
    store = open_store(config.run.url)
    manifest = read_manifest(store, resume, RUN_ID)
    slices = dict(state.slices())
    spans = {
        name: (each.first_row, each.first_row + each.rows.shape[0]) for name, each in slices.items()
    }
    load_rows(store, manifest, spans, into={name: each.rows for name, each in slices.items()})
    state.steps_done = manifest.state.step
    state.optimizer.step_count = manifest.state.optimizer_step
    state.skipped_in_a_row = manifest.state.skipped_in_a_row


def _save(config: Config, state: TrainState, staging: Path) -> None:
    write_buffer(
        staging,
        state.rank,
        {name: (each.rows, each.global_shape, each.first_row) for name, each in state.slices()},
        TrainingState(
            step=state.steps_done,
            optimizer_step=state.optimizer.step_count,
            data_fingerprint="0" * 64,
            tokenizer_sha256="0" * 64,
            config_fingerprint=config.fingerprint(),
            skipped_in_a_row=state.skipped_in_a_row,
        ),
    )
