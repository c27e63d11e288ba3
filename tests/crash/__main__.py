"""The command of the campaigns."""

import argparse
import importlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from tests.crash import memory
from tests.crash.campaign import OF_MEMORY, BucketCrashes, points_of
from tests.crash.processes import silence
from tests.services.ceph import ACCESS_KEY, SECRET_KEY, Ceph

MEMORY: Final = Path("/dev/shm")
S3_SETTINGS: Final = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """A Ceph RGW that accepts small parts. Yields its URL."""
    server = Ceph(folder / "ceph", part_bytes_min=1)
    server.start()
    try:
        yield server.endpoint
    finally:
        server.stop()


def main() -> int:
    """Run the campaign that the options name. Returns the exit code."""
    options = argparse.ArgumentParser(prog="python -m tests.crash")
    options.add_argument("--seeds", type=int, default=20, help="how many seeds")
    options.add_argument("--first", type=int, default=0, help="the first seed")
    options.add_argument("--store", choices=("local", "s3"), default="local")
    options.add_argument("--points", default="", help="only these failpoints, with commas")
    options.add_argument("--random", type=int, default=2, help="kills at random moments, per seed")
    chosen = options.parse_args()
    silence()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crash-", dir=MEMORY)))
        url = f"file://{folder}"
        if chosen.store == "s3":
            endpoint = stack.enter_context(s3_server(folder))
            os.environ.update(S3_SETTINGS, AWS_ENDPOINT_URL=endpoint)
            importlib.import_module("s3fs")  # once, and not in each child
            make_bucket("crash")
            url = "s3://crash"
        points = [
            each for each in points_of(chosen.store) if each.label in chosen.points.split(",")
        ]
        report = Report()
        for seed in range(chosen.first, chosen.first + chosen.seeds):
            crashes = BucketCrashes(seed, folder, url)
            for point in points_of(chosen.store):
                if points and point not in points:
                    continue
                report.add(point.label, f"seed {seed}", partial(crashes.kill_at, point))
            for point in (each for each in OF_MEMORY if chosen.store == "local"):
                if points and point not in points:
                    continue
                name = f"{seed}-{point.label}"
                kill = partial(memory.kill_node_at, point, seed, folder / f"nodes-{name}")
                report.add(point.label, f"seed {seed}", kill)
                if point in memory.OF_WORKER:
                    kill = partial(memory.kill_worker_at, point, seed, folder / f"worker-{name}")
                    report.add(f"{point.label} (worker)", f"seed {seed}", kill)
            for number in range(chosen.random):
                report.add(
                    "random moments", f"seed {seed}", partial(crashes.kill_at_random, number)
                )
        return report.end()


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
    from tests.crash.processes import Child

    def make(_: object) -> None:
        import fsspec

        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)

    Child(make).wait()


if __name__ == "__main__":
    raise SystemExit(main())
