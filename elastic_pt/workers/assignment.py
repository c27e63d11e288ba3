"""What the workers of one generation need to know, and how they may end.

The agent writes the assignment as a JSON file into the node's scratch directory. A worker returns its outcome.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from elastic_pt.checkpoint.memory import Places
from elastic_pt.runlog.ignored import IgnoredSpan
from elastic_pt.runlog.records import Checkpoint

SOCKET_NAME: Final = "agent.sock"
_FILE_NAME: Final = "assignment.json"


class Outcome(StrEnum):
    """How a worker ended, when it ended well."""

    COMPLETED = "completed"
    DRAINED = "drained"
    """It stopped at a step because the members change; a checkpoint of that step is saved."""
    DIVERGED = "diverged"
    """The loss stayed non-finite."""


@dataclass(frozen=True)
class Assignment:
    """One generation, for its workers. Ranks come from torch elastic's environment variables."""

    run_id: str
    generation: int
    store_address: str
    store_port: int
    resume: Checkpoint | None
    memory: Places | None = None
    """Where the state lies from which training goes on; None if it is `resume`, in the bucket."""
    node: str = ""
    """The node's name, for events."""
    order_version: int = 1
    """Of the run's data order."""
    ignored: tuple[IgnoredSpan, ...] = ()
    """What is left out of the data."""

    @property
    def secrets(self) -> list[str]:
        """What no event may show."""
        return [] if self.memory is None else self.memory.access.secrets

    @property
    def resume_step(self) -> int:
        """Steps that are done in the state from which training goes on."""
        if self.memory is not None:
            return self.memory.step
        return 0 if self.resume is None else self.resume.step


_ADAPTER: Final = TypeAdapter(Assignment)


def write_assignment(scratch: Path, assignment: Assignment) -> None:
    """Agent process, before the workers of a generation start."""
    partial = scratch / f"{_FILE_NAME}.partial"
    partial.write_bytes(_ADAPTER.dump_json(assignment))
    partial.rename(scratch / _FILE_NAME)


def read_assignment(scratch: Path) -> Assignment:
    """Worker process."""
    return _ADAPTER.validate_json((scratch / _FILE_NAME).read_bytes())
