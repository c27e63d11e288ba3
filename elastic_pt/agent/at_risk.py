"""A checkpoint because machines are at risk: a request in the run's log, as an operator makes it.

    rebalance notice ─► CheckpointRequests.heed ─► [thread] no_need ─► CONTROL (checkpoint) ─► all members checkpoint ─► COMMIT

The log makes one request of many: a node asks for nothing while a request holds, or while little has been done since the
newest commit. So many nodes with a notice at the same time cause one checkpoint. Agent process.
"""

import threading
from collections.abc import Callable
from typing import Final

import structlog

from elastic_pt.errors import FencedError, StoreError
from elastic_pt.notices.notice import Notice
from elastic_pt.runlog.control import ask
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Control, Request, Verb

UNSAVED_MIN_S: Final = 10.0
"""Training time since the newest commit that is worth a checkpoint."""

log = structlog.get_logger("elastic_pt.agent.at_risk")


def no_need(view: RunView, step: int, step_s: float | None) -> str:
    """Why a checkpoint need not be asked for after `view`; empty if it is worth it. Pure.

    `step` is the newest step that this node has done, `step_s` what a step takes.
    """
    if view.suspension is not None:
        return str(view.suspension)
    if (held := view.request(Verb.CHECKPOINT)) is not None:
        return str(held)
    unsaved_s = (step - view.committed_step) * (step_s or 0.0)
    if unsaved_s < UNSAVED_MIN_S:
        return f"{max(0.0, unsaved_s):.1f} s of training are not committed"
    return ""


class CheckpointRequests:
    """Asks for a checkpoint when this machine may be taken away."""

    def __init__(
        self, run_log: RunLog, node: str, progress: Callable[[], tuple[int, float | None]]
    ) -> None:
        """`progress()`: the newest step that this node has done, and what a step takes."""
        self._log = run_log
        self._node = node
        self._progress = progress
        self._asking = threading.Lock()

    def heed(self, notice: Notice) -> None:
        """Ask in a thread: the bucket may take long, and other notices must not wait for it. Returns at once."""
        if self._asking.acquire(blocking=False):
            threading.Thread(target=self._ask, args=(notice,), name="at-risk", daemon=True).start()

    def _ask(self, notice: Notice) -> None:
        why = f"{notice.source} {notice.detail}"

        def make(view: RunView) -> Control:
            reason = no_need(view, *self._progress())
            if reason:
                raise FencedError(reason)
            return ask(view, Request(Verb.CHECKPOINT, by=f"node {self._node}", why=why))

        try:
            self._log.append(make, generation=self._log.view.generation_number)
            log.info("checkpoint_asked", cause=why)
        except FencedError as error:
            log.info("checkpoint_not_asked", cause=str(error))
        except StoreError as error:
            # Checkpoints are committed every `checkpoint.every_steps` too.
            log.warning("checkpoint_not_asked", cause=str(error))
        finally:
            self._asking.release()
