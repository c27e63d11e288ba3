"""The registry that an agent serves: its metrics, each sample with the labels of the agent.

The labels are in the exposition itself, so `{run=~"$run", node=~"$node"}` selects the same series whatever finds and
scrapes the agents.
"""

import threading
from collections.abc import Callable, Iterable, Mapping

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

log = structlog.get_logger("elastic_pt.telemetry.exposition")


class Labelled(Collector):
    """Collects what other collectors have, and adds the same labels to each sample."""

    def __init__(
        self,
        collectors: Iterable[Collector],
        labels: Mapping[str, str],
        refresh: Iterable[Callable[[], None]],
    ) -> None:
        """Each of `refresh` is called before a scrape; if one raises, the scrape goes on without its new values."""
        self._collectors = collectors
        self._labels = dict(labels)
        self._refresh = refresh
        self._told = ""
        self._lock = threading.Lock()
        """Held while values are set and read: the values of a scrape are of one moment, and what is new counts once."""

    def collect(self) -> Iterable[Metric]:
        """Every family, without the `_created` series: they double the size, and nothing here uses them."""
        with self._lock:
            for refresh in self._refresh:
                # Any error: a scrape must not fail because one value cannot be had.
                try:
                    refresh()
                except Exception as error:
                    if repr(error) != self._told:
                        self._told = repr(error)
                        log.warning("metric_not_refreshed", cause=self._told)
            families = [family for collector in self._collectors for family in collector.collect()]
        for family in families:
            family.samples = [
                Sample(each.name, self._labels | each.labels, each.value)
                for each in family.samples
                if not each.name.endswith("_created")
            ]
            yield family


def labelled_registry(collector: Labelled) -> CollectorRegistry:
    """A registry with this collector alone."""
    registry = CollectorRegistry(support_collectors_without_names=True)
    registry.register(collector)
    return registry
