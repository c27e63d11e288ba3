"""Who may read /metrics and /sd: an optional bearer token, and an optional certificate. Agent process, any thread.

Both are local files, as Kubernetes mounts them and as tools renew them: a changed file counts from the next request on.
While a file is away, or half written, the last good content counts.
"""

import hmac
import os
import ssl
import threading
from pathlib import Path
from typing import Final

import structlog

from elastic_pt.config import TelemetrySection
from elastic_pt.errors import ConfigError

_SCHEME: Final = "Bearer "

log = structlog.get_logger("elastic_pt.exporter")


class Protection:
    """The token and the certificate of one metrics port."""

    def __init__(self, telemetry: TelemetrySection) -> None:
        """Read the files. Raises `ConfigError` for one that cannot be used."""
        self._token_file = telemetry.metrics_token_file
        self._certificate = telemetry.metrics_certificate_file
        self._key = telemetry.metrics_key_file or telemetry.metrics_certificate_file
        if self._key and not self._certificate:
            raise ConfigError(
                f"telemetry.metrics_key_file = {self._key!r}: there is no certificate; "
                "expected telemetry.metrics_certificate_file too"
            )
        self._lock = threading.Lock()
        self._token = self._read_token() if self._token_file else ""
        self._loaded: tuple[int, ...] = ()
        self._context: ssl.SSLContext | None = None
        if self._certificate:
            self._loaded = self._times()
            self._context = self._load()

    @property
    def scheme(self) -> str:
        """Of the port's URL."""
        return "https" if self._certificate else "http"

    def allows(self, authorization: str) -> bool:
        """Whether a request with this `Authorization` header may be answered."""
        if not self._token_file:
            return True
        try:
            self._token = self._read_token()
        except ConfigError as error:
            log.warning("metrics_token_not_read", cause=str(error))
        # WSGI gives the bytes of a header as Latin-1.
        given = authorization.encode("latin-1", "replace")
        return hmac.compare_digest(given, f"{_SCHEME}{self._token}".encode())

    def context(self) -> ssl.SSLContext | None:
        """For a new connection; None for plain HTTP."""
        if not self._certificate:
            return None
        with self._lock:
            try:
                times = self._times()
                if times != self._loaded:
                    self._loaded = times
                    self._context = self._load()
            except (ConfigError, OSError) as error:
                log.warning("metrics_certificate_not_read", cause=str(error))
            return self._context

    def _read_token(self) -> str:
        try:
            token = Path(self._token_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise self._mistake("metrics_token_file", self._token_file, error) from error
        if not token:
            raise self._mistake("metrics_token_file", self._token_file, "it is empty")
        return token

    def _times(self) -> tuple[int, ...]:
        try:
            return tuple(os.stat(each).st_mtime_ns for each in (self._certificate, self._key))
        except OSError as error:
            field, path = "metrics_certificate_file", str(error.filename)
            raise self._mistake(field, path, error.strerror or error) from error

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # A key with a password would be asked for on the terminal.
            context.load_cert_chain(self._certificate, self._key, password=lambda: b"")
        except (OSError, ValueError) as error:
            raise self._mistake("metrics_certificate_file", self._certificate, error) from error
        return context

    @staticmethod
    def _mistake(field: str, path: str, error: Exception | str) -> ConfigError:
        what = {
            "metrics_token_file": "a file with one token",
            "metrics_certificate_file": "a PEM file with a certificate chain, and its private key there or in "
            "telemetry.metrics_key_file",
        }[field]
        cause = getattr(error, "strerror", None) or error
        return ConfigError(f"telemetry.{field} = {path!r}: {cause}; expected {what}")
