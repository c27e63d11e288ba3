"""The configuration of a run that takes seconds: a tiny model, and timeouts for many processes on one machine. Pure."""

from collections.abc import Mapping
from typing import Any, Final

Tree = Mapping[str, Mapping[str, Any]]
"""Keys by section."""

_SMALL: Final[Tree] = {
    "run": {"seed": 7},
    "data": {"sequence_length": 64},
    "model": {"layers": 2, "width": 64, "heads": 2, "kv_heads": 1},
    "train": {"steps": 48, "global_batch": 8, "micro_batch": 1, "warmup_steps": 4},
    "elastic": {
        # A run starts at once when `nodes_max` are there, and with fewer only after this time.
        "join_window_s": 30.0,
        # A machine that runs all these processes at once must not make a healthy node look silent.
        "heartbeat_timeout_s": 4.0,
        "takeover_s": 8.0,
        "hang_timeout_s": 4.0,
        "settle_timeout_s": 60.0,
        "collective_timeout_s": 60.0,
    },
    "checkpoint": {"every_steps": 6},
}


def small_run(run_url: str, data_url: str, *more: Tree) -> dict[str, dict[str, Any]]:
    """The tree of such a configuration. Keys of `more` replace those from before."""
    places: Tree = {"run": {"url": run_url}, "data": {"url": data_url}}
    tree: dict[str, dict[str, Any]] = {}
    for each in (_SMALL, places, *more):
        for section, keys in each.items():
            tree[section] = {**tree.get(section, {}), **keys}
    return tree
