"""The user data for new machines: accepted by cloud-init's own checker, and one with the unit and the package."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_pt.config import parse_config
from tests.services.fixtures import SERVICES, left_out

ROOT = Path(__file__).parents[2]
USER_DATA = ROOT / "deploy" / "cloud-init" / "user-data.yaml"
UNIT = (ROOT / "deploy" / "systemd" / "elastic-pt.service").read_text()
CHECKER = SERVICES / "cloud-init" / "venv" / "bin" / "python"
AWS_BYTES_MAX = 16384
"""What EC2 takes as user data."""


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    """The document."""
    parsed: dict[str, Any] = yaml.safe_load(USER_DATA.read_text())
    return parsed


def written(data: dict[str, Any], path: str) -> dict[str, Any]:
    """The entry of a file that cloud-init writes."""
    (entry,) = (each for each in data["write_files"] if each["path"] == path)
    found: dict[str, Any] = entry
    return found


def setting(name: str) -> str:
    """The value of a setting of the unit."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    return str(value)


@pytest.mark.parametrize("broken", [False, True])
def test_cloud_init_accepts_it(tmp_path: Path, broken: bool) -> None:
    """`cloud-init schema` has no objection; it has one to a misspelt key."""
    if not CHECKER.exists():
        left_out("the check of user data by cloud-init")
    checked = tmp_path / "user-data.yaml"
    text = USER_DATA.read_text()
    checked.write_text(text.replace("permissions:", "permission:") if broken else text)
    done = subprocess.run(
        [str(CHECKER), "-m", "cloudinit.cmd.main", "schema", "--config-file", str(checked)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert bool(done.returncode) == broken, done.stdout + done.stderr
    assert text.startswith("#cloud-config\n")
    assert len(text.encode()) < AWS_BYTES_MAX


def test_it_writes_the_unit_of_the_repository(data: dict[str, Any]) -> None:
    """The unit is on a page of its own too, where it is tested; here is the same text."""
    assert written(data, "/etc/systemd/system/elastic-pt.service")["content"] == UNIT
    assert ["systemctl", "enable", "--now", "elastic-pt.service"] in data["runcmd"]


def test_it_makes_what_the_unit_needs(data: dict[str, Any]) -> None:
    """User, home, program, configuration and environment are where the unit looks for them, and secrets are root's."""
    (user,) = (each for each in data["users"] if isinstance(each, dict))
    assert user["name"] == setting("User") == setting("Group")
    assert user["homedir"] == f"/var/lib/{setting('StateDirectory')}"
    program, _, config, *_ = setting("ExecStart").split()
    venv = Path(program).parents[1]
    assert ["python3", "-m", "venv", str(venv)] in data["runcmd"]
    (install,) = (each for each in data["runcmd"] if isinstance(each, str))
    assert f"{venv}/bin/pip install" in install
    parse_config(written(data, config)["content"], source=str(USER_DATA))
    environment = written(data, setting("EnvironmentFile").removeprefix("-"))
    assert environment["permissions"] == "0600"


def test_files_are_not_cut_by_a_clumsy_edit(data: dict[str, Any]) -> None:
    """The installing command and the script are valid shell."""
    scripts = [each for each in data["runcmd"] if isinstance(each, str)]
    scripts.append(written(data, "/etc/elastic-pt/place")["content"])
    for script in scripts:
        subprocess.run(["sh", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("cloud_init", "before", "after"),
    [
        ("echo us-east-1a", "", "ELASTIC_PT_ARGUMENTS=--set elastic.zone=us-east-1a\n"),
        ("exit 1", "", "ELASTIC_PT_ARGUMENTS=--set elastic.zone=\n"),
        ("echo b", "ELASTIC_PT_ARGUMENTS=--set a=b\n", "ELASTIC_PT_ARGUMENTS=--set a=b\n"),
    ],
    ids=["zone", "no zone", "own options"],
)
def test_the_zone_is_that_of_the_machine(
    data: dict[str, Any], tmp_path: Path, cloud_init: str, before: str, after: str
) -> None:
    """cloud-init tells the zone. A cloud without zones leaves it empty, and options of the user stay."""
    environment = tmp_path / "environment"
    environment.write_text(before)
    command = tmp_path / "cloud-init"
    command.write_text(f"#!/bin/sh\n{cloud_init}\n")
    command.chmod(0o755)
    script = written(data, "/etc/elastic-pt/place")["content"]
    script = script.replace("/etc/elastic-pt/environment", str(environment))
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["sh"], input=script, text=True, check=True, env={"PATH": path})
    assert environment.read_text() == after
    zone = after.rstrip().rpartition(" ")[2]
    if zone.startswith("elastic."):
        parse_config('[run]\nurl = "r"\n[data]\nurl = "d"\n', source="zone", overrides=[zone])
