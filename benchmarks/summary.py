"""What several benchmarks write beside their results: the machine, and a median with its spread."""

import json
import math
import os
import platform
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile: the smallest value that at least `share` of all values do not exceed."""
    assert values
    assert 0.0 < share <= 1.0
    return sorted(values)[math.ceil(share * len(values)) - 1]


def machine() -> dict[str, Any]:
    """The machine of the measurement."""
    return {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": os.getloadavg(),
    }


def spread(name: str, values: Sequence[float], digits: int) -> dict[str, Any]:
    """`name` is the median; `name_p90` and `name_worst` are beside it, for a value of which less is better."""
    return {
        name: round(statistics.median(values), digits),
        f"{name}_p90": round(percentile(values, 0.9), digits),
        f"{name}_worst": round(max(values), digits),
    }


def print_targets(targets: Mapping[str, bool]) -> None:
    """Say of each target whether it is met."""
    for target, met in targets.items():
        print(f"{'met' if met else 'MISSED'}: {target}")


def exit_on_sigterm() -> None:
    """Exit normally on SIGTERM too, so that processes are ended and files removed."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def write_json(path: Path | None, report: Mapping[str, Any]) -> None:
    """Write the results, if a file was given."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
