"""Faults of a node's staging disk, where states are kept. Such a node has a small file system of its own."""

from typing import Final

from elastic_pt.chaos.kinds.kind import NO_START, Kind, Need, each

OF_DISK: Final = (
    Kind(
        "staging_full",
        "the staging disk of a node is full, and what others free there is filled at once",
        strike=each(lambda arena, node: arena.disk(node).fill()),
        heal=each(lambda arena, node: arena.disk(node).empty()),
        needs=frozenset({Need.DISK}),
        ends_node=True,
        evidence=NO_START,
    ),
    Kind(
        "staging_read_only",
        "no file can be opened for writing on the staging disk of a node",
        strike=each(lambda arena, node: arena.disk(node).make_read_only()),
        heal=each(lambda arena, node: arena.disk(node).make_writable()),
        needs=frozenset({Need.DISK}),
        ends_node=True,
        evidence=NO_START,
    ),
)
