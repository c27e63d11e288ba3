"""Every metric, declared once. The agent owns the registry, so counters survive the workers.

    python -m elastic_pt.telemetry.catalogue > docs/metrics.md

Names follow Prometheus: prefix, base units, `_total` for counters. A label has few values: there is none for a rank, and
the data's plan names at most 64 sources. Every sample also has the labels `run` and `node` (`telemetry.exposition`).
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from elastic_pt.telemetry.declaration import By, Declaration, counter, gauge, gauges, histogram
from elastic_pt.telemetry.exposition import Labelled, labelled_registry
from elastic_pt.telemetry.flops import ModelFlops
from elastic_pt.telemetry.goodput import Bucket

_REASON_LENGTH_MAX: Final = 200
_HOUR_S: Final = 3600.0

_STEP_S: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_PHASE_S: Final = (0.001, 0.003, *_STEP_S)
_REQUEST_S: Final = (0.003, *_STEP_S)
_UPLOAD_S: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_RECOVERY_S: Final = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The metrics of one node's agent. Longer than other classes, because it is a table."""

    # ---- the run ---------------------------------------------------------------------------------

    run_info = gauges(
        "1; the labels describe the run and this node.",
        *("run_id", "version", "torch", "device", "numerics"),
    )

    generation_info = gauges(
        "1; the labels describe the newest generation.", "generation", "reason", by=By.RUN
    )

    # ---- progress --------------------------------------------------------------------------------

    step = gauge("Steps done.", by=By.RUN)
    steps_planned = gauge("Steps of the whole run (`train.steps`).", by=By.RUN)
    steps = counter(
        "Optimizer steps that the workers of this node took, recomputed ones included.", by=By.RUN
    )
    steps_skipped = counter(
        "Steps without an update because loss or gradient was not finite.", by=By.RUN
    )
    steps_recomputed = counter("Steps that were done again after a loss of state.", by=By.RUN)
    tokens = counter("Tokens of the whole world's steps that this node took part in.", by=By.RUN)
    samples = counter("Rows of the whole world's steps that this node took part in.", by=By.RUN)
    step_seconds = histogram("Wall time of one step.", buckets=(*_STEP_S, 300.0, 1000.0, 3000.0))
    step_phase_seconds = histogram(
        "Wall time of one step by phase: data, compute, communicate, optimizer, and checkpoint (waits for it between steps).",
        "phase",
        buckets=_PHASE_S,
    )
    data_wait_seconds = counter(
        "Time in which steps waited for a batch that was not ready, by what was slow: store or local.",
        "cause",
        unit="seconds",
    )
    loss = gauge("Mean cross-entropy per token of the last step.", unit="nats", by=By.RUN)
    gradient_norm = gauge("Global gradient norm of the last step, before clipping.", by=By.RUN)
    learning_rate = gauge("Learning rate of the last step.", by=By.RUN)
    held_out_loss = gauge("Mean cross-entropy per held-out token.", unit="nats", by=By.RUN)
    tokens_per_second = gauge(
        "Tokens of the last step by its wall time and the wait before it; no series while nothing trains.",
        by=By.RUN,
    )
    mfu_ratio = gauges(
        "Model FLOPs per second of the last step as a share of the devices' peak; no series if the peak is unknown.",
        "formula",
        unit="ratio",
        by=By.RUN,
    )
    source_loss = gauges(
        "Mean cross-entropy per token of the last step's rows of a source.",
        "source",
        unit="nats",
        by=By.RUN,
    )
    source_rows = counter("Rows of a source in steps.", "source", by=By.RUN)

    # ---- membership ------------------------------------------------------------------------------

    generation = gauge("Number of the newest generation.", by=By.RUN)
    generations = counter("Generations that this node took part in.")
    world_size = gauge("Workers of the newest generation.", by=By.RUN)
    nodes = gauges("Nodes by state, as far as this node knows them.", "state", by=By.RUN)
    nodes_min = gauge("Fewest nodes that train (`elastic.nodes_min`).", by=By.RUN)
    nodes_max = gauge("Most nodes that train (`elastic.nodes_max`).", by=By.RUN)
    changes = counter(
        "Causes of new generations; the first one, and one after a pause, have none.",
        "cause",
        by=By.APPENDER,
    )
    recovery_seconds = histogram(
        "From noticing a cause to the end of the first step after it.",
        "cause",
        by=By.APPENDER,
        buckets=_RECOVERY_S,
    )
    restarts_without_progress = gauge(
        "Generations that nobody planned since a step was done that had not been done before, or a checkpoint committed.",
        by=By.RUN,
    )
    lost_steps = counter(
        "Steps that the generation before had done, and that are lost.", by=By.APPENDER
    )
    workers = gauges("Running workers of this node by what they do now.", "phase")
    worker_failures = counter("Workers of this node that failed.", "cause")
    quarantines = counter(
        "Quarantines of nodes, and of checkpoints that must not be used.", "what", by=By.APPENDER
    )
    fenced = counter("Records of an older generation that the log refused to this node.")
    notices = counter("Notices that this node received.", "source", "kind")
    notice_lead_seconds = gauge(
        "Lead of the last notice that made this node leave.", unit="seconds"
    )
    notice_source_up = gauges("Whether a source of notices answers: 1 or 0.", "source")

    # ---- states in memory and in the bucket ------------------------------------------------------

    snapshot_step = gauge("Step of the newest state that this node's workers wrote to memory.")
    snapshot_timestamp_seconds = gauge(
        "When they wrote it, as Unix time by this node's clock.", unit="seconds"
    )
    snapshot_seconds = gauge(
        "Time that the last snapshot blocked this node's workers.", unit="seconds"
    )
    snapshot_skips = counter(
        "Times that this node's workers had no room for snapshots, or a mirror had no room or took too long for one."
    )
    mirror_step = gauge("Step of the newest state of this node that all its mirrors hold.")
    mirror_timestamp_seconds = gauge(
        "When its mirrors had it, as Unix time by this node's clock.", unit="seconds"
    )
    mirror_bytes = counter(
        "Bytes of other nodes' states that this node copied into its memory.", unit="bytes"
    )
    checkpoint_committed_step = gauge("Step of the newest committed checkpoint.", by=By.RUN)
    checkpoint_commit_timestamp_seconds = gauge(
        "When the newest checkpoint was committed, as Unix time by the clock of the node that did it.",
        unit="seconds",
        by=By.RUN,
    )
    checkpoint_commits = counter("Checkpoints that this node committed.", by=By.APPENDER)
    checkpoint_failures = counter("Checkpoints that could not be uploaded or committed.")
    checkpoint_skips = counter(
        "Shards that had no room in memory, and uploads that a newer checkpoint replaced."
    )
    checkpoint_tidy_failures = counter(
        "Times that expired checkpoints could not be removed; a later commit retries."
    )
    checkpoint_upload_seconds = histogram(
        "Time to upload one worker's shard of a checkpoint.", buckets=_UPLOAD_S
    )
    checkpoint_upload_bytes = counter("Bytes of shards that were uploaded.", unit="bytes")
    checkpoint_stage_seconds = gauge(
        "Time that the last checkpoint blocked this node's workers.", unit="seconds"
    )
    checkpoints_pending = gauge(
        "Checkpoints that this node has not finished: to upload, or not committed yet."
    )
    verify_failures = counter(
        "Copies in memory that failed a check on this node, and checkpoints that it quarantined for that: each checkpoint counts on one node."
    )
    steps_at_risk = gauges(
        "Steps that would be done again if this was lost now: the node that costs most, or all nodes.",
        "loss",
        by=By.RUN,
    )
    checkpoint_every_steps = gauge(
        "Steps between checkpoints (`checkpoint.every_steps`).", by=By.RUN
    )

    # ---- the store -------------------------------------------------------------------------------

    store_requests = counter(
        "Attempts of this agent's requests to the run directory, by result: ok, missing, exists, denied, transient, failed.",
        "operation",
        "result",
    )
    store_retries = counter("Attempts that were repeated.", "operation")
    store_request_seconds = histogram("Time of one attempt.", "operation", buckets=_REQUEST_S)
    store_bytes = counter("Bytes that this agent read and wrote there.", "direction", unit="bytes")

    # ---- time and money --------------------------------------------------------------------------

    time_seconds = counter(
        "Time of this node by state; a step counts when it ends, so the states add up to node_seconds without the running step.",
        "state",
        unit="seconds",
    )
    node_seconds = counter("Age of this node's agent, which its clock tells.", unit="seconds")
    cost_usd = counter(
        "Price of that time (`telemetry.price_per_hour`); no series without a price.",
        unit="US dollars",
    )
    clock_seconds = gauge(
        "This node's clock at the scrape, as Unix time; `timestamp()` of it is the scraper's clock.",
        unit="seconds",
    )

    # ---- events ----------------------------------------------------------------------------------

    events_dropped = counter("Events that did not reach the bucket.")
    webhook_failures = counter("Events that the webhook did not accept.")

    # ---- GPUs, by NVML; no series without a driver -------------------------------------------------

    gpu_utilization_ratio = gauges(
        "Share of the last sample period in which a kernel ran.", "gpu", unit="ratio"
    )
    gpu_memory_used_bytes = gauges("Memory in use.", "gpu", unit="bytes")
    gpu_memory_total_bytes = gauges("Memory.", "gpu", unit="bytes")
    gpu_temperature_celsius = gauges("Temperature of the chip.", "gpu", unit="celsius")
    gpu_power_watts = gauges("Power draw.", "gpu", unit="watts")
    gpu_ecc_uncorrected = counter("Uncorrected memory errors since this agent started.", "gpu")
    gpu_throttled = gauges("Whether the clocks are reduced for a reason: 1 or 0.", "gpu", "reason")
    gpu_xid_errors = counter(
        "Critical errors that the driver reported since this agent started.", "gpu"
    )

    def __init__(
        self,
        run: str = "",
        node: str = "",
        *,
        price_per_hour: float = 0.0,
        flops: ModelFlops | None = None,
    ) -> None:
        """`run` and `node` label every sample; empty ones do not. Without `flops` there is no MFU.

        `price_per_hour` is this node's, in US dollars; 0 if unknown.
        """
        own = CollectorRegistry()
        for declared in catalogue():
            exposed = declared is not Metrics.cost_usd or price_per_hour > 0
            setattr(self, declared.name, declared.build(own if exposed else None))
        labels = {name: value for name, value in (("run", run), ("node", node)) if value}
        self._refresh: list[Callable[[], None]] = []
        process = ProcessCollector(registry=None)
        self.registry = labelled_registry(Labelled((own, process), labels, self._refresh))
        """What is served."""
        self.flops = flops
        self._price_per_hour = price_per_hour
        self._accounted: dict[Bucket, float] = {}
        self._accounted_s = 0.0
        self._committed_step = 0
        self.before_scrape(lambda: self.clock_seconds.set(time.time()))

    def before_scrape(self, refresh: Callable[[], None]) -> None:
        """Call this before each scrape, for values that are not worth following in between."""
        self._refresh.append(refresh)

    def step_done(self, message: Mapping[str, Any], *, again: bool) -> None:
        """Count one step from the report of a node's first worker; `again` says that it had been done before."""
        step, (first, end) = int(message["step"]), message["rows"]
        stall_s = message.get("checkpoint_stall_s", 0.0)
        self.steps.inc()
        self.steps_skipped.inc(bool(message["skipped"]))
        self.steps_recomputed.inc(again)
        if not again:
            self.restarts_without_progress.set(0)
        self.tokens.inc(message["tokens"])
        self.samples.inc(end - first)
        self.step_seconds.observe(message["seconds"])
        for phase, seconds in message.get("phases", {}).items():
            self.step_phase_seconds.labels(phase).observe(seconds)
        if "checkpoint_stall_s" in message:
            self.step_phase_seconds.labels("checkpoint").observe(stall_s)
        if cause := message.get("data_wait_cause"):
            self.data_wait_seconds.labels(cause).inc(message["data_wait_s"])
        self.step.set(step)
        self.learning_rate.set(message["learning_rate"])
        self.loss.set(_number(message["loss"]))
        self.gradient_norm.set(_number(message["gradient_norm"]))
        if "held_out_loss" in message:
            self.held_out_loss.set(_number(message["held_out_loss"]))
        self._speed(message["tokens"], message["seconds"] + stall_s, message["world_size"])
        for source, (rows, loss) in message.get("sources", {}).items():
            self.source_rows.labels(source).inc(rows)
            self.source_loss.labels(source).set(_number(loss))

    def generation_starts(self, number: int, reason: str, restarts: int = 0) -> None:
        """Workers of a new generation are about to start."""
        self.generations.inc()
        self.generation.set(number)
        self.restarts_without_progress.set(restarts)
        tell(self.generation_info, number, reason[:_REASON_LENGTH_MAX])

    def generation_ended(self) -> None:
        """The workers are gone: what only they had is not shown any more."""
        self.tokens_per_second.forget()
        self.mfu_ratio.clear()

    def states_lost(self) -> None:
        """The workers start from the bucket: what this node held in memory is of no use."""
        self.snapshot_step.forget()
        self.snapshot_timestamp_seconds.forget()
        self.mirrors_change()

    def mirrors_change(self) -> None:
        """A new generation has other mirrors, or none: they hold nothing of it yet."""
        self.mirror_step.forget()
        self.mirror_timestamp_seconds.forget()

    def committed(self, step: int, at_s: float) -> None:
        """The newest checkpoint that this node has seen committed, and when, as Unix time."""
        if step > self._committed_step:
            self.restarts_without_progress.set(0)
        self._committed_step = step
        self.checkpoint_committed_step.set(step)
        self.checkpoint_commit_timestamp_seconds.set(at_s)

    def not_a_member(self) -> None:
        """Others train without this node. What it knew of the run is old, and `max by (run)` must not find it."""
        self.generation_ended()
        self.states_lost()
        for each in (
            *(self.step, self.loss, self.gradient_norm, self.learning_rate, self.held_out_loss),
            *(self.generation, self.world_size, self.restarts_without_progress),
            self.snapshot_seconds,
            *(self.checkpoint_committed_step, self.checkpoint_commit_timestamp_seconds),
        ):
            each.forget()
        for family in (self.generation_info, self.source_loss, self.nodes, self.steps_at_risk):
            family.clear()

    def account(self, seconds: Mapping[Bucket, float], age_s: float) -> None:
        """Raise the time counters to the goodput ledger's sums and the age of the agent. Call it before a scrape only.

        So all values of a scrape are of one moment. Age and cost rise during a step; a state would have to fall if the
        running step counted in it and then proved to have waited.
        """
        for state, total_s in seconds.items():
            self.time_seconds.labels(state).inc(total_s - self._accounted.get(state, 0.0))
            self._accounted[state] = total_s
        passed_s, self._accounted_s = age_s - self._accounted_s, age_s
        self.node_seconds.inc(passed_s)
        self.cost_usd.inc(passed_s / _HOUR_S * self._price_per_hour)

    def _speed(self, tokens: int, seconds: float, devices: int) -> None:
        if seconds <= 0:
            return
        self.tokens_per_second.set(tokens / seconds)
        shares = {} if self.flops is None else self.flops.mfu(tokens / seconds, devices)
        for formula, share in shares.items():
            self.mfu_ratio.labels(formula).set(share)


def tell(information: Gauge, *labels: object) -> None:
    """Give a gauge that only has labels these ones. The old series go last: a scrape in between finds one, too."""
    information.labels(*labels).set(1)
    for family in information.collect():
        for sample in family.samples:
            if tuple(sample.labels.values()) != tuple(map(str, labels)):
                information.remove(*sample.labels.values())


def catalogue() -> list[Declaration[Any]]:
    """All metrics in order."""
    return [each for each in vars(Metrics).values() if isinstance(each, Declaration)]


def page() -> str:
    """docs/metrics.md."""
    rows = [
        f"| `{each.exposed_name}` | {each.kind} | {each.unit} | "
        f"{', '.join(f'`{label}`' for label in each.labels)} | {each.by} | {each.text} |"
        for each in catalogue()
    ]
    return _PAGE + "\n".join(rows) + "\n"


def _number(value: float | None) -> float:
    return math.nan if value is None else value


_PAGE: Final = """# Metrics

Written by `python -m elastic_pt.telemetry.catalogue`. Do not edit it.

Each agent serves its metrics over HTTP ([where](operations.md#metrics)). The agent counts, not its workers: counters rise on
through restarts of workers, and a new agent starts at zero, which `rate()` and `increase()` expect.

Every sample also has the labels `run` (`run.url` without credentials) and `node`. The column *who* says how to put nodes together:

- *each node, for itself*: add the values up, or show them by node.
- *each node, for the run*: the same on all nodes that take part. Use `max by (run)`.
- *the node that appended the record*: each event is counted by exactly one node. Use `sum by (run)`.

A gauge has no series before its first value, and none after what it measured has ended: a node that others train without has no
gauges of the run. A counter of events has its series from the start of the agent on, at 0, because `increase()` does not see the first
value of a new series. (Those of notices, GPUs and sources of data begin when the agent knows them.) A histogram has series with `_bucket`, `_sum`
and `_count` behind its name. In addition there are the `process_*` metrics of prometheus-client about the agent's own process.

## Values of labels

- `formula`: `parameters` is 6·N FLOPs per token, N without embeddings and output layer (Kaplan et al. 2020). `palm` is
  6·N + 12·L·H·Q·T, N with the output layer, L layers, H heads of width Q, T tokens per sequence (Chowdhery et al. 2022, appendix B).
  A figure that counts only the attention below the causal mask lies between the two. The peak is `telemetry.peak_flops`, or that of a
  known GPU (H100, H200, A100, L40S: dense bfloat16 by the datasheet).
- `state` of `nodes`: `active` (members that train or start), `joining`, `draining`, `resting`, `quarantined`, `lost` (members that are
  gone; the next generation is without them). Only members show it.
- `state` of `time_seconds`: the buckets of [goodput](operations.md#goodput). A step counts when it ends, in the bucket that it proves to
  belong to. So with steps of minutes, take `rate()` over ten steps or more. `node_seconds` and `cost_usd` rise within a step too.
- `cause` of `changes` and `recovery_seconds`: `lost`, `failed`, `unusable`, `damaged`, `parked`, `gave_up`, `left`, `joined`, `barred`. A recovery
  counts once, under the first of its causes in this order; `start` is one without a cause. In `changes`, `all_lost` is a generation of
  new nodes only: no member of the one before was left that knew why.
- `cause` of `data_wait_seconds`, by what the reading thread spent most of the time for this batch on: `store`, waiting for blocks from the
  bucket, which is slow, absent or failing; `local`, reading from disk, hashing, or finding the rows. A batch that was ready counts as none,
  so a slow device never shows here.
- `cause` of `worker_failures`: `oom`, `signal`, `exception`, `exit`, `hang`, `collective`.
- `loss` of `steps_at_risk`: `node` is the one node that costs most (up to 32 members), `all` is all nodes. What peers hold is known from
  their last heartbeat.
- `result` of `store_requests`: `ok`, `missing` and `exists` are answers; `denied`, `transient` (tried again) and `failed` are errors.
- `store_*`: what the agent asks the bucket for: the log, events, and checkpoints as they are written. Workers read the data, and the
  checkpoint that they start from, by themselves: that is not counted.
- `operation`: `read`, `create`, `write`, `size`, `list`, `delete`, `other`.
- `phase` of `step_phase_seconds`: `data`, `compute`, `communicate`, `optimizer`, `checkpoint`.
- `phase` of `workers`, by their heartbeats: `start`, `restore`, `data`, `compute` (with all waits for other workers in a step), `stage`
  (copies the state), `evaluate`, `end` (waits for the others after its last step).
- `source`: at most 64 sources of the data, the rest together as `other`.
- `reason` of `gpu_throttled`: `power_cap`, `hardware_slowdown`, `software_thermal`, `hardware_thermal`, `power_brake`. The GPU metrics
  come from NVML every 10 s. They were tested against a stand-in for NVML, and have not run on a GPU yet.
- `gpu`: NVML's index. An agent shows the GPUs that its `CUDA_VISIBLE_DEVICES` names, or all of the machine. A GPU that several agents
  may use is shown by each of them. `unknown` counts errors of a GPU that NVML did not name.

## Cost

A scrape with a value in each of about 820 series (64 sources, 8 GPUs) takes 10 to 13 ms of one core, in a fleet of 2 nodes and of 32, on a
busy machine (`python benchmarks/scrape.py`). Every 15 s that is 0.08 % of one core. It is the agent's time, not a worker's.

## All metrics

| metric | type | unit | labels | who | meaning |
| --- | --- | --- | --- | --- | --- |
"""

if __name__ == "__main__":
    print(page(), end="")
