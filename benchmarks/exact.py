"""The cost of exact arithmetic: the same step with numerics = exact and native, alternating in one run.

    python benchmarks/exact.py [--world-size 2] [--pairs 9] [--device auto] [--json FILE]

Every worker builds both states. All workers alternate one exact step with one native step on the same tokens, so that
noise of the machine affects both equally. It prints the median seconds of each, the median of the pairwise ratios, and
the part of an exact step that is extra time (the canonical gradient norm). With more workers than cores, the result
shows the scheduler more than the arithmetic.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from elastic_pt.config import Config, parse_config
from elastic_pt.model.optimizer import local_rows
from elastic_pt.model.parallel import choose_backend, resolve_device
from elastic_pt.train.exact import row_square_sums
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Control, run_step

VOCABULARY = 8192
_POLL_S = 0.05


def main() -> None:
    """Parse the command line, run the workers, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = torch.multiprocessing.get_context("forkserver")
    results = context.SimpleQueue()
    arguments = (
        options.world_size,
        store.port,
        options.pairs,
        options.device,
        options.set,
        results,
    )
    workers = [
        context.Process(target=work, args=(rank, *arguments)) for rank in range(options.world_size)
    ]
    for worker in workers:
        worker.start()
    while results.empty():
        if not any(worker.is_alive() for worker in workers):
            raise SystemExit("all workers ended without a result; see their errors above")
        time.sleep(_POLL_S)
    report = results.get()
    for worker in workers:
        worker.join()
    print_table(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def benchmark_config(device: str, overrides: list[str], numerics: str) -> Config:
    """A small model with V = 8. Use --set for larger models."""
    shape = [
        "data.sequence_length=128",
        "model.layers=4",
        "model.width=256",
        "train.global_batch=32",
        "train.micro_batch=4",
        f"train.device={device}",
    ]
    text = '[run]\nurl = "unused"\n[data]\nurl = "unused"\n'
    return parse_config(
        text, source="benchmark", overrides=[*shape, *overrides, f"train.numerics={numerics}"]
    )


def work(
    rank: int,
    world_size: int,
    port: int,
    pairs: int,
    device_name: str,
    overrides: list[str],
    results: "torch.multiprocessing.SimpleQueue[dict[str, Any]]",
) -> None:
    """One worker: alternates steps of both states. If there are more workers than CUDA devices, they share, with gloo."""
    device = resolve_device(benchmark_config(device_name, overrides, "exact").train, rank)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    backend = choose_backend(device, PrefixStore("devices", store), world_size)
    timeout = datetime.timedelta(minutes=5)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    states = {}
    for numerics in ("exact", "native"):
        config = benchmark_config(device_name, overrides, numerics)
        states[numerics] = TrainState(config, VOCABULARY, mesh, device)
        states[numerics].initialize()
    seconds: dict[str, list[float]] = {"exact": [], "native": []}
    for pair in range(pairs + 1):
        order = ("exact", "native") if pair % 2 else ("native", "exact")
        for numerics in order:
            taken_s = timed_step(states[numerics], numerics)
            if pair > 0:
                seconds[numerics].append(taken_s)
    norm_s = statistics.median(timed_norm(states["exact"]) for _ in range(5))
    if rank == 0:
        ratios = [
            exact / native
            for exact, native in zip(seconds["exact"], seconds["native"], strict=True)
        ]
        results.put(
            {
                "machine": f"{platform.machine()}, {torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}",
                "world_size": world_size,
                "parameters": sum(
                    parameter.numel() for parameter in states["exact"].model.parameters()
                ),
                "exact_s": statistics.median(seconds["exact"]),
                "native_s": statistics.median(seconds["native"]),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "norm_s": norm_s,
            }
        )
    dist.destroy_process_group()


def timed_step(state: TrainState, numerics: str) -> float:
    """Seconds of one step, which all workers start together."""
    torch.use_deterministic_algorithms(numerics == "exact")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    config = state.config
    slots = len(range(state.rank, config.train.slots, state.world_size))
    tokens = torch.randint(
        VOCABULARY,
        (slots, config.train.micro_batch, config.data.sequence_length + 1),
        device=state.device,
    )
    dist.barrier()
    started_s = time.perf_counter()
    run_step(state, tokens, Control(False, False))
    if state.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def timed_norm(state: TrainState) -> float:
    """Seconds of this worker's part of the canonical gradient norm."""
    started_s = time.perf_counter()
    for parameter in state.model.parameters():
        row_square_sums(local_rows(parameter.detach()))
    if state.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def print_table(report: dict[str, object]) -> None:
    """Print the results as a table."""
    print(f"{report['machine']}; W = {report['world_size']}; {report['parameters']:,} parameters")
    print(f"exact   {report['exact_s']:.4f} s a step (median)")
    print(f"native  {report['native_s']:.4f} s a step (median)")
    print(f"exact / native  {report['ratio']:.3f} (median of {len(report['ratios'])} pairs)")  # type: ignore[arg-type]
    print(f"of which the canonical gradient norm  {report['norm_s']:.4f} s")


if __name__ == "__main__":
    main()
