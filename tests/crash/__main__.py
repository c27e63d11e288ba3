"""The command of the campaigns."""

import argparse
import importlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import fsspec

from elastic_pt.chaos.bucket import aws_variables
from elastic_pt.chaos.ceph import ACCESS_KEY, SECRET_KEY, Ceph
from elastic_pt.failpoints import Failpoint
from tests.crash import corruption, memory
from tests.crash.campaign import OF_MEMORY, BucketCrashes, points_of
from tests.crash.processes import Child, silence

MEMORY: Final = Path("/dev/shm")


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """A Ceph RGW that accepts small parts; the AWS variables point there. Yields the URL of a bucket."""
    server = Ceph(folder / "ceph", part_bytes_min=1)
    server.start()
    try:
        os.environ.update(aws_variables(server.endpoint, ACCESS_KEY, SECRET_KEY))
        make_bucket("crash")
        yield "s3://crash"
    finally:
        server.stop()


def main() -> int:
    """Run the campaign that the options name. Returns the exit code."""
    options = argparse.ArgumentParser(prog="python -m tests.crash")
    options.add_argument("--seeds", type=int, default=20, help="how many seeds")
    options.add_argument("--first", type=int, default=0, help="the first seed")
    options.add_argument("--store", choices=("local", "s3"), default="local")
    options.add_argument("--url", help="an empty bucket instead of an own S3 server")
    options.add_argument("--points", help="only these failpoints, with commas")
    options.add_argument("--random", type=int, default=2, help="kills at random moments, per seed")
    options.add_argument("--corruptions", type=int, help="changes of stored states; no crashes")
    chosen = options.parse_args()
    silence()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crash-", dir=MEMORY)))
        if chosen.corruptions is not None:
            return corrupt(chosen.first, chosen.corruptions, folder)
        url = f"file://{folder}"
        if chosen.store == "s3":
            importlib.import_module("s3fs")  # once, and not in each child
            url = chosen.url or stack.enter_context(s3_server(folder))
        points = [
            each
            for each in Failpoint
            if not chosen.points or each.label in chosen.points.split(",")
        ]
        report = Report()
        for seed in range(chosen.first, chosen.first + chosen.seeds):
            crash(seed, folder, url, points, chosen.random, report)
        return report.end()


def crash(
    seed: int, folder: Path, url: str, points: Sequence[Failpoint], moments: int, report: "Report"
) -> None:
    """All crashes of a seed."""
    store = "s3" if url.startswith("s3://") else "local"
    crashes, name = BucketCrashes(seed, folder, url), f"seed {seed}"
    for point in (each for each in points_of(store) if each in points):
        report.add(point.label, name, partial(crashes.kill_at, point))
    for number in range(moments):
        report.add("random moments", name, partial(crashes.kill_at_random, number))
    for point in (each for each in OF_MEMORY if each in points and store == "local"):
        nodes = folder / f"nodes-{seed}-{point.label}"
        report.add(point.label, name, partial(memory.kill_node_at, point, seed, nodes))
        if point in memory.OF_WORKER:
            own = folder / f"worker-{seed}-{point.label}"
            kill = partial(memory.kill_worker_at, point, seed, own)
            report.add(f"{point.label} (worker)", name, kill)


def corrupt(seed: int, count: int, folder: Path) -> int:
    """Change stored states, and print what the readers said. Returns the exit code."""
    outcomes = corruption.run(seed, count, folder)
    for (target, kind, outcome), number in sorted(outcomes.items()):
        print(f"{target:28} {kind:14} {outcome:10} {number:6}")
    print(f"seed {seed}: {outcomes.total()} changes, {outcomes.wrong()} wrong")
    return 1 if outcomes.wrong() else 0


class Report:
    """Counts the cases of a campaign, and prints those that failed."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._passed: Counter[str] = Counter()
        self._failed = 0

    def add(self, kind: str, name: str, case: Callable[[], object]) -> None:
        """Run one case."""
        try:
            case()
            self._passed[kind] += 1
        except AssertionError as error:
            self._failed += 1
            print(f"FAILED {kind}, {name}\n{error}", flush=True)

    def end(self) -> int:
        """Print the numbers. Returns the exit code."""
        for kind, count in self._passed.items():
            print(f"{kind:24} {count:6}")
        total, seconds = sum(self._passed.values()), time.monotonic() - self._started_s
        print(f"{total} passed, {self._failed} failed, {seconds:.0f} s")
        return 1 if self._failed else 0


def make_bucket(name: str) -> None:
    """Create a bucket, in a child: this process must have no threads."""

    def make(_: object) -> None:
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)

    Child(make).wait()


if __name__ == "__main__":
    raise SystemExit(main())
