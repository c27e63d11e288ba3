"""Requests to a remote filesystem: retried, with the library's errors mapped to ours.

The first request of each process builds the fsspec filesystem; import and `__init__` do not. So a fork
server may hold a `Store`, and its children start with clean connections. fsspec's caches of instances
and listings are off. Foreign exceptions become a `Fault` (here and in `s3.py`). Only this module turns
a `Fault` into one of our errors. A refused request rebuilds the filesystem once, and no oftener than every few
seconds, because credentials from the environment or from a metadata service may have been renewed.
"""

import asyncio
import errno
import ftplib
import math
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from typing import Any, Final, TypeVar

from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs

from elastic_pt.errors import AccessDenied, AlreadyExists, ConfigError, NotFound, StoreError
from elastic_pt.store.observer import NoObserver, Observer, Result, operation_of
from elastic_pt.store.retry import Retry, TryAgain

Answer = TypeVar("Answer")
_RENEW_EVERY_S: Final = 5.0


class Fault(Enum):
    """What a failed request means, independent of the library."""

    MISSING = auto()  # no object under that key
    NO_BUCKET = auto()  # the URL itself is wrong
    SETTINGS = auto()  # the client's own settings are wrong: no request was sent
    EXISTS = auto()  # the condition of a create did not hold
    DENIED = auto()  # credentials are missing, expired or not allowed
    BEYOND = auto()  # the range starts after the last byte
    # Connection refused or unknown host. A patient client retries it like TRANSIENT.
    UNREACHABLE = auto()
    TRANSIENT = auto()  # another attempt may succeed
    READ_ONLY = auto()  # the protocol does not support the operation
    FINAL = auto()  # another attempt cannot succeed
    BUG = auto()  # not an error of the store


_RESULTS = {
    Fault.MISSING: Result.MISSING,
    Fault.BEYOND: Result.MISSING,
    Fault.EXISTS: Result.EXISTS,
    Fault.DENIED: Result.DENIED,
    Fault.UNREACHABLE: Result.TRANSIENT,
    Fault.TRANSIENT: Result.TRANSIENT,
}


class BeyondEnd(StoreError):
    """The range starts after the last byte of the object. Never leaves this package."""


_FINAL_ERRNOS = frozenset(
    {
        errno.EINVAL,
        errno.EPERM,
        errno.ENOSYS,
        errno.ENOTSUP,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.ENAMETOOLONG,
        errno.EMSGSIZE,
    }
)


def fault_of_status(status: int) -> Fault:
    """What an HTTP status of 400 or more means for a request to an object store."""
    if status in (401, 403):
        return Fault.DENIED
    if status == 404:
        return Fault.MISSING
    if status == 412:
        return Fault.EXISTS
    if status == 416:
        return Fault.BEYOND
    if status in (408, 409, 425, 429) or status >= 500:
        return Fault.TRANSIENT
    return Fault.FINAL


def fault_of(error: Exception) -> Fault:
    """What an exception of any fsspec filesystem means, by its HTTP status or its Python type."""
    for name in ("status", "status_code", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int) and 400 <= status < 600:
            return fault_of_status(status)
    if isinstance(error, NotImplementedError):
        return Fault.READ_ONLY
    if isinstance(error, FileNotFoundError):
        return Fault.MISSING
    if isinstance(error, FileExistsError):
        return Fault.EXISTS
    if isinstance(error, PermissionError) or "Forbidden" in str(error):  # gcsfs: a bare OSError
        return Fault.DENIED
    if "Credential" in type(error).__name__:  # botocore, google-auth and azure-identity
        return Fault.DENIED
    if isinstance(error, (ConnectionRefusedError, socket.gaierror)):
        return Fault.UNREACHABLE
    if isinstance(error, (TimeoutError, asyncio.TimeoutError, EOFError)):
        return Fault.TRANSIENT
    if isinstance(error, OSError):
        return Fault.FINAL if error.errno in _FINAL_ERRNOS else Fault.TRANSIENT
    if isinstance(error, ftplib.Error):  # 4xx replies are temporary by definition (RFC 959)
        return Fault.TRANSIENT if isinstance(error, ftplib.error_temp) else Fault.FINAL
    # aiohttp, azure-core and google-auth name their transport errors without a common base class.
    library = type(error).__module__.partition(".")[0]
    return Fault.TRANSIENT if library in ("aiohttp", "azure", "google", "requests") else Fault.BUG


# Filesystems of a parent process, kept alive here. Garbage collection would close their sockets through
# the event loop's epoll instance. Parent and child share that instance: the parent's requests would hang.
_INHERITED: list[Any] = []


class Client:
    """Sends requests to one URL through fsspec. Safe to share between threads, and after a fork (not `memory://`)."""

    def __init__(
        self,
        url: str,
        *,
        retry: Retry,
        options: Mapping[str, Any] | None = None,
        configure: Callable[[Any], None] = lambda filesystem: None,
        fault_of: Callable[[Exception], Fault] = fault_of,
        guard: AbstractContextManager[Any] | None = None,
        patient: bool = True,
        observer: Observer | None = None,
    ) -> None:
        """Unless `patient`, an unreachable server raises at once, until the first request has succeeded.

        Until then, wrong settings raise at once as well. Later they are retried: the settings have worked, so
        a file that they name is probably being replaced.
        """
        self.url = url
        self._retry = retry
        self._options = {
            "skip_instance_cache": True,
            "use_listings_cache": False,
            **(options or {}),
        }
        self._configure = configure
        self._fault_of = fault_of
        self._guard = guard or nullcontext()
        self._patient, self._answered = patient, False
        self._observer = observer or NoObserver()
        # No lock: a fork could inherit a held one. If two threads both build a filesystem, no harm is done.
        self._built: tuple[int, Any, str] | None = None
        self._renewed_s = -math.inf

    def request(
        self,
        what: str,
        send: Callable[[Any, str, dict[str, float]], Answer],
        *,
        bounded: bool = True,
        sends: int = 0,
    ) -> Answer:
        """Return `send(filesystem, root path, timeout keywords)`, retried until the deadline. It `sends` so many bytes.

        `bounded` requests are cancelled at the deadline. Others rely on the timeouts of the socket,
        because the time that their bytes need is not known.
        """
        renewed, attempts, operation = False, 0, operation_of(what)

        def attempt(left_s: float) -> Answer:
            nonlocal renewed, attempts
            filesystem, root = self._filesystem()
            limited = bounded and isinstance(filesystem, AsyncFileSystem)
            if attempts:
                self._observer.retried(operation)
            attempts += 1
            began_s = self._retry.clock_s()

            def ended(result: Result) -> None:
                self._observer.attempted(operation, result, self._retry.clock_s() - began_s)

            try:
                with self._guard:
                    answer = send(filesystem, root, {"timeout": left_s} if limited else {})
                self._answered = True
                ended(Result.OK)
                self._observer.wrote(sends)
                self._observer.read(len(answer) if isinstance(answer, bytes) else 0)
                return answer
            except StoreError:
                ended(Result.FAILED)
                raise
            except Exception as error:
                fault = self._fault_of(error)
                ended(_RESULTS.get(fault, Result.FAILED))
                if fault is Fault.DENIED and not renewed and self._renew(filesystem):
                    renewed = True
                    return attempt(left_s)
                raise self._ours(fault, what, error) from error

        return self._retry.call(f"{what} of {self.url}", attempt)

    def _renew(self, refused: Any) -> bool:
        """Whether there is, or is to be, a newer filesystem than the one that was refused.

        Loading credentials takes a processor for a good part of a second. If every refused request of every thread did so,
        an agent would not answer its peers in time.
        """
        built, now_s = self._built, self._retry.clock_s()
        if built is not None and built[1] is not refused:
            return True
        if now_s - self._renewed_s < _RENEW_EVERY_S:
            return False
        self._renewed_s, self._built = now_s, None
        return True

    def _filesystem(self) -> tuple[Any, str]:
        built = self._built
        if built is not None and built[0] != os.getpid():
            _INHERITED.append(built[1])
        if built is None or built[0] != os.getpid():
            try:
                filesystem, root = url_to_fs(self.url, **self._options)
            except (ImportError, ValueError) as error:
                raise ConfigError(
                    f"{self.url} cannot be opened: {error}; expected a URL that fsspec can open"
                ) from error
            except Exception as error:  # some protocols connect and log in here
                raise self._ours(self._fault_of(error), "opening", error) from error
            self._configure(filesystem)
            built = self._built = (os.getpid(), filesystem, root.rstrip("/"))
        return built[1], built[2]

    def _ours(self, fault: Fault, what: str, error: Exception) -> Exception:
        reason = " ".join(str(error).split()) or "no answer"
        text = f"{what} of {self.url}: {reason}"
        match fault:
            case Fault.MISSING:
                return NotFound(text)
            case Fault.BEYOND:
                return BeyondEnd(text)
            case Fault.NO_BUCKET:
                return ConfigError(
                    f"{self.url} names a bucket that does not exist: {reason}; expected an existing one"
                )
            case Fault.SETTINGS if not self._answered:
                return ConfigError(
                    f"{self.url} cannot be reached with these settings: {reason}; "
                    "expected working AWS settings in the environment and in ~/.aws, and the files that they name"
                )
            case Fault.EXISTS:
                return AlreadyExists(text)
            case Fault.DENIED:
                return AccessDenied(
                    f"{text}; check the credentials in the environment of this process"
                )
            case Fault.UNREACHABLE if not (self._patient or self._answered):
                return StoreError(f"{text}; expected a server that answers there")
            case Fault.SETTINGS | Fault.UNREACHABLE | Fault.TRANSIENT:
                return TryAgain(f"{type(error).__name__}: {reason}")
            case Fault.READ_ONLY:
                return ConfigError(
                    f"{text}: this protocol can only be read; expected one that can be written"
                )
            case Fault.FINAL:
                return StoreError(text)
            case Fault.BUG:
                return error
