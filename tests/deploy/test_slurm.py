"""The batch script, run by bash with stand-ins for the commands it calls. `chaos_tests/test_slurm.py` runs it on a Slurm."""

import inspect
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_pt import errors
from elastic_pt.errors import CheckpointError, ConfigError, ElasticPtError, RunFailed

LEFT = (0, *(128 + each for each in (signal.SIGINT, signal.SIGALRM, signal.SIGTERM)))
FINAL = (*LEFT, ConfigError.exit_code, CheckpointError.exit_code, RunFailed.exit_code)
KNOWN = {
    each.exit_code
    for _, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, ElasticPtError)
}
PASSING = sorted({*KNOWN, 128 + signal.SIGKILL, 99} - {*FINAL})
SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "elastic_pt.sbatch"
AGENT = """trap 'echo agent told by TERM' TERM
trap 'echo agent stopped; exit 0' USR1
echo agent "$@"
lives=$(cat "$0.lives" 2>/dev/null || echo 0)
echo $((lives + 1)) > "$0.lives"
codes=($AGENT_ENDS_WITH)
if [ -n "${codes[lives]:-}" ]; then exit "${codes[lives]}"; fi
exec 3<> <(:)
while :; do read -r -t 0.2 -u 3; done
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts the script; each command it calls says so on standard output instead of doing something."""
    stand_ins = {
        "elastic-pt": AGENT,
        "scontrol": 'echo scontrol "$@"\n',
        "sleep": 'echo sleep "$@"\n',
        "ip": 'echo "2: ib0    inet 10.1.2.3/16 brd 10.1.255.255 scope global ib0"\n',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "77",
        "SLURM_ARRAY_JOB_ID": "75",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURMD_NODENAME": "n1",
        "SLURM_RESTART_COUNT": "2",
    }

    def run(*arguments: str, ends_with: str = "", **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env={
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "AGENT_ENDS_WITH": ends_with,
                **slurm,
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def lines_after(script: subprocess.Popen[str], sent: signal.Signals) -> tuple[list[str], int]:
    """Send a signal once the agent is up; what was called from then on, and the exit code."""
    assert script.stdout is not None
    assert script.stdout.readline().startswith("agent ")
    script.send_signal(sent)
    out, _ = script.communicate(timeout=30)
    return out.splitlines(), script.returncode


def test_bash_can_read_it() -> None:
    """The script is valid bash."""
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_each_task_is_a_single_node_job_that_is_requeued() -> None:
    """An array of single-node jobs, requeued, with a signal to the script before the time limit."""
    directives = {
        line.removeprefix("#SBATCH ")
        for line in SCRIPT.read_text().splitlines()
        if line.startswith("#SBATCH ")
    }
    assert {"--nodes=1", "--ntasks=1", "--requeue", "--open-mode=append"} <= directives
    assert any(line.startswith("--array=") for line in directives)
    assert any(line.startswith("--signal=B:USR1@") for line in directives)


def test_agent_gets_the_arguments_and_a_name_of_its_own(start: Start) -> None:
    """The agent gets the run, the overrides, and an address; its exit code is the script's."""
    script = start("run.toml", "--set", "train.steps=3", ends_with="7", ELASTIC_PT_INTERFACE="ib0")
    out, _ = script.communicate(timeout=30)
    assert out == ("agent run run.toml --set train.steps=3 --node slurm-75-2 --address 10.1.2.3\n")
    assert script.returncode == 7


def test_a_task_keeps_its_name_wherever_it_is_queued_again(start: Start) -> None:
    """Failures are counted by name: another machine and another life of the job change nothing about it."""
    script = start("run.toml", ends_with="0", SLURMD_NODENAME="n2", SLURM_RESTART_COUNT="3")
    assert script.communicate(timeout=30)[0] == "agent run run.toml --node slurm-75-2\n"


@pytest.mark.parametrize("code", FINAL)
def test_an_error_that_a_restart_cannot_fix_is_not_restarted(start: Start, code: int) -> None:
    """After the end of the run, or an error that stays, the task ends with the agent's exit code."""
    script = start("run.toml", ends_with=f"{code} 0")
    out, _ = script.communicate(timeout=30)
    assert out.count("agent run") == 1
    assert script.returncode == code


@pytest.mark.parametrize("code", PASSING)
def test_what_may_go_better_is_started_again_after_a_growing_pause(start: Start, code: int) -> None:
    """Any other end of the agent, unknown ones and signals included, leads to a new start in the same task."""
    script = start("run.toml", ends_with=f"{code} {code} 0")
    out, _ = script.communicate(timeout=30)
    lines = [line for line in out.splitlines() if line.startswith(("agent run", "sleep"))]
    assert sorted(lines) == ["agent run run.toml --node slurm-75-2"] * 3 + ["sleep 10", "sleep 5"]
    assert script.returncode == 0


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_the_agent_leaves_and_this_task_alone_is_queued_again(
    start: Start, sent: signal.Signals
) -> None:
    """The agent gets no second SIGTERM beside Slurm's own. SLURM_JOB_ID may name the whole array, so it is not used."""
    assert lines_after(start("run.toml"), sent) == (
        ["agent stopped", "scontrol requeue incomplete 75_2"],
        0,
    )


def test_a_job_without_an_array_is_queued_again_by_its_id(start: Start) -> None:
    """`sbatch --array` is not the only way to submit the script."""
    script = start("run.toml", SLURM_ARRAY_JOB_ID="", SLURM_ARRAY_TASK_ID="")
    lines, _ = lines_after(script, signal.SIGUSR1)
    assert lines[-1] == "scontrol requeue incomplete 77"


def test_requeueing_is_tried_until_slurm_answers(start: Start, tmp_path: Path) -> None:
    """While slurmctld does not answer, the job waits: a script that ended now would count as completed."""
    (tmp_path / "scontrol").write_text(
        '#!/usr/bin/env bash\necho scontrol "$@"\nrm "$0.down" 2>/dev/null && exit 1\nexit 0\n'
    )
    (tmp_path / "scontrol.down").touch()
    lines, code = lines_after(start("run.toml"), signal.SIGUSR1)
    tried = "scontrol requeue incomplete 75_2"
    assert (lines, code) == (["agent stopped", tried, "sleep 5", tried], 0)


def test_limits_of_a_login_node_are_raised(start: Start, tmp_path: Path) -> None:
    """Slurm passes on the soft limit of open files of the shell that called sbatch; the agent gets the hard one."""
    (tmp_path / "elastic-pt").write_text("#!/usr/bin/env bash\nulimit -S -n\nulimit -H -n\n")
    script = start("run.toml")
    soft, hard = script.communicate(timeout=30)[0].split()
    assert soft == hard


@pytest.mark.parametrize(
    ("four", "six", "expected"),
    [
        ("10.1.2.3/16 brd 10.1.255.255 scope global ib0", "fd00::7/64", "10.1.2.3"),
        ("", "fd00::7/64 scope global", "fd00::7"),
    ],
)
def test_the_address_is_that_of_the_interface(
    start: Start, tmp_path: Path, four: str, six: str, expected: str
) -> None:
    """The IPv4 address of ELASTIC_PT_INTERFACE, or where it has none the global IPv6 address."""
    answer = f'case "$*" in *-4*) [ -z "{four}" ] || echo "2: ib0 inet {four}" ;; *) echo "2: ib0 inet6 {six}" ;; esac\n'
    (tmp_path / "ip").write_text(f"#!/usr/bin/env bash\n{answer}")
    script = start("run.toml", ends_with="0", ELASTIC_PT_INTERFACE="ib0")
    assert script.communicate(timeout=30)[0].split()[-2:] == ["--address", expected]


def test_an_interface_without_an_address_is_refused(start: Start, tmp_path: Path) -> None:
    """The message names the variable and the interface, with the exit code of a user's mistake."""
    (tmp_path / "ip").write_text("#!/usr/bin/env bash\nexit 1\n")
    script = start("run.toml", ELASTIC_PT_INTERFACE="ib7")
    out, error = script.communicate(timeout=30)
    assert (out, script.returncode) == ("", 2)
    assert error.startswith("ELASTIC_PT_INTERFACE=ib7: no address on ")


def test_a_missing_program_is_refused(start: Start, tmp_path: Path) -> None:
    """As with `--export=NONE`: the script says what sbatch has to pass on, and does not try for ever."""
    (tmp_path / "elastic-pt").unlink()
    script = start("run.toml", PATH=f"{tmp_path}:/usr/bin:/bin")
    _, error = script.communicate(timeout=30)
    assert script.returncode == 2
    assert error.startswith(f"PATH={tmp_path}:/usr/bin:/bin on ")
    assert error.endswith("(--export=ALL)\n")


def test_a_run_must_be_named(start: Start) -> None:
    """Without a configuration or URL it says how to call it, with the exit code of a user's mistake."""
    script = start()
    _, error = script.communicate(timeout=30)
    assert error.startswith("usage: sbatch elastic_pt.sbatch CONFIG|RUN_URL")
    assert script.returncode == 2
