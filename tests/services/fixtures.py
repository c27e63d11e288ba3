"""Fixtures that give tests a bucket on a real S3 server, and a real Prometheus.

`moto_url` and `ceph_url` yield the URL of an empty bucket and set the standard AWS variables, so that
code under test and the processes it starts reach the server as they would reach any other. The servers
start once per session, on first use, and end with it. `start_prometheus` and `start_alertmanager` start one server
per call, which takes 0.1 s; it ends with the test.

A service that is missing skips its tests and says what is left out; where `CI=true` it fails them.
"""

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import fsspec
import pytest

from elastic_pt.chaos.bucket import aws_variables
from elastic_pt.chaos.ceph import ACCESS_KEY, SECRET_KEY, Ceph, missing_for_ceph
from elastic_pt.chaos.servers import free_port, listens, start, stop, wait_until
from elastic_pt.errors import UnexpectedError
from tests.services import prometheus
from tests.services.prometheus import Alertmanager, Prometheus

SERVICES = Path(__file__).parents[2] / "services"
MOTO_SERVER = SERVICES / "moto-venv" / "bin" / "moto_server"
CLOUDS_PYTHON = SERVICES / "clouds-venv" / "bin" / "python"
EXTRAS_PYTHON = SERVICES / "extras-venv" / "bin" / "python"


class StartPrometheus(Protocol):
    """Starts a Prometheus that ends with the test.

    It scrapes `targets` (host:port) as the job `elastic_pt`, or what `scrape_configs` says, as in its configuration.
    """

    def __call__(
        self,
        targets: Sequence[str] = (),
        *,
        scrape_configs: Sequence[Mapping[str, Any]] = (),
        rule_files: Sequence[Path] = (),
        alertmanager: str | None = None,
    ) -> Prometheus: ...


def left_out(what: str) -> None:
    """Skip the test and name what is left out; fail it where CI promises to leave nothing out."""
    if os.environ.get("CI") == "true":
        pytest.fail(
            f"{what}; `make services` installs it, and CI leaves nothing out", pytrace=False
        )
    pytest.skip(f"left out: {what}; `make services` installs it")


@pytest.fixture(scope="session")
def moto_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a moto server that lives as long as the session."""
    if not MOTO_SERVER.exists():
        left_out("tests against the moto S3 server")
    port, log = free_port(), tmp_path_factory.mktemp("moto") / "moto.log"
    server = start([str(MOTO_SERVER), "-H", "127.0.0.1", "-p", str(port)], log, dict(os.environ))
    try:
        wait_until("moto", lambda: listens(port), 60.0, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(server, 5.0)


@pytest.fixture(scope="session")
def extras_python() -> str:
    """The Python of the environment that has the extras `grafana` and `wandb`."""
    if not EXTRAS_PYTHON.exists():
        left_out("tests of the extras grafana and wandb")
    return str(EXTRAS_PYTHON)


@pytest.fixture(scope="session")
def clouds_python() -> str:
    """The Python of the environment that has SkyPilot and the readers of cloud policies."""
    if not CLOUDS_PYTHON.exists():
        left_out("tests of SkyPilot's own parser, and of the policies for Google and Azure")
    return str(CLOUDS_PYTHON)


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    """A one-node Ceph with an S3 gateway that lives as long as the session."""
    if missing := missing_for_ceph():
        left_out(f"tests against a real Ceph RGW, {missing}")
    cluster = Ceph(tmp_path_factory.mktemp("ceph"))
    try:
        cluster.start()
    except UnexpectedError as error:
        pytest.fail(f"Ceph is installed but did not start: {error}", pytrace=False)
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def moto_url(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://` and an empty bucket on moto; the AWS variables point there."""
    return _bucket(moto_endpoint, "moto", "moto-secret", monkeypatch)


@pytest.fixture
def ceph_url(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://` and an empty bucket on a real Ceph RGW; the AWS variables point there."""
    return _bucket(ceph.endpoint, ACCESS_KEY, SECRET_KEY, monkeypatch)


def _bucket(endpoint: str, key: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> str:
    point_aws_at(endpoint, key, secret, monkeypatch)
    bucket = f"elastic-pt-{uuid.uuid4().hex[:12]}"
    options = {"endpoint_url": endpoint, "key": key, "secret": secret, "skip_instance_cache": True}
    fsspec.filesystem("s3", **options).mkdir(bucket)
    return f"s3://{bucket}"


def point_aws_at(endpoint: str, key: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process and its children talk S3 to `endpoint`, whatever the user's own settings."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in aws_variables(endpoint, key, secret).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def start_prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartPrometheus]:
    """Starts a Prometheus with the targets and rules of the test; it ends with the test."""
    _require_prometheus()
    with ExitStack() as stack:

        def start_one(
            targets: Sequence[str] = (),
            *,
            scrape_configs: Sequence[Mapping[str, Any]] = (),
            rule_files: Sequence[Path] = (),
            alertmanager: str | None = None,
        ) -> Prometheus:
            if targets:
                static = {"job_name": "elastic_pt", "static_configs": [{"targets": list(targets)}]}
                scrape_configs = [*scrape_configs, static]
            home = tmp_path_factory.mktemp("prometheus")
            server = Prometheus(home, scrape_configs, rule_files, alertmanager).start()
            stack.callback(server.stop)
            return server

        yield start_one


@pytest.fixture
def start_alertmanager(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[], Alertmanager]]:
    """Starts an Alertmanager that sends to nobody; it ends with the test."""
    _require_prometheus()
    with ExitStack() as stack:

        def start_one() -> Alertmanager:
            server = Alertmanager(tmp_path_factory.mktemp("alertmanager")).start()
            stack.callback(server.stop)
            return server

        yield start_one


def _require_prometheus() -> None:
    missing = prometheus.missing_commands()
    if missing:
        left_out(f"tests against a real Prometheus, since {', '.join(missing)} are not installed")
