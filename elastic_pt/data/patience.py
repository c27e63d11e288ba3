"""Waits for data that cannot be read now: a file that is missing, a file system that is away, a bucket that lacks an object.

A passing absence ends nothing. After the limit, or when the reader is closed, the error names the file.
Runs in workers and in the command line's process. Safe to share between threads.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

from elastic_pt.data.manifest import MANIFEST_KEY, REMEDY, Manifest
from elastic_pt.errors import NotFound, StoreError
from elastic_pt.store.port import Store
from elastic_pt.store.retry import Retry, TryAgain

Result = TypeVar("Result")


class Patience:
    """How long a reader waits for one file."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s: Final = timeout_s
        self.closed: Final[Future[None]] = Future()
        """Done when the reader is closed: nobody needs what is still waited for."""

    def read(self, name: str, read: Callable[[], Result]) -> Result:
        """The result of a read. While it raises `OSError` or `NotFound`, waits and reads again.

        Raises `StoreError` with the name of the file after `timeout_s`, or when the reader is closed.
        """

        def attempt(left_s: float) -> Result:
            if self.closed.done():
                raise StoreError(f"{name}: the reader was closed")
            try:
                return read()
            except OSError as error:
                raise TryAgain(error.strerror or str(error)) from error
            except NotFound as error:
                raise TryAgain(f"missing; {REMEDY}") from error

        try:
            # Without the cost of `Retry`, which is that of hashing a block.
            return attempt(0.0)
        except TryAgain as trouble:
            if not self.timeout_s:
                raise StoreError(f"{name}: {trouble}") from trouble.__cause__
            return Retry(self.timeout_s).call(name, attempt)

    def close(self) -> None:
        """End what is waited for, at its next attempt."""
        if not self.closed.done():
            self.closed.set_result(None)


def await_manifest(store: Store, timeout_s: float) -> Manifest:
    """The manifest of prepared data that was there before: while it is missing, it is waited for.

    Raises `StoreError` after `timeout_s`, and `DataError` for one that cannot be used.
    """
    name = f"{store.url}/{MANIFEST_KEY}"
    content = Patience(timeout_s).read(name, lambda: store.read(MANIFEST_KEY))
    return Manifest.from_json(content, origin=name)
