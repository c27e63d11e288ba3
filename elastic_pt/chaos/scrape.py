"""The counters of a run's agents, scraped while it goes on, as Prometheus would do it. The process of a chaos run.

    status of each member ─► its metrics URL ─► GET on the node's own network ─► Counters: the newest values

A new agent on a node starts at zero, so a value counts for the agent that showed it, and a node's value is the sum.
"""

import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self
from urllib.error import URLError

from elastic_pt.chaos.watched import WatchedRun
from elastic_pt.errors import ElasticPtError

_INTERVAL_S: Final = 0.5
_TIMEOUT_S: Final = 1.0
_STARTED: Final = "process_start_time_seconds"
_PREFIX: Final = "elastic_pt_"
_OWN_LABELS: Final = ("run", "node")


@dataclass
class Counters:
    """The newest values of all counters, by node."""

    scraped_at_s: dict[str, float] = field(default_factory=dict)
    """When the newest scrape of each node began that was answered, as Unix time."""
    _values: dict[tuple[str, float], Mapping[str, float]] = field(default_factory=dict)

    def take(self, node: str, text: str, began_at_s: float) -> None:
        """Note what an agent has answered, in the text format of Prometheus."""
        found, started_s = {}, 0.0
        for line in text.splitlines():
            if line.startswith(_STARTED):
                started_s = float(line.rpartition(" ")[2])
            elif line.startswith(_PREFIX) and "_total" in line:
                sample, _, value = line.rpartition(" ")
                found[_without_own_labels(sample)] = float(value)
        self._values[node, started_s] = found
        self.scraped_at_s[node] = began_at_s

    def total(self, sample: str, node: str = "") -> float:
        """The sum of a sample such as `elastic_pt_changes_total{cause="lost"}`, of one node or of all.

        A name without labels is the sum over all of them.
        """
        return sum(
            value
            for (name, _), values in self._values.items()
            for found, value in values.items()
            if node in ("", name) and (found == sample or found.startswith(f"{sample}{{"))
        )


def _without_own_labels(sample: str) -> str:
    name, _, labels = sample.rstrip("}").partition("{")
    kept = [
        label
        for label in labels.split('",')
        if label and label.partition("=")[0] not in _OWN_LABELS
    ]
    return (
        f"{name}{{{','.join(each.rstrip(chr(34)) + chr(34) for each in kept)}}}" if kept else name
    )


class Scraper:
    """A context manager: scrapes all members in a thread of its own until it is left."""

    def __init__(self, run: WatchedRun, on: Callable[[str], AbstractContextManager[None]]) -> None:
        """`run` is for this thread alone. `on(node)` puts the thread on a node's network."""
        self.counters = Counters()
        self._run = run
        self._on = on
        self._urls: dict[str, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._scrape, name="scraper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        # A store that does not answer may hold the thread; it ends with this process.
        self._thread.join(_TIMEOUT_S)

    def _scrape(self) -> None:
        while not self._over.wait(_INTERVAL_S):
            try:
                members = self._members()
                if not members <= self._urls.keys():
                    self._urls |= {
                        each.member.node: each.metrics_url for each in self._run.statuses()
                    }
            except ElasticPtError:
                members = set(self._urls)
            for node in sorted(members & self._urls.keys()):
                self._ask(node)

    def _members(self) -> set[str]:
        generation = self._run.view().generation
        return set() if generation is None else {each.node for each in generation.members}

    def _ask(self, node: str) -> None:
        began_at_s = time.time()
        try:
            with (
                self._on(node),
                urllib.request.urlopen(self._urls[node], timeout=_TIMEOUT_S) as answer,
            ):
                text = answer.read().decode()
        except (URLError, OSError, ValueError):
            # It may have ended, and another agent of this node has another port.
            del self._urls[node]
            return
        self.counters.take(node, text, began_at_s)
