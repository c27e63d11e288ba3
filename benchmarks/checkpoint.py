"""How long a checkpoint stops training, and how much slower the steps are during its upload.

    python benchmarks/checkpoint.py --json checkpoint.json              one worker on one core, agent and server on another
    python benchmarks/checkpoint.py --both-cores                        training uses two cores, and everything else too
    python benchmarks/checkpoint.py --device cuda --state-gb 8          a state on the GPU

One process trains a small transformer. In turn it saves its state in three ways:

    ours        a copy into a mapped buffer file that is kept; another process hashes and uploads it, as the agent does
    dcp_async   torch.distributed.checkpoint.async_save to the same server: FsspecWriter on s3fs, one staging memory for
                all saves, a process group of its own, upload in a thread (its default)
    copy        one plain copy of the same bytes into memory that was used before; no upload

`stall_ms` is how long the training thread waits for the call. `slower_steps_ratio` is the median step during the upload,
divided by the median of the steps just before and after it (for `copy`: of the steps after the copy). Then `snapshots`
compares steps with a snapshot after each of them, which another process hashes, with steps without any;
`ratio_to_copy` divides its stall by that of the plain copy in between. On CUDA the call only begins the copy, and the
next step waits for its end before the optimizer changes the state: `waited_ms`, the longest in a block. That part is in
`slower_steps_ratio` and `whole_steps_ratio`. `short_steps` compares steps of less than 0.1 s, of a small model, with and
without the snapshots of the adaptive cadence. All values are medians over the repetitions;
`_p90` and `_worst` are beside them.

The server is moto (`make services`), in a process of its own. Without it a directory takes its place.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

# If this file is run as a script, Python searches modules in its folder. The imports start at the root of the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.checkpoint_short import (
    STATE_BYTES,
    TOKENS,
    judge_short,
    measure_short,
    print_short,
)
from benchmarks.checkpoint_sides import (
    AgentProcess,
    DcpAsync,
    Ours,
    PlainCopy,
    Side,
    Trainer,
    describe,
    place_other_threads,
)
from benchmarks.cuda.alone import process_group, training_state
from benchmarks.cuda.sizes import Shape
from benchmarks.s3_server import SERVERS, bucket, default_server
from benchmarks.summary import exit_on_sigterm, machine, print_targets, spread, write_json
from elastic_pt.checkpoint.copier import copier_for
from elastic_pt.train.snapshots import MemorySnapshots

BYTES_PER_PARAMETER: Final = 12
"""Weight and two moments in float32."""
VOCABULARY: Final = 4096
WIDTHS: Final = (64, 128, 256, 384, 512, 1024, 2048)
LAYERS_MAX: Final = 8
"""Of a model that is not of the largest width: few layers, so that a step consists of large operations."""
UPLOAD_S_MAX: Final = 300.0
BUFFERS_S_MAX: Final = 120.0
MEMORY: Final = "/dev/shm"
ROOM: Final = 4.5
"""States that the buffers need room for: three, and one more that a run asks for."""
SLOWER_MAX: Final = 1.03
RATIO_TO_COPY_MAX: Final = 1.3


@dataclass(frozen=True)
class Cores:
    """Where the processes run."""

    training: set[int]
    others: set[int]
    """The agent process, the server, and DCP's upload thread."""


@dataclass(frozen=True)
class Saved:
    """One repetition of one side."""

    stall_s: float
    slower_ratio: float
    upload_s: float
    upload_steps: int
    """Steps that were done during the upload."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each side (default 7)")
    parser.add_argument("--state-gb", type=float, default=0.151, help="size of the state")
    parser.add_argument("--steps", type=int, default=6, help="steps on each side of a save")
    parser.add_argument("--tokens", type=int, help="tokens in a step (default 128; on CUDA 8192)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--both-cores", action="store_true", help="train with two threads")
    parser.add_argument("--server", choices=SERVERS, default=default_server())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.steps < 1:
        parser.error("--repeats, --steps: expected at least 1")
    options.buffers = memory_directory(1e9 * options.state_gb)
    options.tokens = options.tokens or (8192 if options.device == "cuda" else 128)
    return options


def shape_of(state_bytes: float, tokens: int, device: str) -> Shape:
    """A transformer whose state has about `state_bytes`, and a step of about `tokens`."""
    parameters = state_bytes / BYTES_PER_PARAMETER
    for width in WIDTHS:
        layers = round((parameters - VOCABULARY * width) / (12 * width**2))
        if layers <= LAYERS_MAX:
            break
    length = 1024 if device == "cuda" else 64
    return Shape(
        "checkpoint",
        layers=max(1, layers),
        width=width,
        heads=max(1, width // 64),
        sequence_length=length,
        micro_batch=max(1, tokens // length),
        slots=1,
    )


def memory_directory(state_bytes: float) -> Path:
    """Where the buffers are: in memory as in a run, if there is room for them; else on disk."""
    roomy = shutil.disk_usage(MEMORY).free > ROOM * state_bytes
    return Path(MEMORY if roomy else tempfile.gettempdir())


def choose_cores(options: argparse.Namespace) -> Cores:
    """Two different cores, or the same ones for all."""
    here = sorted(os.sched_getaffinity(0))
    if options.device == "cuda":
        return Cores(set(here), set(here))
    if len(here) < 2:
        sys.exit(f"{len(here)} core; expected at least 2")
    both = set(here[:2])
    return Cores(both, both) if options.both_cores else Cores({here[0]}, {here[1]})


def timed(work: Callable[[], object]) -> float:
    """The seconds of a call."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def save_once(trainer: Trainer, side: Side, steps: int, cores: Cores) -> Saved:
    """Steps, a save, the steps during its upload, and steps again."""
    quiet = trainer.seconds(steps)
    started_s = time.perf_counter()
    stall_s = timed(side.begin)
    place_other_threads(cores.others)
    during: list[float] = []
    uploading = False
    while side.busy():
        uploading = True
        if time.perf_counter() - started_s > UPLOAD_S_MAX:
            raise TimeoutError(f"an upload takes more than {UPLOAD_S_MAX:g} s")
        during += trainer.seconds(1)
    upload_s = time.perf_counter() - started_s
    if not uploading:
        during = trainer.seconds(steps)
    elif len(during) > 1:
        during.pop()  # the upload ended during this step
    side.clear()
    quiet += trainer.seconds(steps)
    ratio = statistics.median(during) / statistics.median(quiet)
    return Saved(stall_s, ratio, upload_s, len(during) if uploading else 0)


def measure_saves(
    trainer: Trainer, sides: Mapping[str, Side], options: argparse.Namespace, cores: Cores
) -> dict[str, Any]:
    """Each side in turn, in another order in each repetition. A first repetition warms up."""
    found: dict[str, list[Saved]] = {name: [] for name in sides}
    names = list(sides)
    for repeat in range(options.repeats + 1):
        for name in names:
            saved = save_once(trainer, sides[name], options.steps, cores)
            tell(f"{name}: {1e3 * saved.stall_s:.1f} ms, {saved.slower_ratio:.3f} x", repeat)
            if repeat:
                found[name].append(saved)
        names.append(names.pop(0))
    return {
        name: {
            **spread("stall_ms", [1e3 * each.stall_s for each in samples], 2),
            **spread("slower_steps_ratio", [each.slower_ratio for each in samples], 4),
            "upload_s": round(statistics.median(each.upload_s for each in samples), 3)
            if name != "copy"
            else None,
            "samples": [vars(each) for each in samples],
        }
        for name, samples in found.items()
    }


def measure_snapshots(trainer: Trainer, options: argparse.Namespace) -> dict[str, Any]:
    """Blocks of steps in turn: without anything, with a plain copy after each, with a snapshot after each."""
    state, copy = trainer.state, PlainCopy(trainer.state)
    assert trainer.snapshots is not None
    stalls, copies, ratios, whole, waits = [], [], [], [], []
    for repeat in range(options.repeats + 1):
        quiet = trainer.seconds(options.steps)
        copied = []
        for _ in range(options.steps):
            trainer.step()
            copied.append(timed(copy.begin))
        steps: list[float] = []
        taken: list[float] = []
        waited: list[float] = []
        for _ in range(2 * options.steps):
            steps.append(trainer.step())
            if taken:
                waited.append(trainer.waited_s)
            agreed = trainer.agreed
            if agreed is not None and trainer.snapshots.due(state.steps_done, agreed):
                started_s = time.perf_counter()
                trainer.snapshots.take(state, agreed)
                taken.append(time.perf_counter() - started_s)
        quiet += trainer.seconds(options.steps)
        stall_s, step_s = statistics.median(taken), statistics.median(quiet)
        tell(f"snapshots: {1e3 * stall_s:.1f} ms, {len(taken)} of {len(steps)} steps", repeat)
        if repeat:
            stalls.append(stall_s)
            copies.append(statistics.median(copied))
            # The first step follows none.
            ratios.append(statistics.median(steps[1:]) / step_s)
            waits.append(max(waited, default=0.0))
            whole.append((sum(steps) + sum(taken)) / len(steps) / step_s)
    return {
        **spread("stall_ms", [1e3 * each for each in stalls], 2),
        **spread("waited_ms", [1e3 * each for each in waits], 2),
        **spread("copy_ms", [1e3 * each for each in copies], 2),
        **spread("ratio_to_copy", [a / b for a, b in zip(stalls, copies, strict=True)], 3),
        **spread("slower_steps_ratio", ratios, 4),
        **spread("whole_steps_ratio", whole, 4),
    }


def tell(line: str, repeat: int) -> None:
    """Print the progress."""
    print(f"{repeat or 'warm-up'}: {line}", file=sys.stderr, flush=True)


@contextmanager
def prepared(
    options: argparse.Namespace, cores: Cores, snapshot_every_steps: int = 1
) -> Iterator[tuple[Trainer, dict[str, Side]]]:
    """A trainer on its cores, the agent process and the server on theirs, and what is compared."""
    device = torch.device(options.device)
    with ExitStack() as stack:
        os.sched_setaffinity(0, cores.others)
        url = stack.enter_context(bucket(options.server))
        scratch = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.buffers)
            )
        )
        agent = AgentProcess(scratch, url)
        stack.callback(agent.close)
        os.sched_setaffinity(0, cores.training)
        threads = torch.get_num_threads()
        torch.set_num_threads(len(cores.training) if device.type == "cpu" else threads)
        stack.callback(torch.set_num_threads, threads)
        stack.callback(os.sched_setaffinity, 0, cores.training | cores.others)
        mesh = stack.enter_context(process_group(device))
        shape = shape_of(1e9 * options.state_gb, options.tokens, options.device)
        state = stack.enter_context(training_state(shape, VOCABULARY, mesh, device))
        trainer = Trainer(state, VOCABULARY)
        snapshots = MemorySnapshots(
            snapshot_every_steps, 1, scratch, agent, state, describe, copier_for(device)
        )
        trainer.snapshots = snapshots
        give_up_at_s = time.monotonic() + BUFFERS_S_MAX
        while snapshots.offer().complete_step is None:
            trainer.step()
            if time.monotonic() > give_up_at_s:
                sys.exit(
                    f"{scratch.parent}: no buffers after {BUFFERS_S_MAX:g} s; expected room for four states"
                )
        sides: dict[str, Side] = {
            "copy": PlainCopy(state),
            "ours": Ours(trainer, snapshots, agent),
            "dcp_async": DcpAsync(state, url),
        }
        yield trainer, sides


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, as the report."""
    cores = choose_cores(options)
    with prepared(options, cores) as (trainer, sides):
        state = trainer.state
        state_bytes = sum(each.rows.nbytes for _, each in state.slices())
        step_s = statistics.median(trainer.seconds(options.steps))
        report = {
            "machine": machine(),
            "server": options.server,
            "device": options.device,
            "buffers": str(options.buffers),
            "state_bytes": state_bytes,
            "step_ms": round(1e3 * step_s, 2),
            "training_cores": sorted(cores.training),
            "other_cores": sorted(cores.others),
        }
        tell(f"{state_bytes / 1e6:.0f} MB, {1e3 * step_s:.0f} ms a step, {options.server}", 0)
        report |= measure_saves(trainer, sides, options, cores)
        report["snapshots"] = measure_snapshots(trainer, options)
    short = argparse.Namespace(**vars(options) | {"state_gb": STATE_BYTES / 1e9, "tokens": TOKENS})
    with prepared(short, cores, snapshot_every_steps=0) as (trainer, _):
        report["short_steps"] = measure_short(trainer, options.repeats)
    report["targets"] = judge(report, alone=not cores.training & cores.others) | judge_short(
        report["short_steps"]
    )
    return report


def judge(report: Mapping[str, Any], *, alone: bool) -> dict[str, bool]:
    """Whether each target is met. `alone`: training has cores that nothing else uses."""
    ours, dcp, snapshots = report["ours"], report["dcp_async"], report["snapshots"]
    slower, half = ours["slower_steps_ratio"], 1 + (dcp["slower_steps_ratio"] - 1) / 2
    return {
        "ours waits no longer than dcp_async": ours["stall_ms"] <= dcp["stall_ms"],
        (
            f"steps at most {SLOWER_MAX - 1:.0%} slower during our upload"
            if alone
            else "our slow-down at most half of dcp_async's"
        ): slower <= SLOWER_MAX if alone else slower <= max(half, 1.0),
        f"a snapshot at most {RATIO_TO_COPY_MAX} x a copy": snapshots["ratio_to_copy"]
        <= RATIO_TO_COPY_MAX,
    }


def print_report(report: Mapping[str, Any]) -> None:
    """The table."""
    print(
        f"{report['state_bytes'] / 1e6:.0f} MB of state on {report['device']}, "
        f"{report['step_ms']:.0f} ms a step, server: {report['server']}, buffers in {report['buffers']}, "
        f"training on cores {report['training_cores']}, agent and server on {report['other_cores']}"
    )
    print(
        f"{'':>10}  {'stall ms (p90, worst)':>28}  {'steps slower by (p90, worst)':>30}  upload s"
    )
    for name in ("ours", "dcp_async", "copy", "snapshots"):
        row = report[name]
        stall, stall_p90, stall_worst = (row[f"stall_ms{end}"] for end in ("", "_p90", "_worst"))
        slow, slow_p90, slow_worst = (
            row[f"slower_steps_ratio{end}"] for end in ("", "_p90", "_worst")
        )
        stalls = f"{stall:.1f} ({stall_p90:.1f}, {stall_worst:.1f})"
        slower = f"{slow:.3f} ({slow_p90:.3f}, {slow_worst:.3f})"
        upload = row.get("upload_s")
        print(
            f"{name:>10}  {stalls:>28}  {slower:>30}  {'' if upload is None else f'{upload:.1f}'}"
        )
    snapshots = report["snapshots"]
    print(
        f"a snapshot takes {snapshots['ratio_to_copy']:.2f} x a copy, and the next step waits "
        f"{snapshots['waited_ms']:.1f} ms for its end; steps with their snapshots take "
        f"{snapshots['whole_steps_ratio']:.3f} x those without"
    )
    print_short(report["short_steps"])
    print_targets(report["targets"])


def main() -> None:
    """Measure, print, write the JSON."""
    options = parse_arguments()
    exit_on_sigterm()
    report = measure(options)
    print_report(report)
    write_json(options.json, report)


if __name__ == "__main__":
    main()
