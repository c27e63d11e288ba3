"""Dispatches the messages of this node's workers within the agent. Agent process, on the channel's threads.

step                       ─► metrics, this node's status, the history of steps
no_room  skipped           ─► Checkpointing.save
activity                   ─► the goodput ledger
snapshot                   ─► Snapshots; a checkpoint: Checkpointing.save too
no_snapshots               ─► Snapshots
copy_failed                ─► Snapshots: after a second failure this copy is not read again
event                      ─► the sinks of this node's events
unusable                   ─► QUARANTINE of the checkpoint; a state in memory is not taken again
damaged                    ─► Failures: the next generation leaves the tokens out
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from elastic_pt.agent.checkpointing import Checkpointing, quarantine
from elastic_pt.agent.observation import Observation
from elastic_pt.agent.snapshots import Snapshots
from elastic_pt.membership.node import Node
from elastic_pt.runlog.ignored import DamagedSpan
from elastic_pt.runlog.log import RunLog
from elastic_pt.workers.channel import Message

log = structlog.get_logger("elastic_pt.agent.messages")


@dataclass
class Progress:
    """The progress of this node's workers, over all its generations. Written here, read by the main thread."""

    step: int = 0
    """The newest step that they have done."""
    failures: int = 0
    """How often this node broke a generation since it first did that step. The main thread counts them."""
    skipped: tuple[int, str] = (0, "")
    """The newest step that was skipped, and why."""
    quarantined: int = 0
    """The newest generation that resumed from a checkpoint which this node found unusable."""
    damage: list[tuple[int, DamagedSpan]] = field(default_factory=list)
    """What its workers found damaged and may leave out, each with their generation."""


class WorkerMessages:
    """Passes each message to the part of the agent that handles it."""

    def __init__(
        self,
        run_log: RunLog,
        node: Node,
        checkpointing: Checkpointing,
        snapshots: Snapshots,
        observation: Observation,
        progress: Progress,
        relay: Callable[[dict[str, Any]], None],
    ) -> None:
        self._log = run_log
        self._node = node
        self._checkpointing = checkpointing
        self._snapshots = snapshots
        self._observation = observation
        self._progress = progress
        self._relay = relay

    def handle(self, message: Message) -> None:
        """One message of one worker."""
        match message["kind"]:
            case "step":
                self._step_done(message)
                self._snapshots.note_step()
            case "no_room" | "skipped":
                self._checkpointing.save(message)
            case "activity":
                self._observation.activity(message["activity"])
            case "snapshot":
                metrics = self._observation.metrics
                metrics.snapshot_seconds.set(message["seconds"])
                metrics.snapshot_step.set(message["step"])
                metrics.snapshot_timestamp_seconds.set(time.time())
                self._snapshots.written(message)
                # Afterwards: its upload may end, and release the buffer, at once.
                if message["checkpoint"]:
                    self._checkpointing.save(message)
            case "no_snapshots":
                log.warning("no_snapshots", cause=message["why"])
                self._snapshots.no_room()
            case "copy_failed":
                self._observation.metrics.verify_failures.inc(bool(message["damaged"]))
                self._snapshots.copy_failed(message)
            case "event":
                self._relay(message["content"])
            case "unusable":
                self._unusable(message)
            case "damaged":
                span = DamagedSpan(message["source"], tuple(message["tokens"]), message["file"])
                self._progress.damage.append((self._node.formed.generation.number, span))

    def _unusable(self, message: Message) -> None:
        number = self._progress.quarantined = self._node.formed.generation.number
        if "directory" in message:
            quarantine(self._log, number, message["directory"], message["why"])
        else:
            self._observation.metrics.verify_failures.inc()
            log.error("snapshot_unusable", step=message["step"], cause=message["why"])
            if message["whole"]:
                self._snapshots.distrust(message["generation"], message["step"])

    def _step_done(self, message: Message) -> None:
        formed, step = self._node.formed, int(message["step"])
        if message["rank"] == formed.generation.first_worker_rank(formed.node_rank):
            times = self._observation.step_done(message)
            # First the step: with the times, the status says that it is of this generation.
            self._node.progress(step, message["loss"])
            if times is not None:
                self._node.first_step(times)
                log.info("first_step", step=step, **vars(times))
            self._snapshots.committed(self._log.view.committed_step)
            self._checkpointing.note_step(message)
            if step > self._progress.step:
                self._progress.step, self._progress.failures = step, 0
            if message["skipped"]:
                self._progress.skipped = (step, message["skipped"])
                log.warning("step_skipped", step=step, cause=message["skipped"])
