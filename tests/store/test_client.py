"""The lazily built filesystem: each process has its own."""

import ftplib
import os
import socket
import uuid
import weakref

import pytest

from elastic_pt.errors import AccessDenied, ConfigError, StoreError
from elastic_pt.store.client import Client, Fault, fault_of
from elastic_pt.store.retry import Retry


@pytest.fixture
def client() -> Client:
    """A client of an empty place in memory."""
    return Client(f"memory://{uuid.uuid4().hex}", retry=Retry(5.0))


def filesystem_of(client: Client) -> object:
    return client.request("asking", lambda filesystem, root, timeout: filesystem)


def test_one_filesystem_serves_all_requests_of_a_process(client: Client) -> None:
    """Connections are kept between requests, and not shared with other clients."""
    first = filesystem_of(client)
    assert filesystem_of(client) is first
    assert filesystem_of(Client(client.url, retry=Retry(5.0))) is not first


def test_child_builds_its_own_filesystem_and_keeps_the_parents(client: Client) -> None:
    """If a child closed an inherited filesystem, the parent's event loop would get no events and hang."""
    inherited = weakref.ref(filesystem_of(client))
    child = os.fork()
    if child == 0:
        try:
            own = filesystem_of(client)
            os._exit(0 if inherited() is not None and inherited() is not own else 1)
        except BaseException:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_refused_request_rebuilds_the_filesystem_once(client: Client) -> None:
    """A new session reads renewed credentials; a second refusal is final."""
    seen: list[int] = []

    def refuse(filesystem: object, root: str, timeout: dict[str, float]) -> None:
        seen.append(id(filesystem))
        raise PermissionError("not you")

    with pytest.raises(AccessDenied, match=r"asking of memory://.*not you; check the credentials"):
        client.request("asking", refuse)
    assert len(seen) == 2


def test_unreachable_server_raises_store_error() -> None:
    """A protocol may connect while its filesystem is built: this is retried, and fails, like any other request."""
    client = Client("ftp://127.0.0.1:1/y", retry=Retry(0.05, first_s=0.01))
    with pytest.raises(StoreError, match=r"asking of ftp://127\.0\.0\.1:1/y: gave up .*refused"):
        filesystem_of(client)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (socket.gaierror(-2, "Name or service not known"), Fault.UNREACHABLE),
        (ftplib.error_temp("421 too many connections"), Fault.TRANSIENT),
        (ftplib.error_perm("530 login incorrect"), Fault.FINAL),
    ],
)
def test_ftp_errors_map_to_faults(error: Exception, fault: Fault) -> None:
    """Unknown hosts and temporary replies are retried; other replies end the request."""
    assert fault_of(error) is fault


@pytest.mark.parametrize(
    ("fault", "patient", "error"),
    [
        (Fault.SETTINGS, True, ConfigError),
        (Fault.UNREACHABLE, False, StoreError),
        (Fault.UNREACHABLE, True, None),
        (Fault.TRANSIENT, False, None),
    ],
)
def test_wrong_settings_fail_at_once_until_a_request_has_succeeded(
    fault: Fault, patient: bool, error: type[Exception] | None
) -> None:
    """Wrong settings and, unless `patient`, an unreachable server fail at once; after a success they are retried."""
    client = Client(
        f"memory://{uuid.uuid4().hex}",
        retry=Retry(20.0),
        fault_of=lambda _: fault,
        patient=patient,
    )
    attempts: list[int] = []

    def fail_once(filesystem: object, root: str, timeout: dict[str, float]) -> str:
        attempts.append(1)
        if len(attempts) == 1:
            raise RuntimeError("away")
        return "there"

    if error is None:
        assert client.request("asking", fail_once) == "there"
    else:
        with pytest.raises(error, match="away"):
            client.request("asking", fail_once)
        assert client.request("asking", fail_once) == "there"
    attempts.clear()
    assert client.request("asking", fail_once) == "there"
    assert len(attempts) == 2
