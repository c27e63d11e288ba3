"""What proves that a process belongs to a run, and encrypts what the run's agents send each other.

    secret/token           every request between agents carries it; it signs the notices of operators
    secret/authority.pem   private key and certificate of an authority that knows this run only

    authority ─► issue ─► Access: the token, and a certificate of this process ─► `server_context`, `client_context`

The first agent of a run creates both objects. They have a prefix of their own, so that a policy of the bucket can keep
them from readers of checkpoints (docs/deployment/buckets.md). Each process that reads the authority issues a
certificate to itself, and accepts no peer without one: TLS 1.3, both ways. A process that can read `secret/` counts as a node of the
run; nothing else tells nodes apart. Certificates never expire, because clocks of spot machines may be wrong; a run ends first.
"""

import datetime
import os
import re
import secrets
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from elastic_pt.errors import AlreadyExists, ConfigError, NotFound
from elastic_pt.store.port import PRIVATE, Store

TOKEN_KEY: Final = f"{PRIVATE}token"
AUTHORITY_KEY: Final = f"{PRIVATE}authority.pem"
_BEGIN: Final = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_NEVER: Final = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
"""RFC 5280: no end is known."""
_NAME_CHARACTERS_MAX: Final = 64
_BYTES_MAX: Final = 1 << 16


@dataclass(frozen=True)
class Access:
    """The access of one process to the agents of one run."""

    token: str = field(repr=False)
    identity: str = field(default="", repr=False)
    """This process's private key and certificate, and the authority's certificate, as PEM; empty: links are plain text."""

    @property
    def scheme(self) -> str:
        """Of the URLs of agents."""
        return "https" if self.identity else "http"

    @property
    def headers(self) -> dict[str, str]:
        """What each request carries."""
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def secrets(self) -> list[str]:
        """What no event may show: the token, and each line of the private key."""
        key = self.identity.partition("-----END")[0].splitlines()[1:]
        return [self.token, *key]

    def url(self, host: str, port: int) -> str:
        """Of the agent at this IP address and port."""
        return f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def server_context(self) -> ssl.SSLContext | None:
        """For an agent that answers: refuses who has no certificate of this run. None for plain text."""
        return self._context(ssl.PROTOCOL_TLS_SERVER)

    def client_context(self) -> ssl.SSLContext | None:
        """For who asks an agent: refuses an answerer without a certificate of this run. None for plain text."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext | None:
        if not self.identity:
            return None
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # A node has the address that the log names, whatever it is; only agents of this run have a certificate.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        authority = self.identity[self.identity.rindex("-----BEGIN CERTIFICATE-----") :]
        context.load_verify_locations(cadata=authority)
        # OpenSSL reads files only. This one has no name, and is never on a disk.
        with open(os.memfd_create("identity"), "w") as file:
            file.write(self.identity)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context


def join_access(store: Store, name: str, *, tls: bool) -> Access:
    """The access of the node `name`; the first agent creates what is missing. Agent process. Raises `StoreError`."""
    return _access(store, name, tls=tls, read=_create_or_read)


def read_access(store: Store, name: str, *, tls: bool) -> Access:
    """The access of an operator's process. Raises `NotFound` if the run never had an agent, and `StoreError`."""
    return _access(store, name, tls=tls, read=lambda store, key, _: _read(store, key))


def _access(
    store: Store,
    name: str,
    *,
    tls: bool,
    read: Callable[[Store, str, Callable[[], bytes]], bytes],
) -> Access:
    token = _token(read(store, TOKEN_KEY, lambda: secrets.token_hex(32).encode()), store.url)
    if not tls:
        return Access(token)
    return Access(token, issue(read(store, AUTHORITY_KEY, new_authority), name, store.url))


def _create_or_read(store: Store, key: str, make: Callable[[], bytes]) -> bytes:
    try:
        return _read(store, key)
    except NotFound:
        with suppress(AlreadyExists):
            store.create(key, make())
        return _read(store, key)


def _read(store: Store, key: str) -> bytes:
    return store.read(key, 0, _BYTES_MAX)


def _token(data: bytes, url: str) -> str:
    """The token. It is a part of a header, so it may not hold just any bytes."""
    if not re.fullmatch(rb"[!-~]{1,1024}", data):
        raise ConfigError(
            f"{url}/{TOKEN_KEY}: {len(data)} bytes that are no token; expected the token that the run's first agent wrote"
        )
    return data.decode("ascii")


def new_authority() -> bytes:
    """Private key and certificate of an authority, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"elastic_pt run {secrets.token_hex(8)}")
    certificate = (
        _certificate(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _pem(key) + certificate.public_bytes(Encoding.PEM)


def issue(authority: bytes, name: str, source: str) -> str:
    """An `Access.identity` for the process `name`. Raises `ConfigError`, which names `source`, for an unusable authority."""
    try:
        signer = load_pem_private_key(authority, None)
        certificate = x509.load_pem_x509_certificate(authority)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{source}/{AUTHORITY_KEY}: {error}; expected the private key and certificate that the run's first agent wrote"
        ) from None
    if (
        not isinstance(signer, ec.EllipticCurvePrivateKey)
        or signer.public_key() != certificate.public_key()
    ):
        raise ConfigError(
            f"{source}/{AUTHORITY_KEY}: the key is not that of the certificate; "
            "expected the private key and certificate that the run's first agent wrote"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    mine = (
        _certificate(_name(name), certificate.subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    chain = [each.public_bytes(Encoding.PEM) for each in (mine, certificate)]
    return b"".join([_pem(key), *chain]).decode()


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGIN)
        .not_valid_after(_NEVER)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:_NAME_CHARACTERS_MAX])])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
