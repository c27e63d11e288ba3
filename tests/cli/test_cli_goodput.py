"""`goodput` as text: what a person reads, and that a real run's figures are whole."""

import dataclasses
from pathlib import Path

import pytest
from command_line import Trained, elastic_pt

from elastic_pt.cli.goodput import goodput_lines
from elastic_pt.report.goodput import PHASES, AgentTime, FailureCost, Goodput
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Generation, Member
from elastic_pt.store.open import open_store
from elastic_pt.telemetry.goodput import Bucket

SECONDS = dict.fromkeys(Bucket, 0.0) | {
    Bucket.PRODUCTIVE: 7200.0,
    Bucket.PAUSED_BELOW_MINIMUM: 90.0,
    Bucket.RECOMPUTE: 510.0,
}
AGENT = AgentTime("a", "a1", 0.0, 7800.0, True, SECONDS, 3.0)
COST_S = dict.fromkeys(PHASES, 0.0) | {"detect": 8.0, "recompute": 400.0}
FOUND = Goodput(
    node_seconds=7800.0,
    buckets=SECONDS,
    goodput=7200 / 7800,
    failures=(FailureCost(2, ("lost b", "c: killed by SIGKILL"), COST_S),),
    cost=6.5,
    agents=(AGENT,),
)


def test_goodput_is_one_table_with_the_largest_share_first() -> None:
    """A person reads the share, the time and the money of each bucket, and of each failure."""
    assert goodput_lines(FOUND) == [
        "goodput     92.3 %",
        "node time   2.2 h, 1 agent, 1 of them running",
        "cost        6.50 USD",
        "",
        "productive              92.3 %         2.0 h        6.00 USD",
        "recompute                6.5 %       8.5 min        0.43 USD",
        "paused below minimum     1.2 %        90.0 s        0.08 USD",
        "",
        "failures    node time by phase",
        "generation 2: lost b; c: killed by SIGKILL: 6.8 min, 0.34 USD (detect 8.0 s, recompute 6.7 min)",
    ]


def test_cost_of_a_part_of_the_agents_says_so() -> None:
    """Without the price of one agent the cost is too low: a person reads that, and no price of a failure."""
    free = dataclasses.replace(AGENT, node="b", price_per_hour=0.0)
    lines = goodput_lines(dataclasses.replace(FOUND, node_seconds=15600.0, agents=(AGENT, free)))
    assert lines[2] == "cost        6.50 USD, of 1 of 2 agents: the others have no price"
    assert lines[4].endswith("6.00 USD")
    assert "USD" not in lines[-1]


def test_unknown_cost_of_a_failure_is_told() -> None:
    """A failure of which no phase is known costs neither 0.0 s nor 0.00 USD."""
    unknown = FailureCost(6, ("no member of generation 5 was left",), dict.fromkeys(PHASES, 0.0))
    assert goodput_lines(dataclasses.replace(FOUND, failures=(unknown,)))[-1] == (
        "generation 6: no member of generation 5 was left: its cost is not known"
    )


def test_run_without_accounts_says_so(tmp_path: Path) -> None:
    """A run of an earlier version, or of stock torchrun, is no error: it has no figures."""
    log = RunLog(open_store(f"file://{tmp_path}"), writer="test")
    log.refresh()
    member = Member("a", "a1", "127.0.0.1", 1, 1, 1)
    log.append(
        lambda _: Generation(1, (member,), (), "127.0.0.1", 1, None, "started"), generation=0
    )
    result = elastic_pt("goodput", tmp_path)
    assert (result.exit_code, result.err) == (0, "")
    assert result.out.startswith("no agent of this run has left an account of its time")


def test_real_run_adds_up_and_has_ended(trained: Trained) -> None:
    """The buckets of a completed run add up to its node-seconds, and most kinds of its time are there."""
    found = elastic_pt("goodput", trained.run, "--json").json
    assert sum(found["buckets"].values()) == pytest.approx(found["node_seconds"], rel=0.005)
    assert found["cost"] is None
    assert found["failures"] == []
    assert not any(agent["running"] for agent in found["agents"])
    for bucket in ("start", "restore", "productive", "data_wait", "checkpoint_stall"):
        assert found["buckets"][bucket] > 0.0, bucket
    text = elastic_pt("goodput", trained.run).out
    assert text.startswith("goodput  ")
    assert "USD" not in text
