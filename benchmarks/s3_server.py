"""A real S3 server for a benchmark, in processes of its own: moto, or Ceph with its S3 gateway.

`make services` installs moto. Without it `bucket` gives a directory, so a benchmark also starts on a machine without any
server. The caller prints which of them was used.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import fsspec

from elastic_pt.chaos.bucket import aws_variables
from elastic_pt.chaos.ceph import ACCESS_KEY, SECRET_KEY, Ceph, missing_for_ceph
from elastic_pt.chaos.servers import free_port, listens, start, stop, wait_until

SERVERS: Final = ("moto", "ceph", "directory")
_MOTO: Final = Path(__file__).parents[1] / "services" / "moto-venv" / "bin" / "moto_server"
_START_S: Final = 60.0
_STOP_S: Final = 5.0


def default_server() -> str:
    """The server that a benchmark uses unless it is told another one."""
    return "moto" if _MOTO.exists() else "directory"


@contextmanager
def bucket(server: str) -> Iterator[str]:
    """Start a server. Yields the URL of an empty bucket, and sets the standard AWS variables for this process."""
    if server == "moto" and not _MOTO.exists():
        sys.exit("--server moto: not installed; expected `make services` before")
    if server == "ceph" and (missing := missing_for_ceph()):
        sys.exit(f"--server ceph: not possible, {missing}; expected `make services` before")
    with ExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="bucket-"))
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        if server == "directory":
            yield f"file://{home}"
            return
        if server == "ceph":
            cluster = Ceph(home)
            stack.callback(cluster.stop)
            cluster.start()
            _point_aws_at(cluster.endpoint, ACCESS_KEY, SECRET_KEY)
        else:
            port, log = free_port(), home / "moto.log"
            # moto keeps objects of more than 16 MB in files otherwise.
            environment = {**os.environ, "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(1 << 30)}
            command = [str(_MOTO), "-H", "127.0.0.1", "-p", str(port)]
            process: subprocess.Popen[bytes] = start(command, log, environment)
            stack.callback(stop, process, _STOP_S)
            wait_until("moto", lambda: listens(port), _START_S, log)
            _point_aws_at(f"http://127.0.0.1:{port}", "moto", "moto-secret")
        name = f"benchmark-{uuid.uuid4().hex[:12]}"
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
        yield f"s3://{name}"


def _point_aws_at(endpoint: str, key: str, secret: str) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(aws_variables(endpoint, key, secret))
