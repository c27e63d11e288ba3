"""`elastic-pt doctor`: what it prints, its exit codes, and a run whose nodes do not all reach each other."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import CONFIG, Trained, assert_one_line_mistake, elastic_pt
from rich.console import Console

from elastic_pt.cli.doctor import check_lines
from elastic_pt.config import ElasticSection, load_config
from elastic_pt.doctor.check import Check
from elastic_pt.doctor.examine import Question, examine
from elastic_pt.doctor.network import peer_checks
from elastic_pt.errors import StoreError
from elastic_pt.fleet.local import Fleet
from elastic_pt.fleet.network import Network, missing_for_networks
from elastic_pt.runlog.identity import IDENTITY_KEY, read_run_config
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from tests.services.fixtures import left_out

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "deployment" / "doctor.md"
WAIT_S = 90.0
KEYS = ["name", "ok", "found", "expected", "remedy"]
OF_THE_MACHINE = {"versions", "staging", "open_files", "processes", "host_name", "ports", "notices"}
OF_A_RUN = {
    "memory",
    "processors",
    "bucket",
    "create_once",
    "rate_up",
    "data",
    "plan",
    "checkpoint",
}


def by_name(checks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for each in checks:
        assert list(each) == KEYS
        assert type(each["ok"]) is bool
        assert all(each[key] for key in KEYS if key not in ("ok", "remedy"))
        assert bool(each["remedy"]) == (not each["ok"])
    return {each["name"]: each for each in checks}


def test_without_an_argument_the_machine_alone_is_checked() -> None:
    """Nothing of a bucket is listed: not even as well."""
    result = elastic_pt("doctor", "--json")
    found = by_name(result.json)
    assert set(found) >= OF_THE_MACHINE
    assert not set(found) & OF_A_RUN
    assert result.exit_code == (0 if all(each["ok"] for each in found.values()) else 1)
    assert result.err == ""


def test_a_configuration_adds_what_its_run_needs(prepared: Trained, tmp_path: Path) -> None:
    """All is well for a small run that has not begun; and its directory is not created."""
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(run=tmp_path / "runs" / "new", data=prepared.data))
    result = elastic_pt("doctor", path)
    assert (result.exit_code, result.err) == (0, ""), result
    *lines, last = result.out.splitlines()
    assert last == f"all well: {len(lines)} checks"
    assert {line.split()[1] for line in lines} >= OF_THE_MACHINE | OF_A_RUN
    assert all(re.match(r"ok    [a-z_]+ +\S", line) for line in lines)
    assert not (tmp_path / "runs").exists()


def test_a_completed_run_is_well(trained: Trained) -> None:
    """By its URL alone: its configuration, data and platform are those of this machine."""
    before = sorted(trained.run.rglob("*"))
    found = by_name(elastic_pt("doctor", trained.run, "--json").json)
    assert all(each["ok"] for each in found.values())
    assert found["run"]["found"] == "ended: completed"
    assert found["identity"]["found"].startswith("the same configuration")
    assert sorted(trained.run.rglob("*")) == before


def test_something_to_mend_is_code_1_with_the_remedy_below(
    prepared: Trained, tmp_path: Path
) -> None:
    """A model that is too large for this machine: each finding has its line, and the line below tells what to do."""
    huge = ("--set", "model.width=16384", "--set", "model.layers=2000", "--set", "model.heads=2")
    result = elastic_pt("doctor", prepared.config, *huge, "--set", f"run.url={tmp_path / 'new'}")
    assert result.exit_code == 1
    lines = result.out.splitlines()
    bad = [number for number, line in enumerate(lines) if line.startswith("MEND  ")]
    assert {lines[number].split()[1] for number in bad} >= {"memory", "staging", "checkpoint"}
    assert all("; expected " in lines[number] for number in bad)
    assert all(re.match(r" {20,}-> \S", lines[number + 1]) for number in bad)
    names = [lines[number].split()[1] for number in bad]
    assert lines[-1].endswith(f"checks: something to mend ({', '.join(names)})")


def test_values_of_another_run_are_found(trained: Trained) -> None:
    """A configuration that a run's nodes would refuse is told with both values."""
    other = ("--set", "train.learning_rate=0.5", "--set", "run.seed=4")
    result = elastic_pt("doctor", trained.config, *other, "--json")
    check = by_name(result.json)["identity"]
    assert (result.exit_code, check["ok"]) == (1, False)
    assert "run.seed = 4, the run has 3" in check["found"]
    assert "train.learning_rate = 0.5, the run has 0.002" in check["found"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[]", b"[" * 100_000, b"{"])
def test_a_damaged_identity_is_a_finding(content: bytes, trained: Trained, tmp_path: Path) -> None:
    """One check names the object; the others are made."""
    store = open_store(f"file://{shutil.copytree(trained.run, tmp_path / 'run')}")
    config = read_run_config(store, [f"run.url={store.url}"])
    store.write(IDENTITY_KEY, content)
    checks = {each.name: each for each in examine(Question(store, config, begun=True))}
    assert [name for name, each in checks.items() if not each.ok] == ["identity"]
    assert f"{store.url}/{IDENTITY_KEY}: " in checks["identity"].found


class Failing:
    """A store that stops answering when the run's identity is read."""

    def __init__(self, inner: Store) -> None:
        self._inner, self.url = inner, inner.url
        self.create, self.write, self.size = inner.create, inner.write, inner.size
        self.keys, self.delete = inner.keys, inner.delete

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if key == IDENTITY_KEY:
            raise StoreError("gave up\nafter 15 s")
        return self._inner.read(key, start, end)


def test_a_store_that_stops_answering_is_the_last_finding(trained: Trained, tmp_path: Path) -> None:
    """What was found before is not lost, also for programs that wait for the whole list."""
    store = open_store(f"file://{shutil.copytree(trained.run, tmp_path / 'run')}")
    config = read_run_config(store, [f"run.url={store.url}"])
    checks = list(examine(Question(Failing(store), config, begun=True)))
    assert [(each.name, each.found) for each in checks if not each.ok] == [
        ("trouble", "gave up after 15 s")
    ]
    assert checks[-1].name == "trouble"
    assert {"create_once", "data", "run"} <= {each.name for each in checks}


def test_missing_and_damaged_data_are_found(prepared: Trained, tmp_path: Path) -> None:
    """Data that is not there, and data whose first block has changed, are findings; checks that need it are left out."""
    url = ("--set", f"run.url={tmp_path / 'new'}")
    result = elastic_pt(
        "doctor", prepared.config, *url, "--set", f"data.url={tmp_path / 'none'}", "--json"
    )
    found = by_name(result.json)
    assert (result.exit_code, found["data"]["ok"]) == (1, False)
    assert not {"plan", "memory", "checkpoint"} & set(found)
    copy = tmp_path / "data"
    subprocess.run(["cp", "-r", str(prepared.data), str(copy)], check=True)
    for shard in (copy / "shards").rglob("train-*.bin"):
        shard.write_bytes(bytes(len(shard.read_bytes())))
    result = elastic_pt("doctor", prepared.config, *url, "--set", f"data.url={copy}", "--json")
    found = by_name(result.json)
    assert (result.exit_code, found["data"]["ok"]) == (1, False)
    assert "train-" in found["data"]["found"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["no-such.toml"], ["no-such.toml", "cannot be read"]),
        (["s3:/bucket/run"], ["RUN_URL", "s3:/bucket/run"]),
        (["--nodes", "3"], ["--nodes 3", "RUN_URL or CONFIG"]),
        (["--set", "train.steps=3"], ["--set", "RUN_URL or CONFIG"]),
        (["--address", "node-7"], ["--address node-7"]),
        (["{run}", "--set", "train.steps=3"], ["--set train.steps=3", "240"]),
        (["{tmp}/none", "--set", "train.steps=3"], ["--set train.steps=3", "no configuration"]),
        (["{config}", "--set", "train.stepz=3"], ["stepz"]),
        (["{run}", "--nodes", "0"], ["--nodes"]),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    trained: Trained, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    """A mistake in the arguments or the configuration is no finding about the machine."""
    places = {"run": trained.run, "tmp": tmp_path, "config": trained.config}
    words = [each.format(**places) for each in arguments]
    assert_one_line_mistake(elastic_pt("doctor", *words), *parts)


@pytest.mark.parametrize("locale", ["C", "tr_TR.UTF-8"])
def test_locale_and_pipe_do_not_matter(locale: str) -> None:
    """In a pipe, in any locale, the output is ASCII, uncoloured, one line a check, and numbers have points."""
    environment = {**os.environ, "LC_ALL": locale, "LANG": locale, "COLUMNS": "40"}
    command = [sys.executable, "-m", "elastic_pt", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
    assert done.stderr == b""
    text = done.stdout.decode("ascii")
    assert "\x1b" not in text
    assert re.search(r"^ok    versions        elastic_pt \S+, torch \S+, Python \S+$", text, re.M)


def test_a_narrow_terminal_gets_whole_words() -> None:
    """On a terminal lines are cut between words and indented, and the words do not depend on the colour."""
    check = Check("staging", False, "too small " * 8, "larger", "mount it " * 12)
    console = Console(force_terminal=True, width=60, color_system=None, highlight=False)
    lines = [line.plain for line in check_lines(check, console)]
    assert lines[0].startswith("MEND  staging         too small")
    assert all(len(line) <= 60 for line in lines)
    assert all(line.startswith(" " * 22) for line in lines[1:])
    assert any(line.strip().startswith("-> mount it") for line in lines)


def test_the_page_has_each_check(trained: Trained, tmp_path: Path) -> None:
    """docs/deployment/doctor.md has a row for each check of the code, and no other."""
    table = PAGE.read_text().partition("<!-- checks: begin -->")[2]
    rows = re.findall(r"^\| `(\w+)` \|", table.partition("<!-- checks: end -->")[0], re.MULTILINE)
    named = set[str]()
    for path in (ROOT / "elastic_pt" / "doctor").glob("*.py"):
        text = path.read_text()
        named |= set(re.findall(r"\b(?:Check|judged|required|Verb|listening)\(\s*\"(\w+)\"", text))
        named |= set(re.findall(r"\"(rate_\w+|agent_port|metrics_port|ports)\"", text))
    assert sorted(rows) == sorted(named)
    assert len(rows) == len(set(rows))


# ---- a run with nodes of their own networks -------------------------------------------------------------


@pytest.fixture
def nodes() -> Iterator[Network]:
    if missing := missing_for_networks():
        left_out(f"tests with a network for each node, {missing}")
    with Network(["a", "b", "doctor"], versions=(4,)) as network:
        yield network


def test_nodes_that_cannot_be_reached_are_found(
    prepared: Trained, nodes: Network, tmp_path: Path
) -> None:
    """A real run on two machines, seen from a third: all well; then a port is closed; then large packets are lost."""
    endless = ("train.steps=1000000", "evaluation.every_steps=0", f"run.url={tmp_path / 'run'}")
    config = load_config(prepared.config, endless)
    with Fleet(config, tmp_path / "fleet") as fleet:
        for name in ("a", "b"):
            fleet.start(name, address=nodes.address(name), prefix=nodes.prefix(name))
        store = open_store(config.run.url)
        view = members_of(store, 2)

        def checks() -> dict[str, Check]:
            with nodes.on("doctor"):
                return {each.name: each for each in peer_checks(view, store, ElasticSection())}

        found = checks()
        assert {name: each.ok for name, each in found.items()} == dict.fromkeys(
            ("members", "path_mtu", "same_code"), True
        )
        here = nodes.address("doctor")
        assert found["members"].found == f"2 of 2 reached from {here} (eth0)"

        nodes.block("a", from_="doctor")
        found = checks()
        assert not found["members"].ok
        assert found["members"].found.startswith(f"1 of 2 reached from {here} (eth0); not a ")
        assert "timed out" in found["members"].found
        assert found["path_mtu"].ok
        nodes.heal()

        lose_large_packets(nodes, "b")
        found = checks()
        assert found["members"].ok
        assert not found["path_mtu"].ok
        assert found["path_mtu"].found.endswith("by b")


def members_of(store: Any, count: int) -> RunView:
    """The view of the run, once it has a generation of so many members."""
    log, until_s = RunLog(store, writer="test"), time.monotonic() + WAIT_S
    while True:
        view = log.refresh()
        if view.generation is not None and len(view.generation.members) == count:
            return view
        assert time.monotonic() < until_s
        time.sleep(0.1)


def lose_large_packets(nodes: Network, node: str) -> None:
    """As a tunnel does whose MTU is smaller than both ends believe, where ICMP is filtered."""
    rule = "-A INPUT -p tcp -m length --length 1000:65535 -j DROP"
    subprocess.run([*nodes.prefix(node), "iptables", *rule.split()], check=True)


def test_json_is_a_list_also_if_something_is_wrong(prepared: Trained, tmp_path: Path) -> None:
    """Programs read the same form in each case; standard error stays empty."""
    result = elastic_pt(
        "doctor",
        prepared.config,
        "--set",
        "elastic.workers_per_node=64",
        "--set",
        f"run.url={tmp_path / 'new'}",
        "--json",
    )
    assert (result.exit_code, result.err) == (1, "")
    assert isinstance(json.loads(result.out), list)
    found = by_name(result.json)
    assert not found["plan"]["ok"]
    assert found["plan"]["found"].startswith("elastic.workers_per_node = 64: more than the 4 slots")
