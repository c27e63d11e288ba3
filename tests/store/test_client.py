"""The lazily built filesystem: one per process, and never one process's inside another."""

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
    """A client of some place in memory."""
    return Client(f"memory://{uuid.uuid4().hex}", retry=Retry(5.0))


def filesystem_of(client: Client) -> object:
    return client.request("asking", lambda filesystem, root, timeout: filesystem)


def test_one_filesystem_serves_all_requests_of_a_process(client: Client) -> None:
    """Connections are kept between requests, and shared with no other client."""
    first = filesystem_of(client)
    assert filesystem_of(client) is first
    assert filesystem_of(Client(client.url, retry=Retry(5.0))) is not first


def test_a_child_builds_its_own_and_keeps_the_parents_alive(client: Client) -> None:
    """Closing an inherited filesystem in a child would deafen the parent's event loop: its requests hang."""
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


def test_a_refusal_builds_a_new_filesystem_once(client: Client) -> None:
    """Renewed credentials are found by a new session; a second refusal is final."""
    seen: list[int] = []

    def refuse(filesystem: object, root: str, timeout: dict[str, float]) -> None:
        seen.append(id(filesystem))
        raise PermissionError("not you")

    with pytest.raises(AccessDenied, match=r"asking of memory://.*not you; check the credentials"):
        client.request("asking", refuse)
    assert len(seen) == 2


def test_a_server_that_cannot_be_reached_is_a_store_error() -> None:
    """A protocol that connects while its filesystem is built is retried and told like any other request."""
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
def test_what_an_ftp_server_answers_is_no_bug(error: Exception, fault: Fault) -> None:
    """Names that do not resolve and temporary replies are tried again, other replies end the request."""
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
def test_what_cannot_work_is_told_at_once_until_it_has_worked(
    fault: Fault, patient: bool, error: type[Exception] | None
) -> None:
    """Wrong settings, and for a command a server nobody reaches, are no reason to wait; later both pass."""
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
