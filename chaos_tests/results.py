"""Writes docs/chaos-results.md from the results of a full run, and from those of stock torchrun in the same scenarios.

elastic-pt chaos run --all --out DIR
python -m chaos_tests.stock --json STOCK
python -m chaos_tests.results DIR STOCK ["A remark about the machine."] > docs/chaos-results.md
"""

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from chaos_tests.stock import LONGEST_S

Result = dict[str, Any]

_HEAD = """# What the faults cost

Each scenario of `elastic-pt chaos list`, as it was played last: {date}, {machine}. "Training again" is the time from the strike of a fault
that ended a generation to the next step that was done, the longest of the scenario, with the import of newcomers where all nodes were
lost; "lost" are steps that were done and done again. "passed" means that all oracles of [chaos.md](chaos.md#oracles) were content, first
of all that the weights are those of the undisturbed run, bit for bit. [faults.md](faults.md) says what each row must lead to.
{remark}

"Stock" is torchrun with FSDP2 and torch.distributed.checkpoint in the same scenario, by the same harness: its rendezvous on node-0, timeouts tuned
to seconds, a checkpoint every 6 steps, in a directory instead of a bucket. "stuck": not over after {limit_s:g} s. It is asked only
whether and when it trains again, not for its weights.

    elastic-pt chaos run --all --out DIR
    python -m chaos_tests.stock --json STOCK
    python -m chaos_tests.results DIR STOCK > docs/chaos-results.md

| scenario | rows | faults | result | training again | lost | stock |
| --- | --- | --- | --- | ---: | ---: | --- |
"""


def read_results(folder: Path) -> list[Result]:
    """All results below a folder, by name."""
    found = [json.loads(path.read_text()) for path in folder.rglob("result.json")]
    return sorted(found, key=lambda result: str(result["name"]))


def read_stock(path: Path) -> dict[str, Result]:
    """What became of stock torchrun, by scenario."""
    return {str(each["name"]): each for each in json.loads(path.read_text())}


def stock_cell(result: Result | None) -> str:
    """What became of it in one scenario; empty if it was not played."""
    if result is None:
        return ""
    if result["recovery_s"] is None:
        return str(result["outcome"])
    told = f"{result['recovery_s']:.1f} s, {result['lost_steps']} lost"
    return told if result["outcome"] == "completed" else f"{told}, then {result['outcome']}"


def row(result: Result, stock: Result | None) -> str:
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
        stock_cell(stock),
    ]
    return f"| {' | '.join(cells)} |"


def page(
    results: Sequence[Result], stock: Mapping[str, Result], date: datetime.date, remark: str = ""
) -> str:
    """The whole page; `remark` is about the machine."""
    machine = (
        f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, no GPU"
    )
    passed = sum(bool(each["passed"]) for each in results)
    table = "\n".join(row(each, stock.get(each["name"])) for each in results)
    return (
        _HEAD.format(date=date.isoformat(), machine=machine, limit_s=LONGEST_S, remark=remark)
        + f"{table}\n\n{passed} of {len(results)} scenarios passed.\n"
    )


if __name__ == "__main__":
    folder, stock_file, *remarks = sys.argv[1:]
    results, stock = read_results(Path(folder)), read_stock(Path(stock_file))
    print(page(results, stock, datetime.date.today(), " ".join(remarks)), end="")
