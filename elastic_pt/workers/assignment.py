"""What an agent hands to the workers of one generation, and how they may end.

The assignment is a small JSON file in the node's scratch directory; the outcome is a worker's return value.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from elastic_pt.runlog.records import Checkpoint

SOCKET_NAME: Final = "agent.sock"
_FILE_NAME: Final = "assignment.json"


class Outcome(StrEnum):
    """How a worker ended, when it ended well."""

    COMPLETED = "completed"
    DRAINED = "drained"
    """It stopped so that the world can change; a checkpoint of its last step is staged."""
    DIVERGED = "diverged"
    """The loss stayed non-finite."""


@dataclass(frozen=True)
class Assignment:
    """One generation as its workers need to know it; ranks come from torch elastic's environment."""

    run_id: str
    generation: int
    store_address: str
    store_port: int
    resume: Checkpoint | None


_ADAPTER: Final = TypeAdapter(Assignment)


def write_assignment(scratch: Path, assignment: Assignment) -> None:
    """Agent process, before the workers of a generation start."""
    partial = scratch / f"{_FILE_NAME}.partial"
    partial.write_bytes(_ADAPTER.dump_json(assignment))
    partial.rename(scratch / _FILE_NAME)


def read_assignment(scratch: Path) -> Assignment:
    """Worker process."""
    return _ADAPTER.validate_json((scratch / _FILE_NAME).read_bytes())
