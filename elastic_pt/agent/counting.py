"""What of an agent becomes metrics, apart from its workers' messages (`observation`). Agent process.

records that this node appends ─► CountRecords
log, peers, uploads            ─► ReadAtScrape, when somebody asks
events that were lost          ─► Follow, when somebody asks
configuration                  ─► `metrics_of`, `describe`
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from prometheus_client import Counter

import elastic_pt
from elastic_pt.agent.events import Events
from elastic_pt.config import Config
from elastic_pt.data.loader import LateCause
from elastic_pt.membership.decision.at_risk import at_risk
from elastic_pt.membership.decision.status import MESH_NODES_MAX
from elastic_pt.membership.node import Node
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import (
    Body,
    Cause,
    CauseKind,
    Generation,
    Quarantine,
    Recovery,
)
from elastic_pt.store.observer import Operation, Result
from elastic_pt.telemetry.catalogue import Metrics, tell
from elastic_pt.telemetry.flops import ModelFlops, flops_per_token, peak_flops_of
from elastic_pt.telemetry.redaction import without_credentials
from elastic_pt.workers.failure import FailureCause
from elastic_pt.workers.heartbeat import WorkerPhase

_START: Final = "start"
"""Stands for the cause of a generation without one: the first, and those after a pause."""
_ALL_LOST: Final = "all_lost"
"""Stands for the cause that nobody knows, because no member of the generation before was left."""


def metrics_of(config: Config, node: str) -> Metrics:
    """The metrics of this node, with what the configuration says."""
    metrics = Metrics(
        without_credentials(config.run.url),
        node,
        price_per_hour=config.telemetry.price_per_hour,
    )
    start_at_zero(metrics)
    metrics.steps_planned.set(config.train.steps)
    metrics.nodes_min.set(config.elastic.nodes_min)
    metrics.nodes_max.set(config.elastic.nodes_max)
    metrics.checkpoint_every_steps.set(config.checkpoint.every_steps)
    return metrics


def start_at_zero(metrics: Metrics) -> None:
    """Create the series of every event that may come, at 0: `increase()` never sees the first value of a new series.

    Notices, GPUs and sources of data start with those who know them.
    """
    causes = [label_of(each) for each in CauseKind]
    for cause in (*causes, _ALL_LOST):
        metrics.changes.labels(cause)
    for cause in (_START, *causes):
        metrics.recovery_seconds.labels(cause)
    for late in LateCause:
        metrics.data_wait_seconds.labels(late)
    for failure in FailureCause:
        metrics.worker_failures.labels(failure)
    for what in ("node", "checkpoint"):
        metrics.quarantines.labels(what)
    for operation in Operation:
        metrics.store_retries.labels(operation)
        for result in Result:
            metrics.store_requests.labels(operation, result)
    for direction in ("read", "written"):
        metrics.store_bytes.labels(direction)


def flops_of(config: Config, vocabulary: int, gpu: str = "") -> ModelFlops | None:
    """The model's FLOPs and the peak of a device; None if the peak is unknown. `gpu` is the name of this node's GPUs."""
    on_gpu = device_of(config) == "cuda"
    peak_flops = config.telemetry.peak_flops or (peak_flops_of(gpu) if on_gpu else None)
    if not peak_flops:
        return None
    per_token = flops_per_token(config.model, vocabulary, config.data.sequence_length)
    return ModelFlops(per_token, peak_flops)


def device_of(config: Config) -> str:
    """Where this node trains."""
    if config.train.device != "auto":
        return config.train.device
    # It asks the driver only: no CUDA context.
    return "cuda" if torch.cuda.device_count() else "cpu"


def describe(metrics: Metrics, config: Config, view: RunView) -> None:
    """Set what the log says, at the start of a generation. A node that is new has seen no commit itself."""
    if view.commit is not None:
        metrics.committed(view.committed_step, view.committed_at_s)
    tell(
        metrics.run_info,
        view.run_id,
        elastic_pt.__version__,
        torch.__version__,
        device_of(config),
        config.train.numerics,
    )


def count_workers(metrics: Metrics, phases: Sequence[WorkerPhase]) -> None:
    """Show how many workers are in each phase."""
    for phase in WorkerPhase:
        metrics.workers.labels(phase.name.lower()).set(phases.count(phase))


def main_cause(causes: Sequence[Cause]) -> str:
    """The cause that a recovery is counted under: a loss before a failure before a planned change."""
    order = list(CauseKind)
    first = min(causes, key=lambda each: order.index(each.kind), default=None)
    return _START if first is None else label_of(first.kind)


def label_of(kind: CauseKind) -> str:
    """The kind of a cause as a label's value."""
    return kind.replace(" ", "_")


class CountRecords:
    """Counts what happened to the run, by the records that this node appends (a `runlog.log.AppendListener`)."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def appended(self, body: Body, view: RunView) -> None:
        """See `AppendListener.appended`. Commits are counted by `agent.checkpointing`."""
        match body:
            case Generation():
                for cause in body.causes:
                    self._metrics.changes.labels(label_of(cause.kind)).inc()
                before = view.generations[-2:-1]
                if before and body.follows_the_loss_of_all(before[0]):
                    self._metrics.changes.labels(_ALL_LOST).inc()
                self._metrics.lost_steps.inc(body.lost_steps)
            case Recovery():
                causes = () if view.generation is None else view.generation.causes
                self._metrics.recovery_seconds.labels(main_cause(causes)).observe(body.total_s)
            case Quarantine(node=node) if node:
                self._metrics.quarantines.labels("node").inc()
            case Quarantine():
                self._metrics.quarantines.labels("checkpoint").inc()
                self._metrics.verify_failures.inc()

    def fenced(self) -> None:
        """See `AppendListener.fenced`."""
        self._metrics.fenced.inc()


class Follow:
    """Raises a counter to a total that another part counts."""

    def __init__(self, counter: Counter, total: Callable[[], int]) -> None:
        """`total()` never falls."""
        self._counter = counter
        self._total = total
        self._counted = 0

    def __call__(self) -> None:
        """Thread of a scrape."""
        total = self._total()
        self._counter.inc(total - self._counted)
        self._counted = total


def count_lost_events(metrics: Metrics, events: Events) -> None:
    """Count events that did not reach the bucket, or the webhook."""
    metrics.before_scrape(Follow(metrics.events_dropped, lambda: events.dropped))
    metrics.before_scrape(Follow(metrics.webhook_failures, lambda: events.webhook_failures))


class ReadAtScrape:
    """Values that are cheaper to read when somebody asks than to follow."""

    def __init__(self, metrics: Metrics, node: Node, pending: Callable[[], int]) -> None:
        """`pending()` is the number of checkpoints that this node has not finished."""
        self._metrics = metrics
        self._node = node
        self._pending = pending

    def __call__(self) -> None:
        """Set them. Thread of a scrape."""
        metrics = self._metrics
        metrics.checkpoints_pending.set(self._pending())
        # By the log, which is never behind the workers, as the last decision may be.
        generation = self._node.view.generation
        if generation is None or generation.rank_of(self._node.member.incarnation) is None:
            # At each scrape: the last messages of workers may come after the record of the next generation.
            metrics.not_a_member()
            return
        states = self._node.node_states()
        if not states:
            metrics.nodes.clear()
        for state, count in states.items():
            metrics.nodes.labels(state).set(count)
        self._set_steps_at_risk(generation)

    def _set_steps_at_risk(self, generation: Generation) -> None:
        facts = self._node.facts
        if facts is None or facts.generation != generation:
            self._metrics.steps_at_risk.clear()
            return
        # With more members a node does not know what each of them holds, and the leaders would compute for long.
        few = len(generation.members) <= MESH_NODES_MAX
        statuses = facts.statuses_of(generation.members) if few else {}
        found = at_risk(generation if few else None, statuses, facts.me.step, facts.committed_step)
        if few:
            self._metrics.steps_at_risk.labels("node").set(found.any_node)
        else:
            self._metrics.steps_at_risk.clear()
        self._metrics.steps_at_risk.labels("all").set(found.all)
