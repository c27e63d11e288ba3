"""How long training stops after a fault or a change of the members, with real agents on this machine.

    python benchmarks/recovery.py [--repeats 30] [--kinds worker,node] [--peer torchrun] [--json FILE]

    worker   SIGKILL to one worker          silent   a node's link goes down without a reset (as root)
    node     SIGKILL to a whole node        hang     SIGSTOP to one worker
    two_nodes  SIGKILL to two nodes at once, of at least four, of which neither mirrors the other
    join     another node is started        leave    SIGTERM to one agent

It prints p50 and p99 of the seconds from the disturbance to the first complete optimizer step of the new generation.
For `join` and `leave` it is the time that survivors wait for their next step, minus a normal step. Each node is the
victim in turn, also the node of rank 0, after a random number of steps. Beside the seconds it prints the steps that were
lost: reported by a member, then done again. With `--peer torchrun`, stock torchrun with
FSDP2 and torch.distributed.checkpoint trains the same model on the same machine, with its defaults and tuned, and is
disturbed in the same ways.
"""

import argparse
import dataclasses
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

# If this file is run as a script, Python searches modules in its folder. The imports start at the root of the checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.recovery_ours import measure_ours
from benchmarks.recovery_peer import SETTINGS, measure_peer
from benchmarks.recovery_report import KINDS, print_report, targets_of
from benchmarks.recovery_run import Plan, prepare_data
from benchmarks.summary import machine, write_json


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    parser.add_argument(
        "--limit",
        type=float,
        default=60.0,
        help="seconds after which a repetition counts as a failure",
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--directory", type=Path, help="keep runs and logs here")
    parser.add_argument("--peer", choices=["torchrun"])
    parser.add_argument("--peer-repeats", type=int, default=3)
    parser.add_argument("--peer-limit", type=float, default=240.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.kinds = options.kinds.split(",")
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))}; expected some of {', '.join(KINDS)}")
    if options.nodes < 2:
        parser.error("--nodes: expected at least 2")
    return options


@contextmanager
def working_directory(kept: Path | None) -> Iterator[Path]:
    """The directory of runs and logs: that of --directory, or a temporary one."""
    if kept is not None:
        kept.mkdir(parents=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="recovery-") as directory:
        yield Path(directory)


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = parse_arguments()
    console = Console()
    # Exit normally on SIGTERM too, so that all started processes are ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    report: dict[str, Any] = {
        "ours": {},
        "machine": machine(),
        "seed": options.seed,
        "nodes": options.nodes,
        "settings": {},
    }
    console.print(f"seed {options.seed}")
    with working_directory(options.directory) as directory:
        data_url = prepare_data(directory / "data")
        plan = Plan(
            nodes=options.nodes,
            repeats=options.repeats,
            limit_s=options.limit,
            directory=directory / "ours",
            seed=options.seed,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
        for kind in options.kinds:
            report["ours"][kind] = measure_ours(kind, plan, data_url)
            report["targets"] = targets_of(report["ours"])
            write_json(options.json, report)
        if options.peer is not None:
            plan = dataclasses.replace(
                plan,
                repeats=options.peer_repeats,
                limit_s=options.peer_limit,
                directory=directory / "peer",
            )
            for name, setting in SETTINGS.items():
                report[name] = {}
                report["settings"][name] = dataclasses.asdict(setting)
                for kind in options.kinds:
                    report[name][kind] = measure_peer(name, kind, plan)
                    write_json(options.json, report)
    print_report(report, console)


if __name__ == "__main__":
    main()
