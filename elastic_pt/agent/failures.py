"""What a node does when its workers fail: it tells the others the cause, counts it, rests, and in the end gives up."""

import random

import structlog

from elastic_pt.agent.messages import Progress
from elastic_pt.agent.observation import Observation
from elastic_pt.config import ElasticSection
from elastic_pt.errors import NodeFailure
from elastic_pt.membership.decision.budgets import rest_s
from elastic_pt.membership.node import Node
from elastic_pt.runlog.ignored import still_damaged
from elastic_pt.runlog.records import Cause, CauseKind
from elastic_pt.workers.failure import WorkerFailure

log = structlog.get_logger("elastic_pt.agent.failures")


class Failures:
    """Ends this node's part in a generation. Agent process, main thread."""

    def __init__(
        self, node: Node, observation: Observation, progress: Progress, elastic: ElasticSection
    ) -> None:
        self._node = node
        self._observation = observation
        self._progress = progress
        self._elastic = elastic

    def not_started(self, error: OSError) -> None:
        """This node could not start its workers (no space, too many open files, ...)."""
        number = self._node.formed.generation.number
        failure = self._node.failure(f"cannot start workers: {error}", surroundings=True)
        log.warning("workers_not_started", generation=number, cause=str(error))
        self.end_generation(number, failure, counts=not self._node.must_reform(number))

    def worker_failed(self, failure: WorkerFailure) -> None:
        """A worker failed: tell the other nodes the cause, and count it if this node is the cause."""
        generation = self._node.formed.generation
        number = generation.number
        self._observation.metrics.worker_failures.labels(failure.cause).inc()
        log.warning(
            "worker_failed",
            generation=number,
            cause=str(failure),
            kind=failure.cause,
            rank=failure.rank,
            step=failure.step,
            traceback=failure.traceback,
            stacks=failure.stacks,
        )
        collateral = failure.collateral and self._node.await_reform(
            number, 2 * self._elastic.heartbeat_timeout_s
        )
        kind = CauseKind.FAILED
        found = [span for of, span in self._progress.damage if of == number]
        damage = still_damaged(generation.ignored, found)
        if self._progress.quarantined == number:
            kind = CauseKind.UNUSABLE
        elif damage:
            kind = CauseKind.DAMAGED
        own = self._node.failure(
            str(failure),
            kind=kind,
            step=failure.step or 0,
            signature=failure.signature,
            surroundings=failure.surroundings,
            damage=damage,
        )
        at_fault = kind is CauseKind.FAILED and not collateral
        counts = at_fault and not self._node.must_reform(number)
        self.end_generation(number, None if collateral else own, counts=counts)

    def end_generation(self, number: int, failure: Cause | None, *, counts: bool) -> None:
        """Tell the other nodes that this node's workers of a generation are gone.

        A failure that `counts` was caused by this node, without a new step since the last one. The node rests longer
        after each of them, so that the cause can end. Raises `NodeFailure` after too many, but only if the others
        can continue without this node; alone it waits.
        """
        progress = self._progress
        self._observation.metrics.generation_ended()
        if counts and failure is not None:
            progress.failures += 1
            seconds = rest_s(progress.failures, random.random())
            if seconds:
                log.warning("node_rests", seconds=round(seconds, 3), cause=failure.detail)
                self._node.rest(failure.detail, seconds)
        if failure is not None or self._node.must_reform(number):
            self._observation.broke(self._node.noticed_at_s(number))
        self._observation.waits()
        self._node.spend(number, failure)
        too_many = progress.failures > self._elastic.retries_without_progress
        if counts and failure is not None and too_many and self._node.others_can_go_on():
            raise NodeFailure(
                f"workers failed {progress.failures} times without a step beyond {progress.step}; "
                f"last: {failure.detail}"
            )
