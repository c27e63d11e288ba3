"""While a simulation runs, nothing in the production code takes time or chance from outside it."""

import datetime
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from elastic_pt.agent import checkpointing
from elastic_pt.membership import appender, lobby, node, participant, pulse
from elastic_pt.membership.decision import budgets
from elastic_pt.runlog import log
from elastic_pt.runlog.records import Checkpoint, Record
from elastic_pt.store import retry, s3
from elastic_pt.store.port import Store
from tests.sim.bucket import run_here

_LOGGING = (lobby, participant, appender, pulse, node, retry)

Trace = Callable[[str, dict[str, Any]], None]


class _Logger:
    """Stands in for a structlog logger: hands events on, or drops them."""

    def __init__(self, trace: Trace | None) -> None:
        self._trace = trace

    def _event(self, event: str, **fields: Any) -> None:
        if self._trace is not None:
            self._trace(event, fields)

    debug = info = warning = error = _event


class _Records:
    """Reading a record costs much and is a pure function of its bytes: done once for all agents."""

    def __init__(self) -> None:
        self._read = Record.from_bytes
        self._known: dict[bytes, Record] = {}

    def from_bytes(self, data: bytes, *, key: str) -> Record:
        found = self._known.get(data)
        if found is None:
            found = self._known[data] = self._read(data, key=key)
        return found


def _check_sizes(store: Store, checkpoint: Checkpoint, _: str) -> None:
    """Stands in for `quick_check`, which reads records and uses threads: two requests, and no files here are damaged."""
    for name in ("manifest.json", "shards"):
        store.size(f"{checkpoint.directory}/{name}")


@contextmanager
def hermetic(
    token_hex: Callable[[int], str],
    wall_clock_s: Callable[[], float],
    trace: Trace | None,
) -> Iterator[None]:
    """Replace random names, the time of day, threads of fsspec and logging while a simulation runs."""
    clock = SimpleNamespace(
        UTC=datetime.UTC,
        datetime=SimpleNamespace(
            now=lambda zone: (
                datetime.datetime(2030, 1, 1, tzinfo=zone)
                + datetime.timedelta(seconds=wall_clock_s())
            )
        ),
    )
    with ExitStack() as stack:
        stack.enter_context(patch.object(log, "secrets", SimpleNamespace(token_hex=token_hex)))
        stack.enter_context(patch.object(log, "datetime", clock))
        stack.enter_context(patch.object(s3, "sync", run_here))
        stack.enter_context(patch.object(Record, "from_bytes", _Records().from_bytes))
        stack.enter_context(patch.object(checkpointing, "quick_check", _check_sizes))
        logger = _Logger(trace)
        for module in _LOGGING:
            stack.enter_context(patch.object(module, "log", logger))
        assert not hasattr(budgets, "log")
        yield
