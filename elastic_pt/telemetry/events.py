"""Structured events: JSON for machines, readable for people, with where they happened and without secrets.

    log.info(...) ─► level, time, run, generation, node, rank, step ─► no secrets ─► sinks ─► standard error
                                                                                      ├─ EventSink (shipping)  the bucket
                                                                                      ├─ LogFile (log_file)    a local file
                                                                                      └─ Webhook (webhook)     a person

`configure_events` belongs to the composition roots. A sink never blocks and never raises: no event ends a run.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import structlog
from structlog.typing import EventDict

from elastic_pt.telemetry.redaction import Redactor

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_EVENT_COLUMNS: Final = 24
_FIRST: Final = ("timestamp", "level", "event")
_BELOW: Final = ("exception", "traceback", "stacks")

LogFormat = Literal["auto", "json", "text"]


class Sink(Protocol):
    """Where events go besides standard error."""

    def take(self, event: Mapping[str, Any]) -> None:
        """Keep one event, of JSON's types only and without secrets. Never blocks, never raises."""


@dataclass
class EventContext:
    """Where a process's events happen: bound to each of them. One per process, of its composition root."""

    node: str
    run: str = ""
    """The run's URL without credentials."""
    rank: int | None = None
    """Of a worker."""
    changing: Callable[[], Mapping[str, Any]] = dict
    """The newest `generation` and `step`; 0 if there is none yet. Called for each event, on any thread: it must not block."""

    def fields(self) -> dict[str, Any]:
        """The fields for one event; those that are not known yet are left out."""
        fields: dict[str, Any] = {"run": self.run} if self.run else {}
        fields |= {"node": self.node}
        fields |= {} if self.rank is None else {"rank": self.rank}
        return fields | {name: value for name, value in self.changing().items() if value}


@dataclass(frozen=True)
class EventOutput:
    """What leaves the process."""

    level: str = "info"
    """The lowest level that is written."""
    log_format: LogFormat = "auto"
    """On standard error: `auto` is `text` on a terminal and `json` elsewhere."""
    redactor: Redactor = field(default_factory=Redactor)
    sinks: tuple[Sink, ...] = ()
    standard_error: bool = True
    """False at the end of an agent: the command line prints the same there, as one line."""


def configure_events(context: EventContext, output: EventOutput) -> None:
    """From now on, every event of this process goes to standard error and to the sinks."""

    def bind(_: Any, __: str, event: EventDict) -> EventDict:
        first = {name: event[name] for name in _FIRST if name in event}
        # The event's own fields win: they may be of another generation or step.
        return {**first, **context.fields(), **event}

    def clean(_: Any, __: str, event: EventDict) -> EventDict:
        cleaned: EventDict = output.redactor.clean(event)
        return cleaned

    def to_sinks(_: Any, __: str, event: EventDict) -> EventDict:
        for sink in output.sinks:
            sink.take(event)
        if not output.standard_error:
            raise structlog.DropEvent
        return event

    text = output.log_format == "text" or (output.log_format == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            bind,
            clean,
            to_sinks,
            *(_text_renderer() if text else [structlog.processors.JSONRenderer(default=str)]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[output.level]),
        logger_factory=_StandardError,
        cache_logger_on_first_use=False,
    )


def _text_renderer() -> list[structlog.typing.Processor]:
    """Short lines for people: the run is the same in all of them. Tracebacks below, without the values of variables."""

    def for_people(_: Any, __: str, event: EventDict) -> EventDict:
        below = [event[name] for name in _BELOW if event.get(name)]
        short = {name: event[name] for name in event if name not in ("run", *_BELOW)}
        return short | ({"exception": "\n".join(below)} if below else {})

    console = structlog.dev.ConsoleRenderer(
        _EVENT_COLUMNS,
        colors=sys.stderr.isatty(),
        sort_keys=False,
        exception_formatter=structlog.dev.plain_traceback,
    )
    return [for_people, console]


class _StandardError:
    """Prints lines. If nobody reads them any more, or the disk behind them is full, they are lost and the run goes on."""

    def __init__(self, *_: Any) -> None:
        self._print = structlog.WriteLogger(sys.stderr)

    def msg(self, message: str) -> None:
        with suppress(OSError, ValueError):
            self._print.msg(message)

    debug = info = warning = error = critical = exception = log = msg
