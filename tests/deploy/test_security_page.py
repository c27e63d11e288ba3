"""docs/security.md: the tests that it names exist, each actor has its row, its commands are those of the files."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from elastic_pt.membership.tcp_store import bind_store
from tests.services.fixtures import left_out

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "security.md"
WIREGUARD: Final = ROOT / "deploy" / "wireguard"
ACTORS: Final = (
    "listens on the network",
    "sends on the network",
    "reads only checkpoints",
    "writes to the bucket",
    "a former node, a stolen snapshot of a VM",
    "a node that was broken into",
    "a hostile corpus",
    "an operator's machine",
    "Prometheus",
)


def rows() -> dict[str, list[str]]:
    """The table of actors: what each cannot do, what it can, and the tests."""
    cells = [
        line.strip("| ").split(" | ")
        for line in PAGE.read_text().splitlines()
        if line.startswith("| **")
    ]
    return {re.findall(r"\*\*(.+?)\*\*", name)[0]: rest for name, *rest in cells}


def test_each_actor_has_a_row_with_a_test_and_what_is_open() -> None:
    """Nobody is told that all is well: each row has both sides, and what shows the first one."""
    assert tuple(rows()) == ACTORS
    for actor, (cannot, can, tests) in rows().items():
        assert cannot, actor
        assert can, actor
        assert "::test_" in tests, actor


def test_every_test_that_the_page_names_exists() -> None:
    """Whoever renames or removes a test is told which promise it held."""
    named = re.findall(r"`([\w/.]+)::(\w+)`", PAGE.read_text())
    assert len(named) > 20
    for path, name in named:
        functions = [
            node.name
            for node in ast.parse((ROOT / path).read_text()).body
            if isinstance(node, ast.FunctionDef)
        ]
        assert name in functions, f"{path}::{name}"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_tcp_store_listens_at_its_address_only(address: str) -> None:
    """As the table of ports says; torch itself would listen at all addresses."""
    store = bind_store(address)
    table = Path("/proc/net/tcp6" if ":" in address else "/proc/net/tcp").read_text()
    port = f":{store.port:04X} "
    heard = [line.split()[1] for line in table.splitlines() if port in line.partition(" 0A ")[0]]
    assert heard
    assert not [each for each in heard if set(each.partition(":")[0]) == {"0"}]


def commands() -> list[str]:
    """Arguments of mesh.py that the page, the script and the unit show."""
    texts = [path.read_text() for path in (PAGE, *sorted(WIREGUARD.iterdir())) if path.is_file()]
    return [option for text in texts for option in re.findall(r"mesh\.py.*?(--[a-z-]+)", text)]


def test_options_of_the_mesh_are_known() -> None:
    """Its help has each option that a command shows."""
    command = [sys.executable, str(WIREGUARD / "mesh.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--once" in commands()
    assert all(each in text for each in commands())


@pytest.mark.parametrize(
    "endpoint", ["10.0.0.7", "node:51820", "127.0.0.1:51820", "0.0.0.0:1", "10.0.0.7:0", "[::1]:9"]
)
def test_an_endpoint_that_no_peer_reaches_is_refused(endpoint: str, tmp_path: Path) -> None:
    """One line with option and value, before anything is made."""
    command = [sys.executable, str(WIREGUARD / "mesh.py"), f"file://{tmp_path}/run", "--once"]
    done = subprocess.run(
        [*command, "--endpoint", endpoint, "--key-file", str(tmp_path / "key")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"--endpoint {endpoint}: expected IP:PORT at which peers reach this node\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    """Who has not installed wireguard-tools is told so in one line."""
    ip = shutil.which("ip")
    if ip is None:
        left_out("checks of the mesh, without ip")
    (tmp_path / "ip").symlink_to(str(ip))
    command = [sys.executable, str(WIREGUARD / "mesh.py"), f"file://{tmp_path}/run", "--once"]
    done = subprocess.run(
        [*command, "--endpoint", "10.0.0.7:51820"],
        env={"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "wg: No such file or directory; expected it to be installed\n"


def test_the_unit_of_the_mesh_is_one(tmp_path: Path) -> None:
    """systemd accepts it; no right but that to make interfaces; WireGuard in user space outlives a restart."""
    path = WIREGUARD / "elastic-pt-wireguard.service"
    if shutil.which("systemd-analyze") is None:
        left_out("checks of units, without systemd-analyze")
    copy = tmp_path / path.name
    text = path.read_text().replace("/opt/elastic-pt/bin/python", sys.executable)
    copy.write_text(text.replace("User=elastic-pt", f"User={Path.home().owner()}"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False
    )
    told = [line for line in done.stderr.splitlines() if path.name in line]
    assert (done.returncode, told) == (0, []), done.stderr
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read_string(text)
    service = unit["Service"]
    assert service["AmbientCapabilities"] == service["CapabilityBoundingSet"] == "CAP_NET_ADMIN"
    assert service["KillMode"] == "process"
