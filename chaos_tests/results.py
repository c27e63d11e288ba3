"""Writes docs/chaos-results.md from the results of a full run.

elastic-pt chaos run --all --out DIR
python -m chaos_tests.results DIR > docs/chaos-results.md
"""

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Result = dict[str, Any]

_HEAD = """# What the faults cost

Each scenario of `elastic-pt chaos list`, as it was played last: {date}, {machine}. "Training again" is the time from the strike of a fault
that ended a generation to the next step that was done, the longest of the scenario; "lost" are steps that were reported as done and
done again. "passed" means that all oracles of [chaos.md](chaos.md#oracles) were content, first of all that the weights are
those of the undisturbed run, bit for bit. [faults.md](faults.md) says what each row must lead to.

    elastic-pt chaos run --all --out DIR
    python -m chaos_tests.results DIR > docs/chaos-results.md

| scenario | rows | faults | result | training again | lost |
| --- | --- | --- | --- | ---: | ---: |
"""


def read_results(folder: Path) -> list[Result]:
    """All results below a folder, by name."""
    found = [json.loads(path.read_text()) for path in folder.rglob("result.json")]
    return sorted(found, key=lambda result: str(result["name"]))


def row(result: Result) -> str:
    """One line of the table."""
    recovered = [each["recovery_s"] for each in result["faults"] if each["recovery_s"] is not None]
    lost = [each["lost_steps"] for each in result["faults"] if each["lost_steps"] is not None]
    kinds = list(dict.fromkeys(f"`{each['kind']}`" for each in result["faults"]))
    failed = [each["oracle"] for each in result["verdicts"] if not each["passed"]]
    cells = [
        f"`{result['name']}`",
        ", ".join(result["rows"]),
        ", ".join(kinds),
        f"FAILED: {', '.join(failed)}" if failed else "passed",
        f"{max(recovered):.1f} s" if recovered else "no pause",
        str(max(lost)) if lost else "0",
    ]
    return f"| {' | '.join(cells)} |"


def page(results: Sequence[Result], date: datetime.date) -> str:
    """The whole page."""
    machine = (
        f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, no GPU"
    )
    passed = sum(bool(each["passed"]) for each in results)
    table = "\n".join(row(each) for each in results)
    return (
        _HEAD.format(date=date.isoformat(), machine=machine)
        + f"{table}\n\n{passed} of {len(results)} scenarios passed.\n"
    )


if __name__ == "__main__":
    print(page(read_results(Path(sys.argv[1])), datetime.date.today()), end="")
