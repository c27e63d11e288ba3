"""Counts the requests to a store. Agent process."""

from elastic_pt.store.observer import Operation, Result
from elastic_pt.telemetry.catalogue import Metrics


class CountRequests:
    """A `store.observer.Observer`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def attempted(self, operation: Operation, result: Result, seconds: float) -> None:
        """See `Observer.attempted`."""
        self._metrics.store_requests.labels(operation, result).inc()
        self._metrics.store_request_seconds.labels(operation).observe(seconds)

    def retried(self, operation: Operation) -> None:
        """See `Observer.retried`."""
        self._metrics.store_retries.labels(operation).inc()

    def read(self, size: int) -> None:
        """See `Observer.read`."""
        self._metrics.store_bytes.labels("read").inc(size)

    def wrote(self, size: int) -> None:
        """See `Observer.wrote`."""
        self._metrics.store_bytes.labels("written").inc(size)
