"""Plays scenarios on stock torchrun with FSDP2 and torch.distributed.checkpoint, by the same harness: nodes, moments, faults.

    python -m chaos_tests.stock --json FILE [NAME ...]

torchrun has the c10d rendezvous on node-0 and its tuned settings (`benchmarks.recovery_peer.SETTINGS`), which a user would
have to find first. The script is benchmarks/torchrun_peer.py: it checkpoints every 6 steps to a directory. Its data is
synthetic, so there is no ledger; what is judged is whether it trains again, after how long, and how many steps it lost.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.recovery_peer import SETTINGS
from elastic_pt.chaos.arena import Arena
from elastic_pt.chaos.machine import Machine
from elastic_pt.chaos.play import Played, Player, Progress, Struck
from elastic_pt.chaos.processes import marked
from elastic_pt.chaos.scenario import Scenario, load
from elastic_pt.chaos.workbench import Workbench
from elastic_pt.failpoints import VARIABLE

ROWS: Final = (
    *("killed-worker", "killed-agent", "killed-node", "killed-leader", "rack-lost"),
    *("hung-worker", "stopped-agent", "link-down", "partitioned-leader", "one-way-link"),
    *("node-leaves", "node-joins", "all-nodes-lost"),
)
LONGEST_S: Final = 120.0
_SCRIPT: Final = Path(__file__).parents[1] / "benchmarks" / "torchrun_peer.py"
_PORT: Final = 29400
_SETTING: Final = SETTINGS["torchrun_tuned"]


@dataclass(frozen=True)
class Stock:
    """What became of a run of stock torchrun."""

    name: str
    outcome: str
    """`completed`, `ended` (by itself, before its last step) or `stuck` (no end within the limit)."""
    recovery_s: float | None
    """The longest time without a new step after the last fault; None if there was none."""
    lost_steps: int | None


class StockArena(Arena):
    """Nodes of stock torchrun, one worker each."""

    def _launch(self, key: str, node: str, settings: Sequence[str], *, other_code: bool) -> None:
        assert self.network is not None
        first = self.nodes[0]
        conf = (*_SETTING.rendezvous, f"is_host={int(node == first)}")
        variables = {
            VARIABLE: self._hooks.rules(node, self._points),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            **_SETTING.environment,
        }
        self._started.add(key)
        self._fleet.launch(
            key,
            [
                *self.network.prefix(node),
                *("env", *(f"{name}={value}" for name, value in variables.items())),
                *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"),
                f"--rdzv-endpoint={self.network.address(first)}:{_PORT}",
                *("--rdzv-id=stock", f"--nnodes=1:{len(self.nodes)}", "--nproc-per-node=1"),
                *("--max-restarts=1000", f"--rdzv-conf={','.join(conf)}"),
                *(f"--local-addr={self.network.address(node)}", *_SETTING.arguments),
                *(str(_SCRIPT), str(self.directory / "stock")),
                f"--timeout={_SETTING.collective_timeout_s}",
                f"--checkpoint-steps={self.config.checkpoint.every_steps}",
                f"--steps={self.config.train.steps}",
            ],
        )

    def workers(self, node: str) -> list[int]:
        """Process ids of a node's workers: torchrun starts them itself."""
        if node not in self.running():
            return []
        agent = self._fleet.pid(node)
        return sorted(pid for pid, parent in marked(self.mark).items() if parent == agent)


def play(scenario: Scenario, workbench: Workbench, folder: Path) -> Stock:
    """Play one scenario, in a directory instead of a bucket."""
    local = scenario.model_copy(update={"store": "directory", "longest_s": LONGEST_S})
    folder.mkdir()
    site = workbench.site(local, folder)
    (folder / "stock").mkdir()
    player = Player(local, 1, site.config, folder, network=True, arena=StockArena)
    return judged(player.play())


def judged(played: Played) -> Stock:
    """What it came to."""
    steps = played.config.train.steps
    begun = [(each.time_s, each.step) for each in played.progress]
    outcome = "stuck" if played.timed_out else "ended"
    if any(step == steps - 1 for _, step in begun) and 0 in played.exit_codes.values():
        outcome = "completed"
    if not played.struck:
        return Stock(played.scenario.name, outcome, None, None)
    last = played.struck[-1]
    pause_s, lost = pause_and_loss(played.progress, last)
    return Stock(played.scenario.name, outcome, pause_s, lost)


def pause_and_loss(progress: Sequence[Progress], fault: Struck) -> tuple[float | None, int | None]:
    """The longest time without a new step after a fault, in seconds, and the most steps that were done again at once.

    Both None if no new step followed. Nodes that start disturb nobody at first: then the time begins with a step.
    """
    since = [fault.time_s]
    if fault.spec.of.starts_nodes:
        since = []
    newest, lost = (
        max((each.step for each in progress if each.time_s <= fault.time_s), default=-1),
        0,
    )
    for each in progress:
        if each.time_s <= fault.time_s:
            continue
        lost = max(lost, newest - each.step)
        if each.step > newest:
            newest = each.step
            since.append(each.time_s)
    if len(since) < 2:
        return None, None
    return round(max(after - before for before, after in itertools.pairwise(since)), 2), lost


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(ROWS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not Machine().networks:
        parser.error("expected root on Linux: each node has a network of its own")
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="elastic_pt-stock-") as folder,
        Workbench(Path(folder) / "bench") as workbench,
    ):
        for name in options.names:
            results.append(play(load(name), workbench, Path(folder) / name))
            print(results[-1], flush=True)
    if options.json:
        options.json.write_text(
            json.dumps([dataclasses.asdict(each) for each in results], indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
