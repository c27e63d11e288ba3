"""Made-up results of chaos runs, for what shows them."""

from dataclasses import replace
from pathlib import Path

from elastic_pt.chaos.play import Happening, Played, Struck
from elastic_pt.chaos.result import Cost, Result, Verdict
from elastic_pt.chaos.scenario import Scenario, read_scenario
from elastic_pt.config import parse_config
from elastic_pt.report.goodput import Goodput
from elastic_pt.telemetry.goodput import Bucket

TEXT = """
hypothesis = "A run goes on <after> a freeze & a loss."
nodes = 2
replace_after_s = 2

[[faults]]
kind = "node_freezes"
node = "leader"
at = { step = 8 }
for_s = 6

[[faults]]
kind = "kill_node"
node = "all"
at = { seconds = 9 }
"""
HAPPENINGS = (
    Happening(
        3.0, "generation", "generation 1: node-0, node-1; started", "", ("node-0", "node-1"), 1
    ),
    Happening(4.0, "fault", "node_freezes leader at step 8 for 6 s", "node-0", number=1),
    Happening(8.5, "generation", "generation 2: node-1; lost node-0", "", ("node-1",), 2),
    Happening(10.0, "healed", "node_freezes", "node-0", number=1),
    Happening(12.0, "fault", "kill_node all after 9 s", "node-0+node-1", number=2),
    Happening(12.1, "ended", "killed", "node-0"),
    Happening(12.1, "ended", "killed", "node-1"),
    Happening(14.0, "started", "a new machine", "node-0"),
    Happening(19.0, "generation", "generation 3: node-0; started", "", ("node-0",), 3),
    Happening(24.0, "stop", "step 48: completed"),
    Happening(24.5, "ended", "exit code 0", "node-0"),
)


def scenario() -> Scenario:
    """Two nodes: one freezes, then both are lost."""
    return read_scenario(TEXT, "frozen.toml", "frozen")


def result(directory: Path, *, passed: bool = True) -> Result:
    """What became of it."""
    played_scenario = scenario()
    freeze, kill = played_scenario.faults
    config = parse_config(f'[run]\nurl = "{directory}"\n[data]\nurl = "data"\n', source="test")
    played = Played(
        played_scenario,
        5,
        config,
        directory,
        struck=[
            replace(Struck(1, freeze, ("node-0",), 4.0, 1e9, 1, 8), healed_s=10.0),
            Struck(2, kill, ("node-0", "node-1"), 12.0, 1e9 + 8, 2, 20),
        ],
        happenings=list(HAPPENINGS),
        exit_codes={"node-0": 0},
        seconds=24.5,
    )
    buckets = dict.fromkeys(Bucket, 0.0) | {Bucket.PRODUCTIVE: 20.0, Bucket.START: 12.0}
    goodput = Goodput(32.0, buckets, 20.0 / 32.0, (), None, ())
    verdicts = (
        Verdict("digest", passed, "step 48: abc, expected def"),
        Verdict("ledger", True, "48 steps"),
    )
    costs = (Cost(1, 4.5, 2), Cost(2, 7.0, 3))
    return Result(played, verdicts, costs, goodput, "elastic-pt chaos run frozen.toml --seed 5")
