"""The unit for bare machines: checked by systemd's own tools, and run by a real systemd in namespaces."""

import inspect
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tomlkit
from typer.main import get_command

from elastic_pt import errors
from elastic_pt.chaos.small_run import small_run
from elastic_pt.cli import app
from elastic_pt.config import parse_config
from elastic_pt.config.sections import ElasticSection
from elastic_pt.data.prepare import prepare
from elastic_pt.data.sources import standard_library_source
from elastic_pt.errors import CheckpointError, ConfigError, ElasticPtError, RunFailed
from elastic_pt.runlog.log import RunLog
from elastic_pt.store.open import open_store
from tests.services.fixtures import left_out
from tests.services.systemd import Machine, missing_for_systemd

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "elastic-pt.service"
SERVICE = "elastic-pt.service"
NEWER = ("RestartSteps", "RestartMaxDelaySec")
"""Settings that systemd knows from version 254 on; earlier ones warn about them and go on."""
EXPOSURE_MAX = 2.5
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def settings() -> dict[str, list[str]]:
    """The values of each setting, in order."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def codes(text: str) -> set[int]:
    """The exit codes of a setting."""
    return {int(word) for word in text.split()}


def test_exit_codes_are_those_of_the_error_tree(settings: dict[str, list[str]]) -> None:
    """A new start helps against each error but three; an end after a signal or an alarm is as good as 0."""
    final = {ConfigError.exit_code, CheckpointError.exit_code, RunFailed.exit_code}
    assert settings["Restart"] == ["on-failure"]
    (prevented,) = settings["RestartPreventExitStatus"]
    assert codes(prevented) == final
    (clean,) = settings["SuccessExitStatus"]
    ended = {128 + each for each in (signal.SIGINT, signal.SIGALRM, signal.SIGTERM)}
    assert codes(clean) == ended
    known = {
        each.exit_code
        for _, each in inspect.getmembers(errors, inspect.isclass)
        if issubclass(each, ElasticPtError)
    }
    assert not known & ended


def test_the_command_and_its_keys_exist(settings: dict[str, list[str]]) -> None:
    """The program is the package's entry point, and each option and key is one of `elastic-pt run`."""
    (command,) = settings["ExecStart"]
    program, name, config, *rest = command.split()
    assert Path(program).name in Path("pyproject.toml").read_text()
    assert config.endswith(".toml")
    options = {
        option
        for parameter in get_command(app).commands[name].params  # type: ignore[attr-defined]
        for option in parameter.opts
    }
    assert {word for word in rest if word.startswith("--")} <= options
    overrides = [rest[at + 1] for at, word in enumerate(rest) if word == "--set"]
    parse_config('[run]\nurl = "r"\n[data]\nurl = "d"\n', source=UNIT.name, overrides=overrides)


def test_the_page_installs_what_the_unit_needs(settings: dict[str, list[str]]) -> None:
    """User, home, program, configuration and environment of the commands to copy are those of the unit."""
    page = (UNIT.parents[2] / "docs" / "deployment" / "machines.md").read_text()
    program, _, config, *_ = settings["ExecStart"][0].split()
    (environment,) = settings["EnvironmentFile"]
    (state,), (user,) = settings["StateDirectory"], settings["User"]
    for line in (
        rf"useradd --system --home-dir /var/lib/{state} .* {user}",
        rf"python3 -m venv {Path(program).parents[1]}",
        rf"install -D -m 644 run.toml {config}",
        rf"install -D -m 600 \S+ {environment.removeprefix('-')}",
        rf"install -m 644 deploy/systemd/{UNIT.name} /etc/systemd/system/",
    ):
        assert re.search(rf"^    {line}$", page, re.MULTILINE), line


def test_the_agent_has_the_time_to_leave(settings: dict[str, list[str]]) -> None:
    """SIGTERM to the agent alone, and SIGKILL to the rest only after `elastic.leave_timeout_s`, with a margin."""
    assert settings["KillMode"] == ["mixed"]
    assert int(settings["TimeoutStopSec"][0]) >= 2 * ElasticSection().leave_timeout_s


def test_systemd_accepts_it(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say but that it is older than two of the settings."""
    _require()
    program = tmp_path / "elastic-pt"
    program.touch(mode=0o755)
    unit = tmp_path / SERVICE
    unit.write_text(UNIT.read_text().replace("/opt/elastic-pt/bin/elastic-pt", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    known = re.compile(rf".*: Unknown key (name )?'({'|'.join(NEWER)})' in section.*")
    told = [line for line in (done.stdout + done.stderr).splitlines() if not known.match(line)]
    assert (told, done.returncode) == ([], 0)


def test_systemd_finds_little_to_attack() -> None:
    """`systemd-analyze security`: 0 is safe, 10 is not, and a unit without hardening has 9.6."""
    _require()
    limit = str(round(10 * EXPOSURE_MAX))
    words = ["systemd-analyze", "security", "--offline=true", f"--threshold={limit}", str(UNIT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_real_systemd_runs_it(tmp_path: Path) -> None:
    """A killed agent is started again and trains on; a stop makes it leave in good order; a mistake is not repeated."""
    _require()
    url = "file:///var/lib/elastic-pt"
    config = tomlkit.dumps(small_run(f"{url}/run", f"{url}/data", {"elastic": {"nodes_max": 1}}))
    arguments = "--address 127.0.0.1 --set 'elastic.zone=a zone'"
    files = {
        f"/etc/systemd/system/{SERVICE}": (UNIT.read_text(), 0o644),
        "/etc/elastic-pt/run.toml": (config, 0o644),
        "/etc/elastic-pt/environment": (
            f"ELASTIC_PT_ARGUMENTS={arguments}\nELASTIC_PT_FAILPOINTS=step.forward@1+:delay=0.3\n",
            0o600,
        ),
    }
    with Machine(tmp_path, files) as machine:
        prepare(
            [standard_library_source(100_000)],
            open_store(f"file://{machine.state / 'data'}"),
            vocab_size=320,
        )
        machine.run("systemctl", "start", SERVICE)
        _until(machine, "a commit", lambda: '"event": "commit"' in machine.journal(SERVICE))
        assert machine.run("ps", "-o", "user=", "-p", _pid(machine)).strip() == "elastic-pt"
        log = RunLog(open_store(f"file://{machine.state / 'run'}"), writer="test")
        generation = log.refresh().generation
        assert generation is not None
        assert generation.members[0].zone == "a zone"
        machine.kill(int(_pid(machine)))
        _until(machine, "a restart", lambda: machine.show(SERVICE, "NRestarts") == "1")
        _until(machine, "the same node", lambda: _events(machine, "generation") == 2)

        machine.run("systemctl", "stop", SERVICE)
        assert machine.show(SERVICE, "Result") == "success"
        assert _events(machine, "agent_left") == 1
        assert not machine.run("find", "/dev/shm", "-user", "elastic-pt")

        machine.run("sed", "-i", "s/steps = 48/steps = 49/", "/etc/elastic-pt/run.toml")
        machine.run("systemctl", "start", SERVICE)
        _until(machine, "it is refused", lambda: machine.show(SERVICE, "ActiveState") == "failed")
        assert machine.show(SERVICE, "ExecMainStatus") == str(ConfigError.exit_code)
        assert machine.show(SERVICE, "NRestarts") == "0"


def _pid(machine: Machine) -> str:
    return machine.show(SERVICE, "MainPID")


def _events(machine: Machine, name: str) -> int:
    return machine.journal(SERVICE).count(f'"event": "{name}"')


def _until(machine: Machine, what: str, condition: Callable[[], bool]) -> None:
    machine.until(what, condition, PATIENCE_S)


def _require() -> None:
    if missing := missing_for_systemd():
        left_out(f"tests with a real systemd, {missing}")
