"""`checkpoint`, `pause`, `resume`, `drain` and `stop`: real agents do what is asked of their run by its URL alone."""

import re
import shutil
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import CONFIG, Trained, assert_one_line_mistake, elastic_pt

from elastic_pt.config import load_config
from elastic_pt.fleet.local import Fleet
from elastic_pt.runlog.log import RunLog, record_key
from elastic_pt.runlog.records import Commit, Verb
from elastic_pt.store.open import open_store

WAIT_S = 120.0
SLOW = ("steps = 240", "steps = 200"), ("width = 16", "width = 128"), ("length = 16", "length = 64")
"""Steps that take long enough for a request to be noticed within the run."""


def configuration(prepared: Trained, folder: Path, name: str) -> Path:
    """The configuration of a run with slow steps."""
    folder.mkdir(exist_ok=True)
    text = CONFIG.format(run=folder / name, data=prepared.data)
    for old, new in SLOW:
        assert old in text
        text = text.replace(old, new)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


@pytest.fixture
def undisturbed(prepared: Trained, tmp_path: Path) -> str:
    """The digest of the run with slow steps when nobody disturbs it."""
    path = configuration(prepared, tmp_path, "undisturbed")
    assert elastic_pt("local", path, "--nodes", 1).exit_code == 0
    digest: str = elastic_pt("digest", tmp_path / "undisturbed", "--json").json["sha256"]
    return digest


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll until a condition holds."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


def done(*arguments: object) -> Any:
    """What a command says that has waited until it was done."""
    result = elastic_pt(*arguments, "--wait", "--timeout", WAIT_S, "--json")
    assert result.exit_code == 0, result
    assert result.json["done"] is True
    return result.json


def seconds_in(metrics_url: str, state: str) -> float:
    """How long a node was in a state of the time ledger."""
    with urllib.request.urlopen(metrics_url, timeout=WAIT_S) as answer:
        text = answer.read().decode()
    found = re.search(
        rf'^elastic_pt_time_seconds_total{{.*state="{state}"}} (.*)', text, re.MULTILINE
    )
    assert found is not None, text
    return float(found[1])


def test_a_run_is_paused_resumed_checkpointed_and_drained_to_the_same_bits(
    prepared: Trained, undisturbed: str, tmp_path: Path
) -> None:
    """A pause outlives its agents and counts as such in their time, a drained agent ends with 0, and the digest is that of the undisturbed run."""
    path, url = configuration(prepared, tmp_path, "steered"), tmp_path / "steered"
    config = load_config(path, ["elastic.join_window_s=3.0"])
    with Fleet(config, tmp_path / "output") as fleet:
        fleet.start("a")
        fleet.start("b")
        until(lambda: any(url.glob("ckpt/*/manifest.json")), fleet.tail("a"))
        paused = done("pause", url, "--reason", "maintenance")
        assert 20 <= paused["step"] < 200
        status = elastic_pt("status", url, "--json").json
        assert status["state"] == "paused"
        assert status["reason"] == f"asked for by {paused['by']}: maintenance"
        assert status["step"] == status["commit"]["step"] == paused["step"]
        assert [each["phase"] for each in status["members"]] == ["waiting", "waiting"]
        for node in "ab":
            fleet.kill(node)
            fleet.start(node)
        wanted = elastic_pt("checkpoint", url, "--json").json
        assert wanted["done"] is False

        def waiting() -> list[str]:
            found = elastic_pt("status", url, "--json").json
            assert found["state"] == "paused", found
            return [each["node"] for each in found["waiting"]]

        until(lambda: sorted(waiting()) == ["a", "b"], fleet.tail("a"))
        done("resume", url)
        for member in elastic_pt("status", url, "--json").json["members"]:
            assert seconds_in(member["metrics_url"], "paused_on_request") > 0.0
        done("drain", url, "--node", "b", "--deadline", 60)
        assert elastic_pt("log", url, "--json").out.count('"STOP"') == 0, "the run was too short"
        assert fleet.wait(WAIT_S) == {"a": 0, "b": 0}
    assert elastic_pt("digest", url, "--json").json["sha256"] == undisturbed
    explained = elastic_pt("log", url, "--explain").out
    assert f"pause asked for by {paused['by']}: maintenance" in explained
    assert "node b left after step " in explained
    text = elastic_pt("log", url).out
    assert f"drain of node b within 60 s asked for by {paused['by']}  (by elastic-pt)" in text
    assert f"done: drain of node b within 60 s asked for by {paused['by']}  (by b)" in text
    records = RunLog(open_store(f"file://{url}"), writer="x").records()
    met = [each.body.request for each in records if isinstance(each.body, Commit)]
    assert wanted["index"] in met, "the checkpoint that was asked for in the pause was committed"


def test_a_run_is_checkpointed_and_stopped(prepared: Trained, tmp_path: Path) -> None:
    """`--wait` returns after the COMMIT and after STOP; agents end with 7, the log says who asked, `reopen` lifts it."""
    url = tmp_path / "stopped"
    overrides = [f"run.url={url}", "train.steps=1000000", "checkpoint.every_steps=1000000"]
    with Fleet(load_config(prepared.config, overrides), tmp_path / "output") as fleet:
        fleet.start("a")
        until(lambda: any(url.glob("log/*")), fleet.tail("a"))
        committed = done("checkpoint", url)
        first = elastic_pt("status", url, "--json").json["commit"]["step"]
        assert first == committed["step"] > 0
        assert done("checkpoint", url)["step"] > first
        stopped = done("stop", url, "--reason", "out of budget")
        assert stopped["ended"] == f"stopped by {stopped['by']}: out of budget"
        assert stopped["step"] > first
        assert fleet.wait(WAIT_S) == {"a": 7}
    status = elastic_pt("status", url, "--json").json
    assert (status["state"], status["reason"]) == ("failed", stopped["ended"])
    assert status["commit"]["step"] == stopped["step"]
    for verb in ("checkpoint", "pause", "resume"):
        assert_one_line_mistake(elastic_pt(verb, url), "has ended: stopped by", "expected")
    assert elastic_pt("reopen", url, "--why", "more money").exit_code == 0
    assert elastic_pt("status", url, "--json").json["state"] == "down"


@pytest.fixture
def live(trained: Trained, tmp_path: Path) -> Path:
    """A run that has not ended and has no agents."""
    url = tmp_path / "live"
    shutil.copytree(trained.run, url)
    log = RunLog(open_store(f"file://{url}"), writer="test")
    (url / record_key(log.refresh().length - 1)).unlink()
    return url


def test_a_request_that_nobody_carries_out_is_recorded_and_still_holds(live: Path) -> None:
    """Without agents a verb returns 0 once it is recorded; with `--wait` it ends with 9 after the timeout."""
    assert elastic_pt("pause", live).exit_code == 0
    late = elastic_pt("pause", live, "--wait", "--timeout", 0.1)
    assert_one_line_mistake(late, "recorded, but not done within 0.1 s", "still holds", exit_code=9)
    found = elastic_pt("status", live, "--json").json
    assert found["state"] == "paused"
    assert found["reason"].endswith("; not reached yet; no agent answers")
    assert elastic_pt("resume", live, "--wait").exit_code == 0
    assert elastic_pt("status", live, "--json").json["state"] == "down"


def test_a_reason_has_no_secret(live: Path) -> None:
    """The log keeps what an operator wrote, and every reader of the run sees it."""
    why = "rotated  secret_access_key=0123456789abcdef"
    assert elastic_pt("pause", live, "--reason", why).exit_code == 0
    log = RunLog(open_store(f"file://{live}"), writer="test")
    request = log.refresh().request(Verb.PAUSE)
    assert request is not None
    assert request.why == "rotated secret_access_key=[redacted]"


def test_a_request_that_makes_no_sense_is_refused(live: Path, trained: Trained) -> None:
    """A run that is not there or has ended, an empty reason or node, a reason as long as a book: one line, code 2."""
    assert_one_line_mistake(elastic_pt("pause", live.parent / "nothing"), "no run there")
    assert_one_line_mistake(elastic_pt("pause", trained.run), "has ended: completed")
    assert_one_line_mistake(elastic_pt("stop", live, "--reason", " "), "--reason ' ': expected")
    assert_one_line_mistake(elastic_pt("stop", live), "--reason")
    assert_one_line_mistake(elastic_pt("pause", live, "--reason", "x" * 501), "at most 500")
    assert_one_line_mistake(elastic_pt("drain", live, "--node", ""), "--node '': expected")
    assert_one_line_mistake(elastic_pt("drain", live, "--node", "a", "--deadline=-1"), "--deadline")
