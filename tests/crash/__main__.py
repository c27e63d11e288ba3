"""The command of the campaigns."""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from elastic_pt.failpoints import Failpoint
from tests.crash.campaign import BucketCrashes, points_of
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


def main() -> None:
    """Run the campaigns that the options name."""
    silence()
    options = argparse.ArgumentParser(prog="python -m tests.crash")
    options.add_argument("--seeds", type=int, default=20)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--store", choices=("local", "s3"), default="local")
    options.add_argument("--points", default="")
    options.add_argument("--random", type=int, default=5)
    chosen = options.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crash-", dir=MEMORY)))
        url_of: Callable[[str], str] = lambda name: f"file://{folder}/run-{name}"  # noqa: E731
        if chosen.store == "s3":
            endpoint = stack.enter_context(s3_server(folder))
            os.environ.update(S3_SETTINGS, AWS_ENDPOINT_URL=endpoint)
            make_bucket("crash")
            url_of = lambda name: f"s3://crash/run-{name}"  # noqa: E731
        started_s = time.monotonic()
        for seed in range(chosen.first, chosen.first + chosen.seeds):
            own = Path(folder) / str(seed)
            own.mkdir()
            crashes = BucketCrashes(seed, own, url_of)
            for point in points_of(chosen.store):
                if chosen.points and point.label not in chosen.points.split(","):
                    continue
                rule = crashes.kill_at(point)
                print(seed, rule, round(time.monotonic() - started_s, 2), flush=True)
            for number in range(chosen.random):
                print(seed, round(crashes.kill_at_random(number), 3), flush=True)


def make_bucket(name: str) -> None:
    """Create a bucket, in a child: this process must have no threads."""
    from tests.crash.processes import Child

    def make(_: object) -> None:
        import fsspec

        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)

    Child(make).wait()


if __name__ == "__main__":
    main()
