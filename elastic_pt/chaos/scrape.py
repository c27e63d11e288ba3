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
from functools import lru_cache
from types import TracebackType
from typing import Final, Self
from urllib.error import URLError

from elastic_pt.chaos.watched import WatchedRun
from elastic_pt.errors import ElasticPtError

_INTERVAL_S: Final = 0.5
_TIMEOUT_S: Final = 1.0
_STARTED: Final = "process_start_time_seconds"
_PREFIX: Final = "elastic_pt_"
_SAMPLES_KEPT: Final = 8192
_BUCKET: Final = "_bucket{"
_OWN_LABELS: Final = ("run=", "node=")


@dataclass(frozen=True)
class _Sample:
    """A name with labels, other than those of run and node."""

    name: str
    labels: frozenset[str]
    """Each as `name="value"`."""

    def has(self, part: "_Sample") -> bool:
        """Whether it is the sample that `part` names, which may leave labels out."""
        return self.name == part.name and part.labels <= self.labels


@lru_cache(_SAMPLES_KEPT)
def _sample_of(text: str) -> _Sample:
    """From the text format of Prometheus. The same ones come again and again."""
    name, _, labels = text.rstrip("}").partition("{")
    found = (f'{each.rstrip(chr(34))}"' for each in labels.split('",') if each)
    return _Sample(name, frozenset(each for each in found if not each.startswith(_OWN_LABELS)))


@dataclass
class Counters:
    """The newest values of all counters and histograms, by node."""

    scraped_at_s: dict[str, float] = field(default_factory=dict)
    """When the newest scrape of each node began that was answered, as Unix time."""
    _values: dict[tuple[str, float], Mapping[_Sample, float]] = field(default_factory=dict)
    """By node and the start of its agent."""
    _rose_at_s: dict[tuple[str, _Sample], float] = field(default_factory=dict)

    def take(self, node: str, text: str, began_at_s: float) -> None:
        """Note what an agent has answered, in the text format of Prometheus."""
        found: dict[_Sample, float] = {}
        started_s = 0.0
        for line in text.splitlines():
            if line.startswith(_STARTED):
                started_s = float(line.rpartition(" ")[2])
            elif line.startswith(_PREFIX) and ("_total" in line or _BUCKET in line):
                sample, _, value = line.rpartition(" ")
                found[_sample_of(sample)] = float(value)
        found |= _above(found)
        before = self._values.get((node, started_s), {})
        for each, count in found.items():
            if count > before.get(each, 0.0):
                self._rose_at_s[node, each] = began_at_s
        self._values[node, started_s] = found
        self.scraped_at_s[node] = began_at_s

    def total(self, sample: str, node: str = "") -> float:
        """The sum of a sample such as `elastic_pt_changes_total{cause="lost"}`, of one node or of all.

        It is the sum over all labels that it leaves out.
        """
        part = _sample_of(sample)
        return sum(
            value
            for (name, _), values in self._values.items()
            for found, value in values.items()
            if node in ("", name) and found.has(part)
        )

    def rose_at_s(self, sample: str, node: str) -> float:
        """When the newest scrape began that found a sample of a node higher than the one before, as Unix time; 0: never."""
        part = _sample_of(sample)
        times = (
            at_s
            for (name, each), at_s in self._rose_at_s.items()
            if name == node and each.has(part)
        )
        return max(times, default=0.0)


def _above(found: Mapping[_Sample, float]) -> dict[_Sample, float]:
    """For each bucket of a histogram, as `name{above="0.1"}`: how many values were above its bound."""
    above = {}
    for each, value in found.items():
        bound = next((label for label in each.labels if label.startswith("le=")), None)
        if bound is not None:
            rest = each.labels - {bound}
            name = each.name.removesuffix("_bucket")
            count = found.get(_Sample(each.name, rest | {'le="+Inf"'}), value)
            above[_Sample(name, rest | {bound.replace("le=", "above=")})] = count - value
    return above


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
