"""The batch script, run by bash with stand-ins for the commands it calls."""

import inspect
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_pt import errors
from elastic_pt.errors import CheckpointError, ConfigError, ElasticPtError, RunFailed

FINAL = (0, ConfigError.exit_code, CheckpointError.exit_code, RunFailed.exit_code)
KNOWN = {
    each.exit_code
    for _, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, ElasticPtError)
}
PASSING = sorted({*KNOWN, 128 + signal.SIGKILL, 99} - {*FINAL})
SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "elastic_pt.sbatch"
AGENT = """trap 'echo agent stopped; exit 143' TERM
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


def test_before_the_time_limit_the_job_is_queued_again(start: Start) -> None:
    """USR1 stops the agent first and then requeues this task."""
    assert lines_after(start("run.toml"), signal.SIGUSR1) == (
        ["agent stopped", "scontrol requeue 77"],
        0,
    )


def test_after_preemption_or_scancel_slurm_decides(start: Start) -> None:
    """TERM stops the agent and requeues nothing: the script waits for what Slurm does with the job."""
    lines, _ = lines_after(start("run.toml"), signal.SIGTERM)
    assert lines == ["agent stopped", "sleep infinity"]


def test_a_run_must_be_named(start: Start) -> None:
    """Without a configuration or URL it says how to call it, with the exit code of a user's mistake."""
    script = start()
    _, error = script.communicate(timeout=30)
    assert error.startswith("usage: sbatch elastic_pt.sbatch CONFIG|RUN_URL")
    assert script.returncode == 2
