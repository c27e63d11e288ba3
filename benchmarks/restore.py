"""How fast a worker gets its state back, from each place that may hold it.

    python benchmarks/restore.py --json restore.json
    python benchmarks/restore.py --sizes-mb 10,50,150,500,2000
    python benchmarks/restore.py --server ceph                          another S3 server, see `make services`

    memory   a buffer file of this node                      beside one plain copy of the bytes into the same tensors
    peer     the agent of another node, over loopback        beside the same bytes over one plain socket (sendfile, recv)
    peer_plain    the same with elastic.tls = false
    bucket   a real S3 server, in a process of its own       beside the same range reads by the same client, 8 at a time

`gb_per_s` counts verified bytes in the tensors of the state. Both ways read the same bytes in turn. Values are medians;
`_worst` is beside them. `ratio` is the median of the ratios of adjacent pairs.

`first_step` has the seconds from the start of the restore to the end of the first step, for states of several sizes.
The memory of the tensors is new, as in a new worker. The parts are: `records` (which bytes are where), `read`, `verify`,
`copy` (into the tensors, as far as they were not read there) and `step`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.device_mesh import DeviceMesh

# If this file is run as a script, Python searches modules in its folder. The imports start at the root of the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.checkpoint import VOCABULARY, memory_directory, shape_of, timed
from benchmarks.checkpoint_sides import PlainCopy, describe, rows_of
from benchmarks.cuda.alone import process_group, random_tokens, step, training_state
from benchmarks.restore_holder import Holder
from benchmarks.s3_server import SERVERS, bucket, default_server
from benchmarks.summary import exit_on_sigterm, machine, print_targets, write_json
from elastic_pt.checkpoint import restore
from elastic_pt.checkpoint.index import Index, Memory, Readable, read_index
from elastic_pt.checkpoint.layout import RowRange, checkpoint_directory
from elastic_pt.checkpoint.memory import MemoryState, Places
from elastic_pt.checkpoint.publish import publish_manifest
from elastic_pt.checkpoint.restore import load_rows, plan_reads
from elastic_pt.checkpoint.snapshot import Snapshot, SnapshotBuffers, describe_snapshot
from elastic_pt.checkpoint.upload import KeptShard, publish_node, upload_shard
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.open import open_store
from elastic_pt.store.parallel import in_order
from elastic_pt.store.port import Store
from elastic_pt.train.state import TrainState

RUN_ID: Final = "benchmark"
TIERS: Final = ("memory", "peer", "peer_plain", "bucket")
RATIO_MIN: Final = {"memory": 0.4, "peer_plain": 0.7, "bucket": 0.7}
PARTS: Final = ("records", "read", "verify", "copy", "step")
TOKENS: Final = 128
_READS_AT_ONCE: Final = 8
"""Concurrency of `load_rows`."""


@dataclass(frozen=True)
class Held:
    """One state in all places."""

    snapshot: Snapshot
    places: Mapping[str, Places]
    """In a file of this node, and in the memory of another process, by tier."""
    store: Store
    checkpoint: Checkpoint

    @contextmanager
    def open(
        self, tier: str, wanted: Mapping[str, RowRange]
    ) -> Iterator[tuple[Readable | Memory, Index]]:
        """A source of rows and its index, as a worker opens them."""
        if tier == "bucket":
            yield self.store, read_index(self.store, self.checkpoint, RUN_ID, wanted)
            return
        with MemoryState(self.places[tier], [0]) as memory:
            yield memory, memory.index


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each tier (default 7)")
    parser.add_argument("--state-mb", type=float, default=151.0, help="state for the speeds")
    parser.add_argument("--sizes-mb", default="10,50,150,500", help="states for the first step")
    parser.add_argument("--size-repeats", type=int, default=3, help="of each size (default 3)")
    parser.add_argument("--server", choices=SERVERS, default=default_server())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.size_repeats < 1:
        parser.error("--repeats, --size-repeats: expected at least 1")
    try:
        options.sizes_mb = [float(each) for each in options.sizes_mb.split(",") if each]
    except ValueError:
        parser.error(f"--sizes-mb: {options.sizes_mb!r}; expected numbers such as 10,50")
    return options


class Bench:
    """What all measurements share: the holder, the bucket, and where files are."""

    def __init__(self, holder: Holder, scratch: Path, url: str, mesh: DeviceMesh) -> None:
        self._holder = holder
        self._scratch = scratch
        self._store = open_store(url)
        self._mesh = mesh
        self._generation = 0

    def read_plain(self, target: memoryview) -> None:
        """The bytes of the held state, over a plain socket."""
        self._holder.read_plain(target)

    @contextmanager
    def state(self, state_bytes: float) -> Iterator[TrainState]:
        """A state with random weights."""
        shape = shape_of(state_bytes, TOKENS, "cpu")
        with training_state(shape, VOCABULARY, self._mesh, torch.device("cpu")) as state:
            state.steps_done = 1  # a state of step 0 is never saved
            yield state

    def empty(self, state: TrainState) -> TrainState:
        """Another state of the same shape. No byte of its memory was used."""
        return TrainState(state.config, VOCABULARY, self._mesh, state.device)

    @contextmanager
    def held(self, state: TrainState) -> Iterator[Held]:
        """Put a state into all places."""
        self._generation += 1
        buffers = SnapshotBuffers(self._scratch, self._generation, 0, rows_of(state))
        buffers.allocate(1)
        buffer = buffers.write(describe(state))
        path = buffer.path(self._scratch)
        snapshot = describe_snapshot(buffer, self._scratch)
        assert snapshot is not None
        self._holder.hold(buffer, snapshot.step)
        yield Held(
            snapshot,
            self._holder.places(snapshot, path),
            self._store,
            self._commit(state, path),
        )
        path.unlink(missing_ok=True)
        for key in self._store.keys("ckpt/"):
            self._store.delete(key)

    def _commit(self, state: TrainState, path: Path) -> Checkpoint:
        """A checkpoint of the state in this buffer, in the bucket."""
        directory = checkpoint_directory(state.steps_done, self._generation, "bench")
        uploaded = upload_shard(self._store, KeptShard(path, RUN_ID, directory, 0, range(1)))
        return publish_manifest(self._store, [publish_node(self._store, [uploaded])])


def wanted_of(state: TrainState) -> tuple[dict[str, RowRange], dict[str, torch.Tensor]]:
    """All rows of a state, and their memory."""
    into = {name: each.rows for name, each in state.slices()}
    return {name: (0, rows.shape[0]) for name, rows in into.items()}, into


def measure_tiers(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Ours and the plain way in turn, for each tier. A first repetition warms up."""
    report: dict[str, Any] = {}
    with bench.state(1e6 * options.state_mb) as state, bench.held(state) as held:
        wanted, into = wanted_of(state)
        state_bytes = sum(rows.nbytes for rows in into.values())
        before = {name: rows.clone() for name, rows in into.items()}
        plain = _plain_ways(bench, held, state)
        for tier in TIERS:
            pairs = []
            for repeat in range(options.repeats + 1):
                for rows in into.values():
                    rows.zero_()

                def ours(tier: str = tier) -> None:
                    with held.open(tier, wanted) as (source, index):
                        load_rows(source, index, wanted, into)

                seconds = {"ours": 0.0, "plain": 0.0}
                for way in ("ours", "plain") if repeat % 2 else ("plain", "ours"):
                    seconds[way] = timed(ours if way == "ours" else plain[tier])
                if not all(torch.equal(rows, before[name]) for name, rows in into.items()):
                    raise RuntimeError(f"{tier}: other bytes than those saved")
                tell(f"{tier}: {state_bytes / seconds['ours'] / 1e9:.2f} GB/s", repeat)
                if repeat:
                    pairs.append((seconds["ours"], seconds["plain"]))
            report[tier] = _speeds(state_bytes, pairs)
    return {"state_bytes": state_bytes, **report}


def _plain_ways(bench: Bench, held: Held, state: TrainState) -> dict[str, Callable[[], object]]:
    """The plain way of each tier, into memory that was used before."""
    wanted, _ = wanted_of(state)
    copy = PlainCopy(state)
    copy.begin()
    target = memoryview(bytearray(held.snapshot.size))
    reads = plan_reads(read_index(held.store, held.checkpoint, RUN_ID, wanted), wanted)

    def read_ranges() -> None:
        for _ in in_order(
            reads, lambda read: held.store.read(read.key, read.start, read.end), _READS_AT_ONCE
        ):
            pass

    return {
        "memory": copy.undo,
        "peer": lambda: bench.read_plain(target),
        "peer_plain": lambda: bench.read_plain(target),
        "bucket": read_ranges,
    }


def _speeds(state_bytes: int, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    found: dict[str, float] = {}
    for name, values in (
        ("gb_per_s", [state_bytes / ours / 1e9 for ours, _ in pairs]),
        ("plain_gb_per_s", [state_bytes / plain / 1e9 for _, plain in pairs]),
        ("ratio", [plain / ours for ours, plain in pairs]),
    ):
        found |= {
            name: round(statistics.median(values), 3),
            f"{name}_worst": round(min(values), 3),
        }
    return found


@dataclass
class Clock:
    """Seconds of all threads together, by part."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; its seconds are added to a part."""

        def call(*arguments: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                self.seconds[part] += time.perf_counter() - started_s

        return call


@contextmanager
def parts_of_a_restore(clock: Clock) -> Iterator[None]:
    """Measure the parts of `load_rows`: the functions of the module are replaced for a while."""
    names = {"_read_into": "read", "_first_wrong": "verify", "_copy_rows": "copy"}
    kept = {name: getattr(restore, name) for name in names}
    for name, part in names.items():
        setattr(restore, name, clock.timed(part, kept[name]))
    try:
        yield
    finally:
        for name, work in kept.items():
            setattr(restore, name, work)


def restore_once(new: TrainState, held: Held, tier: str, tokens: torch.Tensor) -> dict[str, float]:
    """Restore a state and do a step. Returns the seconds of both together, and of the parts."""
    wanted, into = wanted_of(new)
    clock = Clock()
    with parts_of_a_restore(clock):
        started_s = time.perf_counter()
        with held.open(tier, wanted) as (source, index):
            opened_s = time.perf_counter()
            load_rows(source, index, wanted, into)
    loaded_s = time.perf_counter()
    step(new, tokens)
    ended_s = time.perf_counter()
    clock.seconds |= {"records": opened_s - started_s, "step": ended_s - loaded_s}
    return {"seconds": ended_s - started_s, **_shares(clock.seconds, loaded_s - opened_s)}


def measure_first_step(bench: Bench, state_bytes: float, repeats: int) -> dict[str, Any]:
    """Seconds from the start of a restore to the end of the first step, by tier and part."""
    found: dict[str, list[dict[str, float]]] = {tier: [] for tier in TIERS}
    with bench.state(state_bytes) as state, bench.held(state) as held:
        tokens = random_tokens(state.config, VOCABULARY, state.device)
        size = sum(each.rows.nbytes for _, each in state.slices())
        for repeat in range(repeats):
            for tier in TIERS:
                found[tier].append(restore_once(bench.empty(state), held, tier, tokens))
                tell(f"{size / 1e6:.0f} MB, {tier}: {found[tier][-1]['seconds']:.3f} s", repeat + 1)
    medians = {
        tier: {
            name: round(statistics.median(each[name] for each in samples), 4) for name in samples[0]
        }
        for tier, samples in found.items()
    }
    return {"state_bytes": size, **medians}


def _shares(seconds: Mapping[str, float], rows_s: float) -> dict[str, float]:
    """Threads work at the same time. Divide the time of `load_rows` as their own times are divided."""
    inside = ("read", "verify", "copy")
    total = sum(seconds[part] for part in inside) or 1.0
    return {
        part: seconds[part] / total * rows_s if part in inside else seconds[part] for part in PARTS
    }


def tell(line: str, repeat: int) -> None:
    """Print the progress."""
    print(f"{repeat or 'warm-up'}: {line}", file=sys.stderr, flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, as the report."""
    report: dict[str, Any] = {"machine": machine(), "server": options.server}
    with ExitStack() as stack:
        url = stack.enter_context(bucket(options.server))
        largest = 1e6 * max([options.state_mb, *options.sizes_mb])
        scratch = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="restore-", dir=memory_directory(largest))
            )
        )
        holder = Holder(scratch)
        stack.callback(holder.close)
        threads = torch.get_num_threads()
        # One thread, as workers of a node with several of them: the plain copy is that of one core.
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, threads)
        mesh = stack.enter_context(process_group(torch.device("cpu")))
        bench = Bench(holder, scratch, url, mesh)
        report |= measure_tiers(bench, options)
        report["first_step"] = [
            measure_first_step(bench, 1e6 * size, options.size_repeats) for size in options.sizes_mb
        ]
    report["targets"] = {
        f"{tier}: at least {least} x the plain way": report[tier]["ratio"] >= least
        for tier, least in RATIO_MIN.items()
    }
    return report


def print_report(report: Mapping[str, Any]) -> None:
    """The tables."""
    print(f"{report['state_bytes'] / 1e6:.0f} MB of state, server: {report['server']}")
    print(f"{'':>10}  {'GB/s (worst)':>16}  {'plain GB/s (worst)':>20}  {'ratio (worst)':>16}")
    for tier in TIERS:
        row = report[tier]
        cells = [
            f"{row[name]:.2f} ({row[f'{name}_worst']:.2f})"
            for name in ("gb_per_s", "plain_gb_per_s", "ratio")
        ]
        print(f"{tier:>10}  {cells[0]:>16}  {cells[1]:>20}  {cells[2]:>16}")
    print("\nseconds from the start of the restore to the end of the first step")
    print(f"{'MB':>6}  {'from':>10}  {'seconds':>8}  " + "  ".join(f"{part:>8}" for part in PARTS))
    for row in report["first_step"]:
        for tier in TIERS:
            cells = [f"{row[tier][name]:8.3f}" for name in ("seconds", *PARTS)]
            print(f"{row['state_bytes'] / 1e6:6.0f}  {tier:>10}  " + "  ".join(cells))
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
