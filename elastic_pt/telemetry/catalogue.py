"""Every metric, declared once. The agent owns the registry, so counters survive the workers.

Names follow Prometheus: prefix, base units, `_total` for counters. Dashboards are tested against this file.
"""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from elastic_pt.telemetry.goodput import Activity


class Metrics:
    """The metrics of one node's agent."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._accounted: dict[Activity, float] = {}
        self.steps = self._counter(
            "steps", "Optimizer steps that the workers of this node took, recomputed ones included."
        )
        self.steps_skipped = self._counter(
            "steps_skipped", "Steps without an update because loss or gradient was not finite."
        )
        self.tokens = self._counter(
            "tokens", "Tokens of the whole world's steps that this node took part in."
        )
        self.step_seconds = Histogram(
            "elastic_pt_step_seconds",
            "Wall time of one step.",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            registry=self.registry,
        )
        self.data_wait_seconds = self._counter(
            "data_wait_seconds", "Time that steps waited for their batch."
        )
        self.step = self._gauge("step", "Steps done.")
        self.loss = self._gauge("loss", "Mean cross-entropy per token of the last step, in nats.")
        self.gradient_norm = self._gauge(
            "gradient_norm", "Global gradient norm of the last step, before clipping."
        )
        self.learning_rate = self._gauge("learning_rate", "Learning rate of the last step.")
        self.world_size = self._gauge("world_size", "Workers of the newest generation.")
        self.nodes = self._gauge("nodes", "Nodes of the newest generation.")
        self.generation = self._gauge("generation", "Number of the newest generation.")
        self.generations = self._counter("generations", "Generations that this node took part in.")
        self.worker_failures = self._counter(
            "worker_failures", "Workers of this node that failed.", "cause"
        )
        self.snapshot_seconds = self._gauge(
            "snapshot_seconds", "Time that the last snapshot blocked this node's workers."
        )
        self.snapshot_skips = self._counter(
            "snapshot_skips",
            "Times that this node's workers had no room for snapshots, or a mirror had no room or took too long for one.",
        )
        self.checkpoint_stage_seconds = self._gauge(
            "checkpoint_stage_seconds", "Time that the last checkpoint blocked this node's workers."
        )
        self.checkpoint_commits = self._counter(
            "checkpoint_commits", "Checkpoints that this node committed."
        )
        self.checkpoint_failures = self._counter(
            "checkpoint_failures", "Checkpoints that could not be uploaded or committed."
        )
        self.checkpoint_skips = self._counter(
            "checkpoint_skips",
            "Shards that had no room in memory, and uploads that a newer checkpoint replaced.",
        )
        self.checkpoint_tidy_failures = self._counter(
            "checkpoint_tidy_failures",
            "Times that expired checkpoints could not be removed; a later commit retries.",
        )
        self.checkpoint_committed_step = self._gauge(
            "checkpoint_committed_step", "Step of the newest committed checkpoint."
        )
        self.checkpoint_commit_timestamp = self._gauge(
            "checkpoint_commit_timestamp_seconds",
            "When this node last saw a checkpoint committed, as Unix time.",
        )
        self.notices = self._counter(
            "notices",
            "Notices that this node received.",
            "source",
            "kind",
        )
        self.notice_lead_seconds = self._gauge(
            "notice_lead_seconds", "Lead of the last notice that made this node leave."
        )
        self.notice_source_up = self._gauge(
            "notice_source_up", "Whether a source of notices answers: 1 or 0.", "source"
        )
        self.time_seconds = self._counter(
            "time_seconds",
            "Time of this node by state; the states add up to the total.",
            "state",
        )

    def step_done(self, message: Mapping[str, Any]) -> None:
        """Count one step from a worker's report."""
        self.steps.inc()
        self.steps_skipped.inc(bool(message["skipped"]))
        self.tokens.inc(message["tokens"])
        self.step_seconds.observe(message["seconds"])
        self.data_wait_seconds.inc(message["data_wait_s"])
        self.step.set(message["step"])
        self.learning_rate.set(message["learning_rate"])
        for gauge, name in ((self.loss, "loss"), (self.gradient_norm, "gradient_norm")):
            value = message[name]
            gauge.set(float("nan") if value is None else value)

    def account(self, seconds: Mapping[Activity, float]) -> None:
        """Raise the time counters to the goodput ledger's sums."""
        for state, total_s in seconds.items():
            self.time_seconds.labels(state).inc(total_s - self._accounted.get(state, 0.0))
            self._accounted[state] = total_s

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"elastic_pt_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"elastic_pt_{name}", text, labels, registry=self.registry)
