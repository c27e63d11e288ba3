"""Opens sinks by name and fills them.

tensorboard:DIR    jsonl:FILE    wandb:PROJECT
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from elastic_pt.errors import ConfigError
from elastic_pt.report.history import read_batches
from elastic_pt.report.sinks.feed import Sink, missing_steps
from elastic_pt.report.status import Run
from elastic_pt.runlog.log import record_key
from elastic_pt.runlog.records import Commit, Stop


def _tensorboard(place: str, run_id: str) -> Sink:
    from elastic_pt.report.sinks.tensorboard import TensorBoard  # slow to import

    return TensorBoard(Path(place), run_id)


def _jsonl(place: str, run_id: str) -> Sink:
    from elastic_pt.report.sinks.jsonl import JsonLines

    return JsonLines(Path(place), run_id)


def _wandb(place: str, run_id: str) -> Sink:
    from elastic_pt.report.sinks.wandb import WeightsAndBiases

    return WeightsAndBiases(place, run_id)


_KINDS: Final[dict[str, Callable[[str, str], Sink]]] = {
    "tensorboard": _tensorboard,
    "jsonl": _jsonl,
    "wandb": _wandb,
}
EXPECTED: Final = "tensorboard:DIR, jsonl:FILE or wandb:PROJECT"


def check_name(name: str) -> None:
    """Raise `ConfigError` unless `name` is a sink's name."""
    kind, _, place = name.partition(":")
    if kind not in _KINDS or not place or "\0" in place:
        raise ConfigError(f"--to {name}: expected {EXPECTED}")
    if "://" in place:
        raise ConfigError(f"--to {name}: is a URL; expected a local DIR or FILE, or a PROJECT")


def open_sink(name: str, run_id: str) -> Sink:
    """Open a sink for a run. Raises `ConfigError` if it is another run's, in use, or cannot be written."""
    check_name(name)
    kind, _, place = name.partition(":")
    return _KINDS[kind](place, run_id)


class Copy:
    """Copies new steps of a run to sinks, each time it is called."""

    def __init__(
        self, run: Run, sinks: Sequence[Sink], warn: Callable[[str], None] = lambda _: None
    ) -> None:
        self._run = run
        self._sinks = sinks
        self._warn = warn
        self._told_step = 0
        """The step of the newest COMMIT that was read: what it lacked was warned of."""
        self._next = min((sink.position.record for sink in sinks), default=0)
        self.steps = dict.fromkeys((sink.name for sink in sinks), 0)
        """The number of steps that were written, by the sink's name."""
        self.end: Stop | None = None
        """The end of the run, if the newest record that was read is one."""

    def __call__(self) -> None:
        """Copy what is new. Without news it takes one request."""
        if self._run.store.size(record_key(self._next)) is None:
            return
        records = self._run.log.records(self._next)
        for batch in read_batches(self._run.store, records, self._held_step()):
            held = max(self._held_step(), self._told_step)
            if gap := missing_steps(batch.after(held), held):
                self._warn(gap)
            for sink in self._sinks:
                new = batch.after(sink.position.step)
                if new.lines:
                    sink.write(new)
                    self.steps[sink.name] += len(new.lines)
            body = batch.record.body
            if isinstance(body, Commit):
                self._told_step = body.newest.step
            self.end = body if isinstance(body, Stop) else None
            self._next = batch.record.index + 1
        # Not after each COMMIT: an old run has thousands, and after a power cut a sink resumes where its file ends.
        for sink in self._sinks:
            sink.flush()

    def _held_step(self) -> int:
        """The newest step that all sinks hold."""
        return min((sink.position.step for sink in self._sinks), default=0)
