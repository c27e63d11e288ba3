"""Open the `Store` of a URL. Only this module knows which class serves which protocol."""

import importlib.util

from fsspec.registry import available_protocols, get_filesystem_class

from elastic_pt.errors import ConfigError
from elastic_pt.store.fsspec_store import FsspecStore
from elastic_pt.store.local import LocalStore
from elastic_pt.store.observer import Observer
from elastic_pt.store.port import Store
from elastic_pt.store.retry import Retry
from elastic_pt.store.s3 import S3Store

# protocol -> (module that serves it, extra of this package that installs the module)
_EXTRAS = {
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "abfs": ("adlfs", "azure"),
    "abfss": ("adlfs", "azure"),
    "az": ("adlfs", "azure"),
    "adl": ("adlfs", "azure"),
}


def open_store(
    url: str, *, timeout_s: float = 120.0, patient: bool = True, observer: Observer | None = None
) -> Store:
    """The store below `url`: file, memory, s3, gs, abfs or any other fsspec protocol. A plain path is a file.

    Does not connect: the first request of each process does. Each request is retried for `timeout_s`.
    Unless `patient`, a refused connection or an unknown host raises `StoreError` at once, until the server
    has answered once. `observer` learns of each request. Raises `ConfigError` for a URL that cannot work and for a missing extra.
    """
    protocol, separator, rest = url.partition("://")
    rest = rest.rstrip("/")
    if not separator and not url.startswith("/"):
        raise ConfigError(f"{url!r} is not a URL; expected s3://bucket/run or /absolute/path")
    if not separator or protocol in ("file", "local"):
        return LocalStore(
            f"file://{rest}" if separator else f"file://{url.rstrip('/')}", observer=observer
        )
    retry = Retry(timeout_s)
    if protocol in ("s3", "s3a"):
        return S3Store(f"s3://{rest}", retry=retry, patient=patient, observer=observer)
    _require_protocol(url, protocol)
    return FsspecStore(f"{protocol}://{rest}", retry=retry, patient=patient, observer=observer)


def _require_protocol(url: str, protocol: str) -> None:
    if protocol not in available_protocols():
        raise ConfigError(f"{url}: {protocol}:// is unknown; expected file, memory, s3, gs or abfs")
    module, extra = _EXTRAS.get(protocol, ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"{url}: {protocol}:// needs the module {module}; expected `pip install 'elastic-pt[{extra}]'`"
        )
    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{url}: {protocol}:// needs a module that is missing: {reason}; expected it to be installed"
        ) from error
