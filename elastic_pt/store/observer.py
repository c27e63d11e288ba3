"""A port for those who count requests. The store itself counts nothing."""

from enum import StrEnum
from typing import Protocol


class Operation(StrEnum):
    """What a request does."""

    READ = "read"
    CREATE = "create"
    WRITE = "write"
    SIZE = "size"
    LIST = "list"
    DELETE = "delete"
    OTHER = "other"


class Result(StrEnum):
    """How an attempt ended."""

    OK = "ok"
    MISSING = "missing"
    """No object has the key, which is an answer."""
    EXISTS = "exists"
    """Another writer was first, which is an answer."""
    DENIED = "denied"
    TRANSIENT = "transient"
    """Another attempt may succeed."""
    FAILED = "failed"


class Observer(Protocol):
    """Learns of requests, in the threads that make them. Must return at once, and never raise."""

    def attempted(self, operation: Operation, result: Result, seconds: float) -> None:
        """One attempt of a request has ended."""

    def retried(self, operation: Operation) -> None:
        """A request failed and is tried again."""

    def read(self, size: int) -> None:
        """So many bytes were read."""

    def wrote(self, size: int) -> None:
        """So many bytes were written."""


class NoObserver:
    """Counts nothing."""

    def attempted(self, operation: Operation, result: Result, seconds: float) -> None:
        """Nothing."""

    def retried(self, operation: Operation) -> None:
        """Nothing."""

    def read(self, size: int) -> None:
        """Nothing."""

    def wrote(self, size: int) -> None:
        """Nothing."""


_OPERATIONS = {
    "reading": Operation.READ,
    "creating": Operation.CREATE,
    "writing": Operation.WRITE,
    "measuring": Operation.SIZE,
    "listing": Operation.LIST,
    "deleting": Operation.DELETE,
}


def operation_of(what: str) -> Operation:
    """The operation of a request by its words, such as `reading log/1.json`."""
    return _OPERATIONS.get(what.partition(" ")[0], Operation.OTHER)
