"""`status`, `log` and `checkpoints`: a run read from its URL."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import STEPS, Trained, assert_one_line_mistake, elastic_pt

from elastic_pt.cli.reading import status_lines
from elastic_pt.config import load_config
from elastic_pt.fleet.local import Fleet
from elastic_pt.membership.decision.at_risk import AtRisk
from elastic_pt.membership.decision.status import NodePhase, NodeStatus
from elastic_pt.report.history import read_steps
from elastic_pt.report.status import CommitReport, RunStatus, State, judge, open_run
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Control, Generation, Member, Request, Stop, Verb

WAIT_S = 60.0


def test_status_of_a_completed_run(trained: Trained) -> None:
    """The log alone is enough to show a finished run: step, loss, members, newest checkpoint."""
    status = elastic_pt("status", trained.run, "--json").json
    assert (status["state"], status["step"], status["generation"]) == ("completed", STEPS, 1)
    assert status["world_size"] == 1
    assert 0 < status["loss"] < 10
    (member,) = status["members"]
    assert (member["node"], member["address"], member["slots"]) == ("node-1", "127.0.0.1", 4)
    assert isinstance(member["pid"], int)
    assert status["commit"]["step"] == STEPS
    assert status["commit"]["age_s"] >= 0
    assert status["at_risk_steps"] == {"node": 0, "any_node": 0, "all": 0}
    assert "completed" in elastic_pt("status", f"file://{trained.run}").out


def test_status_shows_a_live_run_and_then_a_down_run(prepared: Trained, tmp_path: Path) -> None:
    """While an agent answers, `status` has its current step and process id. After its death the run is down."""
    url = tmp_path / "live"
    config = load_config(prepared.config, [f"run.url={url}", "train.steps=1000000"])
    with Fleet(config, tmp_path / "output") as fleet:
        pid = fleet.start("solo")
        deadline_s = time.monotonic() + WAIT_S
        while True:
            result = elastic_pt("status", url, "--json")
            status = result.json if result.exit_code == 0 else {"step": 0}
            if status["step"] > 0 and status["commit"] is not None:
                break
            assert time.monotonic() < deadline_s, fleet.tail("solo")
            time.sleep(0.1)
        assert status["state"] == "running"
        assert [(each["node"], each["pid"]) for each in status["members"]] == [("solo", pid)]
        assert status["members"][0]["metrics_url"].startswith("http://")
        # A lone node has no mirror: with it all steps since the commit are lost.
        since_commit = status["step"] - status["commit"]["step"]
        assert status["at_risk_steps"]["all"] == max(0, since_commit)
        assert status["at_risk_steps"]["node"] == status["at_risk_steps"]["all"]
        later = elastic_pt("status", url, "--json").json
        assert later["step"] > status["step"] or later["step"] > later["commit"]["step"]
        fleet.kill("solo")
    status = elastic_pt("status", url, "--json").json
    assert status["state"] == "down"
    assert status["step"] == status["commit"]["step"]
    assert "down" in elastic_pt("status", url).out


def test_run_below_nodes_min_is_paused_until_a_node_joins(
    prepared: Trained, tmp_path: Path
) -> None:
    """With one node too few the state is `paused`, with the reason. A new node ends the pause. The log explains both."""
    url = tmp_path / "paused"
    overrides = [f"run.url={url}", "train.steps=1000000", "elastic.nodes_min=2"]

    def until(state: str, generation: int) -> Any:
        deadline_s = time.monotonic() + WAIT_S
        while True:
            result = elastic_pt("status", url, "--json")
            found = result.json if result.exit_code == 0 else {"state": "", "generation": 0}
            if (found["state"], found["generation"]) == (state, generation) and found["step"] > 0:
                return found
            assert time.monotonic() < deadline_s, (result.out, fleet.tail("a"), fleet.tail("b"))
            time.sleep(0.05)

    with Fleet(load_config(prepared.config, overrides), tmp_path / "output") as fleet:
        fleet.start("a")
        fleet.start("b")
        until("running", 1)
        fleet.kill("b")
        paused = until("paused", 1)
        assert paused["reason"] == "1 of at least 2 nodes; no answer from b"
        fleet.start("b")
        until("running", 2)
        deadline_s = time.monotonic() + WAIT_S
        while "training again" not in (found := elastic_pt("log", url, "--explain").out):
            assert time.monotonic() < deadline_s, found
            time.sleep(0.05)
    assert "generation 2 (2 nodes, world 2): node b lost at step " in found
    assert "; node b joined after step " in found


NODES = [Member(node, f"{node}1", "127.0.0.1", 1, 1, 1) for node in "abc"]


def view_of(*, members: int = 2, stop: Stop | None = None) -> RunView:
    """A view of a log. Its newest generation has `members` nodes; without members there is no generation."""
    found = Generation(3, tuple(NODES[:members]), (4,), "127.0.0.1", 2, None, "started")
    return RunView(generations=(found,) if members else (), stop=stop)


def answer_of(node: int, phase: NodePhase, **changes: object) -> NodeStatus:
    """The status of a member."""
    status = NodeStatus(NODES[node], phase, 3, 1, 0, None, {})
    return dataclasses.replace(status, **changes)  # type: ignore[arg-type]


RUNS, SETTLES, WAITS = (
    [answer_of(0, phase)] for phase in (NodePhase.RUNNING, NodePhase.SETTLING, NodePhase.WAITING)
)
BOTH_WAIT = [*WAITS, answer_of(1, NodePhase.WAITING)]


@pytest.mark.parametrize(
    ("view", "answers", "waiting", "nodes_min", "state"),
    [
        (view_of(members=0), [], 0, 1, State.NEW),
        (view_of(members=0), [], 2, 3, State.NEW),
        (view_of(), RUNS, 0, 1, State.RUNNING),
        (view_of(), SETTLES, 0, 2, State.RUNNING),
        (view_of(), BOTH_WAIT, 0, 2, State.RUNNING),
        (view_of(), WAITS, 0, 2, State.PAUSED),
        (view_of(), [], 1, 2, State.PAUSED),
        (view_of(), [], 2, 2, State.RUNNING),
        (view_of(), [], 0, 1, State.DOWN),
        (view_of(stop=Stop("completed", 9)), [], 0, 1, State.COMPLETED),
        (view_of(stop=Stop("diverged: loss is nan", 9)), RUNS, 0, 1, State.FAILED),
    ],
)
def test_state_follows_from_log_and_answers(
    view: RunView, answers: list[NodeStatus], waiting: int, nodes_min: int, state: State
) -> None:
    """Each state has the meaning that `report.status` defines."""
    assert judge(view, answers, waiting, nodes_min)[0] is state


def test_ages_are_told_in_units_for_people() -> None:
    """A commit of days ago has days in its line, not hundreds of thousands of seconds."""
    commit = CommitReport(20, 230_448.1, "ckpt/x")
    status = RunStatus(
        "url", State.DOWN, "", 1, 1, 20, None, None, (), (), commit, (), AtRisk(0, 0, 0), None
    )
    assert "commit      step 20, 2 d 16 h ago" in status_lines(status)


def test_new_run_shows_how_many_nodes_are_missing() -> None:
    """Before the first generation the reason has the nodes that wait and `nodes_min`."""
    _, reason = judge(view_of(members=0), [], 2, 3)
    assert reason == "2 of at least 3 nodes wait for the start"


def test_the_reason_of_a_run_that_trains_is_that_of_its_generation() -> None:
    """A run that trains names its generation with the reason, so that `b joins` does not read as if it joined just now."""
    assert judge(view_of(), RUNS, 0, 1) == (State.RUNNING, "generation 3: started")


PAUSE = Request(Verb.PAUSE, "ann@desk", "maintenance", index=7)
REACHED = dataclasses.replace(PAUSE, done=True)


@pytest.mark.parametrize(
    ("request_", "answers", "found"),
    [
        (REACHED, BOTH_WAIT, (State.PAUSED, "asked for by ann@desk: maintenance")),
        (REACHED, [], (State.PAUSED, "asked for by ann@desk: maintenance; no agent answers")),
        (PAUSE, BOTH_WAIT, (State.PAUSED, "asked for by ann@desk: maintenance; not reached yet")),
        (PAUSE, RUNS, (State.RUNNING, "pause asked for by ann@desk: maintenance")),
    ],
)
def test_a_run_that_an_operator_has_paused_tells_who_and_why(
    request_: Request, answers: list[NodeStatus], found: tuple[State, str]
) -> None:
    """It is paused whether its agents are up or not, and running until its workers have stopped."""
    view = dataclasses.replace(view_of(), control=Control(request_, (request_,), 0))
    assert judge(view, answers, 0, 1) == found
    assert judge(dataclasses.replace(view, generations=()), [], 0, 1)[0] is State.PAUSED


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (BOTH_WAIT, "2 of at least 3 nodes; no answer from c"),
        (
            [*BOTH_WAIT, answer_of(2, NodePhase.WAITING, leaving=True)],
            "2 of at least 3 nodes; about to leave: c",
        ),
        (
            [*BOTH_WAIT, answer_of(2, NodePhase.WAITING, unreachable=("a1", "b1"))],
            "2 of at least 3 nodes; not linked to all others: c",
        ),
        (
            [answer_of(1, NodePhase.WAITING, unreachable=("c1",))],
            "1 of at least 3 nodes; no answer from a, c",
        ),
    ],
    ids=["lost", "leaving", "parked", "unreachable and lost"],
)
def test_paused_run_shows_which_nodes_are_missing_and_why(
    answers: list[NodeStatus], reason: str
) -> None:
    """Answering nodes count only if they can train together. The reason names each missing node, and why."""
    assert judge(view_of(members=3), answers, 0, 3) == (State.PAUSED, reason)


def test_log_has_a_line_per_record(trained: Trained) -> None:
    """The whole log is printed in order, for people and for programs."""
    records = [
        json.loads(line) for line in elastic_pt("log", trained.run, "--json").out.splitlines()
    ]
    kinds = [record["kind"] for record in records]
    assert (kinds[0], kinds[-1]) == ("GENERATION", "STOP")
    assert set(kinds[1:-1]) == {"RECOVERY", "COMMIT"}
    assert [record["index"] for record in records] == list(range(len(records)))
    for before, after in itertools.pairwise(records):
        assert after["previous"] == before["sha256"]
    lines = elastic_pt("log", trained.run).out.splitlines()
    assert len(lines) == len(records)
    assert "node-1" in lines[0]
    commit = kinds.index("COMMIT")
    assert f"step {records[commit]['body']['checkpoints'][0]['step']} " in lines[commit]
    assert "generation 1 to its first step in " in lines[kinds.index("RECOVERY")]
    assert "completed" in lines[-1]


def test_log_notices_a_change_and_a_gap(trained: Trained, tmp_path: Path) -> None:
    """A record that was altered or removed ends `log` with one line that names it, and exit code 4."""
    altered, gap = tmp_path / "altered", tmp_path / "gap"
    for copy in (altered, gap):
        shutil.copytree(trained.run, copy)
    record = altered / "log" / f"{1:020d}.json"
    record.write_text(record.read_text().replace('"nonce": "', '"nonce": "0', 1))
    result = elastic_pt("log", altered)
    assert result.exit_code == 4
    assert "00002.json: does not follow" in result.err
    assert result.err.count("\n") == 1
    (gap / "log" / f"{1:020d}.json").unlink()
    result = elastic_pt("log", gap)
    assert result.exit_code == 4
    assert "00001.json: missing" in result.err
    assert result.err.count("\n") == 1


def test_kept_checkpoints_are_listed_newest_first(trained: Trained) -> None:
    """Only committed checkpoints that are kept are listed, newest first."""
    entries = elastic_pt("checkpoints", trained.run, "--json").json
    assert [entry["step"] for entry in entries] == sorted(trained.kept, reverse=True)
    assert entries[0]["step"] == STEPS
    assert all("problems" not in entry and entry["quarantine"] is None for entry in entries)
    lines = elastic_pt("checkpoints", trained.run).out.splitlines()
    assert [int(line.split()[1]) for line in lines] == [entry["step"] for entry in entries]


def test_checkpoints_verify_names_a_damaged_file(trained: Trained, tmp_path: Path) -> None:
    """--verify reads every byte. A damaged file is named and the exit code is 4."""
    well = elastic_pt("checkpoints", trained.run, "--verify", "--json")
    assert well.exit_code == 0
    assert all(entry["problems"] == [] for entry in well.json)
    copy = tmp_path / "run"
    shutil.copytree(trained.run, copy)
    newest, damaged, oldest = trained.kept
    flip(copy, damaged)
    result = elastic_pt("checkpoints", copy, "--verify", "--json")
    assert result.exit_code == 4
    problems = {entry["step"]: entry["problems"] for entry in result.json}
    assert problems[newest] == problems[oldest] == []
    assert "shard-" in problems[damaged][0]
    assert "UNUSABLE" in elastic_pt("checkpoints", copy, "--verify").out


def flip(run: Path, step: int) -> None:
    """Change one bit in the middle of the weights of one checkpoint."""
    (shard,) = run.glob(f"ckpt/{step:010d}-*/shard-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def test_history_has_each_step_once(trained: Trained) -> None:
    """The history of a run is one entry per committed step, in order."""
    run = open_run(f"file://{trained.run}")
    history = list(read_steps(run.store, run.log.records()))
    assert [entry["step"] for entry in history] == list(range(1, STEPS + 1))
    assert all(entry["loss"] > 0 and entry["generation"] == 1 for entry in history)


@pytest.mark.parametrize("command", ["status", "log", "checkpoints", "digest", "eval"])
def test_missing_run_is_one_error_line(command: str, tmp_path: Path) -> None:
    """A URL without a run is an error of one line with exit code 2, and nothing is created there."""
    assert_one_line_mistake(elastic_pt(command, tmp_path / "nothing"), "nothing", "no run there")
    assert not (tmp_path / "nothing").exists()


def test_closed_pipe_prints_no_traceback(trained: Trained) -> None:
    """`elastic-pt log | head` ends quietly, without a traceback."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "elastic_pt", "log", str(trained.run)]
    with os.fdopen(write, "w") as closed:
        result = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, timeout=60)
    assert result.stderr == b""
    assert result.returncode == 1
