"""`targets`: the scrape targets of a run from its URL, printed and in a file that is kept up to date."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import Trained, assert_one_line_mistake, elastic_pt

from elastic_pt.config import ElasticSection
from elastic_pt.membership.decision.status import Limits, NodeStatus
from elastic_pt.membership.endpoints import NODE_LABEL
from elastic_pt.membership.node import Node, new_member, new_node
from elastic_pt.membership.resources import Resources
from elastic_pt.membership.tcp_store import bind_store
from elastic_pt.runlog.access import join_access
from elastic_pt.runlog.log import RunLog
from elastic_pt.store.open import open_store

WAIT_S = 30.0
LIMITS = Limits(
    ElasticSection(nodes_min=2, nodes_max=2, heartbeat_timeout_s=2.0, takeover_s=4.0), slots=8
)

Start = Callable[[str, str], Node]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts real nodes of the run in `run`, with a metrics URL that nobody serves."""
    (tmp_path / "run").mkdir()
    store = open_store(f"file://{tmp_path / 'run'}")
    with ExitStack() as stack:

        def make(name: str, place: str) -> Node:
            member = new_member(name, "127.0.0.1", workers=1)
            node = new_node(
                NodeStatus.first(member, {}, f"http://{place}/metrics"),
                LIMITS,
                Resources(
                    log=RunLog(store, writer=name),
                    hints=store,
                    clock_s=time.monotonic,
                    bind_store=partial(bind_store, "127.0.0.1"),
                    choose_resume=lambda _: None,
                    on_drain=lambda _: None,
                ),
                join_access(store, "test", tls=True),
            )
            node.start()
            stack.callback(node.leave)
            return node

        yield make


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Poll until a condition holds."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def places(told: list[dict[str, Any]]) -> dict[str, str]:
    """Where each node is scraped."""
    return {each["labels"][NODE_LABEL]: each["targets"][0] for each in told}


def test_targets_are_members_and_nodes_that_wait(start: Start, tmp_path: Path) -> None:
    """All nodes that are up are listed, each once: here two members and one for which there is no place."""
    nodes = [start("a", "10.0.0.1:9400"), start("b", "[fd77::2]:9400")]
    eventually(lambda: all(node.view.generation is not None for node in nodes), "no generation")
    start("c", "127.0.0.1:9402")
    expected = {"a": "10.0.0.1:9400", "b": "[fd77::2]:9400", "c": "127.0.0.1:9402"}
    eventually(
        lambda: places(elastic_pt("targets", tmp_path / "run").json) == expected, "no third node"
    )
    nodes[1].leave()
    eventually(
        lambda: "b" not in places(elastic_pt("targets", tmp_path / "run").json), "it has left"
    )


def test_the_file_follows_the_nodes(start: Start, tmp_path: Path) -> None:
    """With --follow the file is a whole list at each moment; when all nodes are gone it is empty."""
    nodes = [start("a", "10.0.0.1:9400"), start("b", "10.0.0.2:9400")]
    eventually(lambda: nodes[0].view.generation is not None, "no generation")
    file = tmp_path / "targets.json"
    command = [sys.executable, "-m", "elastic_pt", "targets", str(tmp_path / "run")]
    command += ["--out", str(file), "--follow", "1"]
    following = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        eventually(file.exists, "no file")
        assert places(json.loads(file.read_text())) == {"a": "10.0.0.1:9400", "b": "10.0.0.2:9400"}
        assert file.stat().st_mode & 0o777 == 0o644, "Prometheus is another user"
        # The bucket fails: the list stays, and so does the command.
        token = tmp_path / "run" / "secret" / "token"
        token.rename(tmp_path / "run" / "away")
        token.mkdir()
        assert b"targets_not_told" in following.stderr.readline()  # type: ignore[union-attr]
        assert len(json.loads(file.read_text())) == 2
        token.rmdir()
        (tmp_path / "run" / "away").rename(token)
        for node in nodes:
            node.leave()
        eventually(lambda: json.loads(file.read_text()) == [], "the nodes stay in the list")
        assert sorted(each.name for each in tmp_path.iterdir()) == ["run", "targets.json"]
    finally:
        following.kill()
        following.wait()


def test_a_run_that_is_over_has_no_targets(trained: Trained) -> None:
    """Nobody answers any more: the list is empty, and that is no error."""
    assert elastic_pt("targets", trained.run).json == []


def test_follow_waits_for_a_run_that_is_not_there_yet(trained: Trained, tmp_path: Path) -> None:
    """It may be started before the run: it says what it waits for, and writes the list once the run is there."""
    url, out = tmp_path / "later", tmp_path / "targets.json"
    command = [sys.executable, "-m", "elastic_pt", "targets", str(url), "--out", str(out)]
    with subprocess.Popen(
        [*command, "--follow", "1"], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("waiting for the run: ")
            shutil.copytree(trained.run, url)
            eventually(out.exists, "no list")
            assert json.loads(out.read_text()) == []
        finally:
            process.kill()


def test_mistakes_are_told_in_one_line(trained: Trained, tmp_path: Path) -> None:
    """Each mistake names the option and the value."""
    assert_one_line_mistake(elastic_pt("targets", tmp_path / "none"), "no run there")
    assert_one_line_mistake(
        elastic_pt("targets", trained.run, "--follow", "5"), "--follow", "expected --out FILE"
    )
    out = tmp_path / "missing" / "targets.json"
    assert_one_line_mistake(
        elastic_pt("targets", trained.run, "--out", out), f"--out {out}", "expected a file"
    )
    assert_one_line_mistake(
        elastic_pt("targets", trained.run, "--out", tmp_path, "--follow", "0.1"), "--follow"
    )
