"""A bucket that counts its requests, and that a test can make fail."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from elastic_pt.errors import StoreError
from elastic_pt.store.port import Source, Store


@dataclass
class WatchedStore:
    """A store that counts requests by operation and kind of key, and answers none while `down`."""

    store: Store
    down: bool = False
    deaf_to: str = ""
    """Operations that succeed, but without an answer."""
    requests: Counter[str] = field(default_factory=Counter)

    @property
    def url(self) -> str:
        """The store's URL."""
        return self.store.url

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """See `Store`."""
        return self._ask("read", key, start, end)  # type: ignore[no-any-return]

    def create(self, key: str, data: bytes) -> None:
        """See `Store`."""
        self._ask("create", key, data)

    def write(self, key: str, source: Source) -> None:
        """See `Store`."""
        self._ask("write", key, source)

    def size(self, key: str) -> int | None:
        """See `Store`."""
        return self._ask("size", key)  # type: ignore[no-any-return]

    def keys(self, prefix: str) -> list[str]:
        """See `Store`."""
        return self._ask("keys", prefix)  # type: ignore[no-any-return]

    def delete(self, key: str) -> None:
        """See `Store`."""
        self._ask("delete", key)

    def _ask(self, verb: str, key: str, *arguments: Any) -> Any:
        self.requests[f"{verb} {key.partition('/')[0]}"] += 1
        if self.down:
            raise StoreError("the bucket does not answer")
        answer = getattr(self.store, verb)(key, *arguments)
        if verb == self.deaf_to:
            raise StoreError("the bucket's answer was lost")
        return answer
