"""Part `digests`: do runs of real agents on this device end with equal weights after any fault?

    W = 1                       undisturbed, then with a worker killed: NCCL on CUDA
    W = 2, one node             a worker killed; both workers share one device, so they use gloo
    W = 3, three nodes          a node killed, so that the run ends at W = 2; also with gloo

Each case runs eager and compiled. The bits of the two may differ. Each digest is compared with that of the first case
of its kind that ends. Before that, each collective of FSDP2 and of the exact reduction is tested alone, over gloo with
tensors of the device.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.cuda.report import Report
from benchmarks.cuda.sizes import CPU_SLOWER, SIZES
from benchmarks.synthetic import write_random_tokens
from chaos_tests.scenario import make_config, scenario
from elastic_pt.chaos.directory import check_ledger, run_digest
from elastic_pt.chaos.processes import workers_of
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Generation
from elastic_pt.workers.forking import die_with_parent

_VOCABULARY: Final = 512
_MEMORY: Final = "/dev/shm"
_MEMORY_BYTES_MIN: Final = 1 << 30
_STEPS: Final = 40
_KILL_STEP: Final = 14
_TIMEOUT_S: Final = 120.0
_COMPILED_TIMEOUT_S: Final = 150.0
"""Limit of one case on a GPU. The whole part has 300 s."""
_CORES_PER_CASE: Final = 5
_TRANSPORT_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True)
class Case:
    """One run. Runs with equal `compiled` must end with equal digests."""

    name: str
    nodes: int = 1
    workers: int = 1
    killed: str = ""
    """The target of SIGKILL at step `_KILL_STEP`: a worker, a node, or nothing."""
    compiled: bool = False


_RUNS: Final = (
    Case("W=1 undisturbed"),
    Case("W=1 worker killed", killed="worker"),
    Case("W=2 one node, worker killed", workers=2, killed="worker"),
    Case("W=3 three nodes, node killed", nodes=3, killed="node"),
)
CASES: Final = _RUNS + tuple(
    Case(f"{each.name}, compiled", each.nodes, each.workers, each.killed, True) for each in _RUNS
)


def run(options: argparse.Namespace, report: Report) -> None:
    """Run all cases of the size, several at a time if there are enough cores."""
    with report.attempt("gloo with tensors of the device"):
        _try_collectives(options.device, report)
    write_random_tokens(options.work / "data", _VOCABULARY, 400_000)
    cases = [case for case in CASES if case.name not in SIZES[options.size].skipped_cases]
    first: dict[bool, str] = {}
    """The digest of the first case that ended, for eager and for compiled."""
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max(1, cores // _CORES_PER_CASE)) as pool:
        running = {pool.submit(_in_own_process, case, options): case for case in cases}
        for done in as_completed(running):
            case = running[done]
            with report.attempt(case.name):
                outcome = done.result()
                found = outcome["digest"]
                expected = first.setdefault(case.compiled, found)
                verdict = "equal" if found == expected else f"NOT EQUAL to {expected[:12]}"
                report.row(
                    case.name,
                    f"digest {found[:12]} {verdict}; generations of {outcome['worlds']} workers; "
                    f"{outcome['seconds']:.0f} s",
                    failed=found != expected,
                    **outcome,
                )


def _timeout_s(case: Case, device: str) -> float:
    timeout_s = _COMPILED_TIMEOUT_S if case.compiled else _TIMEOUT_S
    return timeout_s * (CPU_SLOWER if device == "cpu" else 1.0)


def _in_own_process(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Run a case in its own process, because the kernel ends agents with the thread that started them."""
    command = [sys.executable, "-m", "benchmarks.cuda.digests", case.name]
    command += ["--device", options.device, "--size", options.size, "--work", str(options.work)]
    timeout_s = _timeout_s(case, options.device)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            preexec_fn=die_with_parent,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"expected an end within {timeout_s:g} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-1500:].strip()}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _run_case(case: Case, device: str, size: str, work: Path) -> dict[str, object]:
    timeout_s = _timeout_s(case, device)
    directory = work / case.name.replace(" ", "-").replace(",", "")
    # In containers /dev/shm may have only 64 MB.
    in_memory = shutil.disk_usage(_MEMORY).free > _MEMORY_BYTES_MIN
    config = make_config(
        f"file://{directory / 'run'}",
        f"file://{work / 'data'}",
        case.nodes,
        *SIZES[size].digest_model,
        f"train.steps={_STEPS}",
        f'train.device="{device}"',
        f"train.compile={str(case.compiled).lower()}",
        f"elastic.workers_per_node={case.workers}",
        f'checkpoint.staging="{_MEMORY if in_memory else work}"',
        # The first start on a cold machine takes long to import and compile.
        "elastic.hang_timeout_s=120",
        f"elastic.settle_timeout_s={2 * timeout_s}",
        f"elastic.collective_timeout_s={2 * timeout_s}",
    )
    started_s = time.monotonic()
    with scenario(config, directory / "nodes", patience_s=timeout_s) as fleet_run:
        for number in range(case.nodes):
            fleet_run.fleet.start(f"node-{number}")
        if case.killed:
            fleet_run.until_step(_KILL_STEP, nodes=case.nodes)
            victim = fleet_run.generation().members[-1].node
            if case.killed == "node":
                fleet_run.fleet.kill(victim)
            else:
                pid = workers_of(fleet_run.fleet.pid(victim), fleet_run.mark)[-1]
                os.kill(pid, signal.SIGKILL)
        fleet_run.finish()
        view, log = fleet_run.view(), RunLog(fleet_run.store, writer="benchmark")
        check_ledger(fleet_run.store, list(log.records()), config.train)
        worlds = [
            record.body.world_size
            for record in log.records()
            if isinstance(record.body, Generation)
        ]
        return {
            "digest": run_digest(fleet_run.store, view),
            "worlds": worlds,
            "seconds": time.monotonic() - started_s,
        }


def _try_collectives(device: str, report: Report) -> None:
    """Test each collective in a world of two processes on the same device."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [
        context.Process(target=_collectives, args=(rank, store.port, device, results), daemon=True)
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(_TRANSPORT_TIMEOUT_S)
        if worker.is_alive():
            worker.kill()
    if results.empty():
        codes = [worker.exitcode for worker in workers]
        raise RuntimeError(f"no answer within {_TRANSPORT_TIMEOUT_S:g} s; exit codes {codes}")
    found: dict[str, str] = results.get()
    report.row(
        "gloo with tensors of the device",
        "; ".join(f"{name}: {what}" for name, what in found.items()),
        failed=set(found.values()) != {"ok"},
    )


def _collectives(
    rank: int, port: int, device: str, results: "torch.multiprocessing.SimpleQueue[dict[str, str]]"
) -> None:
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    one = torch.full((4,), rank + 1.0, device=device)
    two = torch.arange(4.0, device=device)
    out2, out4, out8 = (torch.zeros(n, device=device) for n in (2, 4, 8))
    wide = one.double()

    def all_gather() -> bool:
        dist.all_gather_into_tensor(out8, one)
        return out8.tolist() == [1.0] * 4 + [2.0] * 4

    def all_to_all() -> bool:
        dist.all_to_all_single(out4, two)
        return out4.tolist() == [2.0 * rank, 2.0 * rank + 1.0] * 2

    def reduce_scatter() -> bool:
        dist.reduce_scatter_tensor(out2, two)
        return out2.tolist() == [4.0 * rank, 4.0 * rank + 2.0]

    def all_reduce_float64() -> bool:
        dist.all_reduce(wide)
        return wide.tolist() == [3.0] * 4

    def barrier() -> bool:
        dist.barrier()
        return True

    found = {}
    for call in (all_gather, all_to_all, reduce_scatter, all_reduce_float64, barrier):
        try:
            found[call.__name__] = "ok" if call() else "WRONG VALUES"
        except Exception as error:
            found[call.__name__] = str(error).splitlines()[0][:200]
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def main() -> None:
    """Run one case in this process. Prints its outcome as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("--device", required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    case = next(each for each in CASES if each.name == options.case)
    print(json.dumps(_run_case(case, options.device, options.size, options.work)))


if __name__ == "__main__":
    main()
