"""Part `recovery`: seconds by phase from the kill of a worker or node to the next step, several times.

With one node the workers of the new generation use NCCL. With three nodes that share the device they use gloo. Agents
and measurement are those of `benchmarks/recovery.py`.
"""

import argparse
from typing import Final

from benchmarks.cuda.report import Report
from benchmarks.cuda.sizes import SIZES
from benchmarks.recovery_ours import measure_ours
from benchmarks.recovery_report import PHASES
from benchmarks.recovery_run import Plan, prepare_data

_LIMIT_S: Final = 60.0


def run(options: argparse.Namespace, report: Report) -> None:
    """Kill a worker of a single node and of three nodes, then kill a node."""
    data_url = prepare_data(options.work / "data")
    for kind, nodes in (("worker", 1), ("worker", 3), ("node", 3)):
        case = f"{kind} killed, {nodes} node{'s' if nodes > 1 else ''}"
        with report.attempt(case):
            plan = Plan(
                nodes=nodes,
                repeats=SIZES[options.size].recoveries,
                limit_s=_LIMIT_S,
                directory=options.work / f"{kind}-{nodes}",
                seed=1,
                tell=lambda line: print(line, flush=True),
                overrides=(f'train.device="{options.device}"', "elastic.workers_per_node=1"),
            )
            summary = measure_ours(kind, plan, data_url)
            if summary.get("p50") is None:
                report.row(case, f"not measured: {summary}", failed=True)
                continue
            phases = ", ".join(f"{name} {summary['phases'][name]:.3f}" for name in PHASES)
            report.row(
                case,
                f"p50 {summary['p50']:.3f} s of {summary['repeats']}: {phases}",
                **summary,
            )
