"""Who may talk to the agents of a run: the token, the authority, and the certificates that it signs."""

import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_pt.errors import ConfigError, NotFound
from elastic_pt.runlog.access import (
    AUTHORITY_KEY,
    TOKEN_KEY,
    Access,
    issue,
    join_access,
    new_authority,
    read_access,
)
from elastic_pt.store.open import open_store
from tests.access import PLAIN, TLS


def met(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    """What a client hears from a server after the handshake. Raises the error of the client, or of the server."""
    ours, theirs = socket.socketpair()
    trouble: list[Exception] = []

    def answer() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as link:
                link.sendall(b"hello")
        except OSError as error:
            trouble.append(error)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(ours) as link:
            return link.recv(5)
    finally:
        ours.close()
        thread.join(10)
        if trouble:
            raise trouble[0]


def context(make: Callable[[], ssl.SSLContext | None]) -> ssl.SSLContext:
    """A context of an access with certificates."""
    made = make()
    assert made is not None
    return made


def stranger(identity: str = "") -> ssl.SSLContext:
    """A client that trusts anybody."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    if identity:
        other = context(Access("", identity).client_context)
        other.verify_mode = ssl.CERT_NONE
        return other
    return made


def test_agents_that_start_together_share_token_and_authority(tmp_path: Path) -> None:
    """Each has a certificate of its own, and any two of them accept each other."""
    found: list[Access] = []
    start = threading.Barrier(8)

    def come(number: int) -> None:
        store = open_store(f"file://{tmp_path}")
        start.wait()
        found.append(join_access(store, f"node-{number}", tls=True))

    threads = [threading.Thread(target=come, args=(each,)) for each in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.token for each in found} == {(tmp_path / TOKEN_KEY).read_text()}
    assert len(found[0].token) >= 32
    assert len({each.identity for each in found}) == 8
    for each in found[1:]:
        assert met(context(found[0].server_context), context(each.client_context)) == b"hello"


def test_an_operator_creates_nothing(tmp_path: Path) -> None:
    """A run that never had an agent has no access; afterwards an operator has one that agents accept."""
    store = open_store(f"file://{tmp_path}")
    with pytest.raises(NotFound):
        read_access(store, "operator", tls=True)
    assert not (tmp_path / "secret").exists()
    node = join_access(store, "node", tls=True)
    operator = read_access(store, "operator", tls=True)
    assert met(context(node.server_context), context(operator.client_context)) == b"hello"


@pytest.mark.parametrize(
    "client",
    [
        stranger(),
        stranger(issue(new_authority(), "node-0", "another run")),
        context(Access("secret", issue(new_authority(), "node-0", "another run")).client_context),
    ],
    ids=["nothing", "certificate of another run", "another run"],
)
def test_who_has_no_certificate_of_the_run_is_refused(client: ssl.SSLContext) -> None:
    """Also if it has one of another run."""
    with pytest.raises(ssl.SSLError):
        met(context(TLS.server_context), client)


def test_an_answer_without_a_certificate_of_the_run_is_refused() -> None:
    """A node does not tell its token to somebody who only has its address."""
    liar = Access("", issue(new_authority(), "node-0", "another run"))
    with pytest.raises(ssl.SSLError, match=r"UNKNOWN_CA|verify failed"):
        met(context(liar.server_context), context(TLS.client_context))


def test_a_certificate_signs_no_other() -> None:
    """A node's certificate is no authority."""
    forged = Access("", issue(TLS.identity.encode(), "node-0", "test"))
    with pytest.raises(ssl.SSLError):
        met(context(TLS.server_context), context(forged.client_context))


def test_an_older_protocol_is_refused() -> None:
    """TLS 1.3 only."""
    old = context(TLS.client_context)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        met(context(TLS.server_context), old)


def test_access_tells_no_secret() -> None:
    """Its text has neither token nor key, and `secrets` has both, line by line."""
    assert "secret" not in repr(TLS)
    assert "BEGIN" not in repr(TLS)
    key = TLS.identity[: TLS.identity.index("-----END")].splitlines()[1:]
    assert TLS.secrets == ["secret", *key]
    assert all(len(each) > 8 for each in key)
    assert PLAIN.secrets == ["secret"]


@pytest.mark.parametrize(
    "content",
    [b"", b"rubbish", new_authority()[:200], new_authority().partition(b"-----BEGIN CERT")[0]],
    ids=["empty", "rubbish", "cut", "key alone"],
)
def test_a_damaged_authority_is_named(tmp_path: Path, content: bytes) -> None:
    """One line with the object and what was expected."""
    store = open_store(f"file://{tmp_path}")
    store.write(AUTHORITY_KEY, content)
    with pytest.raises(ConfigError, match=f"{AUTHORITY_KEY}: .*; expected the private key"):
        join_access(store, "node", tls=True)


def test_a_key_of_another_certificate_is_named() -> None:
    """They belong together."""
    key, certificate = (new_authority().partition(b"-----BEGIN CERT") for _ in range(2))
    mixed = key[0] + certificate[1] + certificate[2]
    with pytest.raises(ConfigError, match="the key is not that of the certificate"):
        issue(mixed, "node", "s3://bucket/run")


@pytest.mark.parametrize(("host", "url"), [("10.0.0.1", "10.0.0.1:7"), ("fd00::1", "[fd00::1]:7")])
def test_urls_have_the_scheme_of_the_access(host: str, url: str) -> None:
    """An IPv6 address stands in brackets."""
    assert TLS.url(host, 7) == f"https://{url}"
    assert PLAIN.url(host, 7) == f"http://{url}"


def test_without_certificates_there_is_no_context(tmp_path: Path) -> None:
    """`elastic.tls = false` creates no authority."""
    access = join_access(open_store(f"file://{tmp_path}"), "node", tls=False)
    assert access.server_context() is None
    assert access.client_context() is None
    assert not (tmp_path / AUTHORITY_KEY).exists()
