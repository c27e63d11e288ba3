"""All dashboards, and the metrics that none of them shows."""

from pathlib import Path
from typing import Final

from dashboards import checkpoints, faults, fleet, performance, run
from dashboards.layout import Board, as_text

DIRECTORY: Final = Path(__file__).parent
ABSENT: Final[dict[str, str]] = {}
"""Metrics of the catalogue that are deliberately on no dashboard -> the reason."""


def boards() -> list[Board]:
    """In the order of the links."""
    return [each.board() for each in (run, faults, checkpoints, performance, fleet)]


def texts() -> dict[str, str]:
    """Name of each committed file -> its bytes."""
    return {each.file_name: as_text(each) for each in boards()}
