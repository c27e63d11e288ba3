"""The kinds of faults. `KINDS` is the catalogue, and docs/chaos.md has it as a table."""

from dataclasses import replace
from typing import Final

from elastic_pt.chaos.kinds.bucket import OF_BUCKET
from elastic_pt.chaos.kinds.disk import OF_DISK
from elastic_pt.chaos.kinds.kind import (
    RANGES,
    Action,
    Evidence,
    Kind,
    Need,
    NothingToStrike,
    Strike,
)
from elastic_pt.chaos.kinds.network import OF_NETWORK
from elastic_pt.chaos.kinds.nodes import OF_NODES
from elastic_pt.chaos.kinds.operator import OF_OPERATOR
from elastic_pt.chaos.kinds.processes import OF_PROCESSES
from elastic_pt.chaos.kinds.stored import OF_STORED
from elastic_pt.chaos.kinds.wire import OF_WIRE

__all__ = ["KINDS", "RANGES", "Action", "Evidence", "Kind", "Need", "NothingToStrike", "Strike"]

KINDS: Final = {
    each.name: each
    for each in (
        *OF_PROCESSES,
        *OF_NODES,
        *OF_NETWORK,
        *OF_WIRE,
        *OF_DISK,
        *(replace(each, on_nodes=False) for each in (*OF_OPERATOR, *OF_STORED, *OF_BUCKET)),
    )
}
"""All kinds, by name."""
