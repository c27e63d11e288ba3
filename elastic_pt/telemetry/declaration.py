"""How a metric is declared: a class attribute whose name is the metric's name.

    class Metrics:
        steps = counter("Steps that ...", by=By.RUN)        # elastic_pt_steps_total
        loss = gauge("Mean ...", unit="nats", by=By.RUN)    # elastic_pt_loss

On the class, `Metrics.steps` is the declaration. On an object, it is prometheus-client's own counter, gauge or histogram.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Generic, Literal, Self, TypeVar, cast, overload

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric

PREFIX = "elastic_pt_"

Kind = Literal["counter", "gauge", "histogram"]


class By(StrEnum):
    """Who counts a metric, and so how the values of several nodes are put together."""

    NODE = "each node, for itself"
    """Add them up, or show them by node."""
    RUN = "each node, for the run"
    """The same on all nodes that take part: `max by (run)`."""
    APPENDER = "the node that appended the record"
    """Exactly one node counts each event: `sum by (run)`."""


class GaugeOnceSet(Gauge):
    """A gauge without labels that has no series before its first value, because 0 would be wrong, and none once forgotten."""

    is_set = False

    def set(self, value: float) -> None:
        """Set the value; the series appears."""
        super().set(value)
        self.is_set = True

    def forget(self) -> None:
        """What it measured exists no more: the series disappears."""
        self.is_set = False

    def collect(self) -> Iterable[Metric]:
        """The family, without a sample unless a value is known."""
        families = list(super().collect())
        if not self.is_set:
            for family in families:
                family.samples = []
        return families


Collector = TypeVar("Collector", Counter, Gauge, GaugeOnceSet, Histogram)


class Declaration(Generic[Collector]):
    """One metric of the catalogue."""

    def __init__(
        self,
        kind: Kind,
        text: str,
        *,
        labels: tuple[str, ...],
        unit: str,
        by: By,
        buckets: tuple[float, ...] = (),
    ) -> None:
        """`text` is the help: one sentence. Names of counters get `_total`."""
        self.kind = kind
        self.text = text
        self.labels = labels
        self.unit = unit
        self.by = by
        self.buckets = buckets
        self.name = ""
        """The attribute's name, which is the metric's without prefix and `_total`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, metrics: None, owner: type) -> Self: ...

    @overload
    def __get__(self, metrics: object, owner: type) -> Collector: ...

    def __get__(self, metrics: object | None, owner: type) -> "Self | Collector":
        # An object has its collector under the same name, so this is called for the class alone.
        assert metrics is None
        return self

    @property
    def exposed_name(self) -> str:
        """The name for Prometheus. A histogram has series with `_bucket`, `_sum` and `_count` behind it."""
        return f"{PREFIX}{self.name}" + ("_total" if self.kind == "counter" else "")

    def build(self, registry: CollectorRegistry | None) -> Collector:
        """A new collector of this metric, registered if there is a registry."""
        name = f"{PREFIX}{self.name}"
        built: Counter | Gauge | Histogram
        match self.kind:
            case "counter":
                built = Counter(name, self.text, self.labels, registry=registry)
            case "gauge":
                gauge = Gauge if self.labels else GaugeOnceSet
                built = gauge(name, self.text, self.labels, registry=registry)
            case "histogram":
                built = Histogram(
                    name, self.text, self.labels, buckets=self.buckets, registry=registry
                )
        return cast("Collector", built)


def counter(text: str, *labels: str, unit: str = "", by: By = By.NODE) -> Declaration[Counter]:
    """Declare a counter."""
    return Declaration("counter", text, labels=labels, unit=unit, by=by)


def gauge(text: str, *, unit: str = "", by: By = By.NODE) -> Declaration[GaugeOnceSet]:
    """Declare a gauge that has no series before its first value."""
    return Declaration("gauge", text, labels=(), unit=unit, by=by)


def gauges(text: str, *labels: str, unit: str = "", by: By = By.NODE) -> Declaration[Gauge]:
    """Declare a gauge with labels."""
    return Declaration("gauge", text, labels=labels, unit=unit, by=by)


def histogram(
    text: str, *labels: str, unit: str = "seconds", by: By = By.NODE, buckets: tuple[float, ...]
) -> Declaration[Histogram]:
    """Declare a histogram."""
    return Declaration("histogram", text, labels=labels, unit=unit, by=by, buckets=buckets)
