"""The results, written after each measurement: `results.json` for programs, `table.txt` for people.

Parts run one after the other, each in its own process, and add to the same file.
"""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

_RESULTS: Final = "results.json"
_TABLE: Final = "table.txt"
_TABLE_WIDTH: Final = 140
_FOUND_MAX: Final = 500


@dataclass
class Report:
    """The rows of one part. A row is in the file when `row` returns."""

    out: Path
    part: str
    _started_s: float = field(default_factory=time.monotonic)

    def row(self, case: str, found: str, *, failed: bool = False, **values: Any) -> None:
        """Add a row: `found` is a short text for the table, `values` are the numbers behind it."""
        row = {"part": self.part, "case": case, "found": found, "failed": failed, **values}
        row["at_s"] = round(time.monotonic() - self._started_s, 1)
        results = read_results(self.out)
        results["rows"].append(row)
        write_results(self.out, results)
        print(f"{self.part}: {case}: {'FAILED: ' if failed else ''}{found}", flush=True)

    @contextmanager
    def attempt(self, case: str) -> Iterator[None]:
        """Record an error of a case as its row, so that the part continues with the next case."""
        try:
            yield
        except Exception as error:
            self.row(case, f"{type(error).__name__}: {error}"[:2000], failed=True)


def read_results(out: Path) -> dict[str, Any]:
    """The results so far."""
    path = out / _RESULTS
    if path.exists():
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return results
    return {"machine": {}, "rows": []}


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Replace the file atomically."""
    partial = out / f".{_RESULTS}"
    partial.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(out / _RESULTS)


def print_table(out: Path) -> None:
    """Print all rows, and write them as text."""
    results = read_results(out)
    table = Table(title=", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    table.add_column("part")
    table.add_column("case")
    table.add_column("found", overflow="fold")
    for row in results["rows"]:
        # Keep the end of an error: it has the most information.
        found = f"FAILED: {row['found'][-_FOUND_MAX:]}" if row["failed"] else row["found"]
        table.add_row(row["part"], row["case"], found[:_FOUND_MAX])
    Console(width=_TABLE_WIDTH, markup=False).print(table)
    with (out / _TABLE).open("w", encoding="utf-8") as file:
        Console(width=_TABLE_WIDTH, markup=False, file=file).print(table)


def machine(device: str) -> dict[str, Any]:
    """The machine of the measurement. Does not initialise CUDA in this process."""
    found: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "shm_free_gb": round(shutil.disk_usage("/dev/shm").free / 1e9, 1),
    }
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
            found["device"] = done.stdout.strip().splitlines()[-1] if done.stdout else "unknown"
        except (OSError, subprocess.TimeoutExpired) as error:
            found["device"] = f"cuda ({error})"
    return found
