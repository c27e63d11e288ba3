"""The batch script that users get, on a real Slurm: tasks are preempted, cancelled, at their limit, and lost.

    sbatch ─► slurmctld ─► slurmd of a virtual node ─► bash ─► agent and its workers

Slurm schedules within a second or so, and a requeued task waits two minutes, which tests cut short. Steps are shorter than
that, so tests pause the run while Slurm takes its time.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import Scenario
from elastic_pt.runlog.records import Generation, Verb
from tests.services.fixtures import left_out
from tests.services.slurm import Slurm, missing_for_slurm

pytestmark = [pytest.mark.chaos, pytest.mark.xdist_group("slurm")]

SCRIPT: Final = Path(__file__).parents[1] / "deploy" / "slurm" / "elastic_pt.sbatch"
STEP_S: Final = 0.1

StartSlurm = Callable[..., Slurm]


@pytest.fixture
def start_slurm() -> Iterator[StartSlurm]:
    """Starts a cluster of virtual nodes, with the arguments of `Slurm`; it ends with the test."""
    if missing := missing_for_slurm():
        left_out(f"tests on a real Slurm, {missing}")
    with ExitStack() as stack:
        yield lambda nodes, **settings: stack.enter_context(Slurm(nodes, **settings))


class Array:
    """A job array of the script, whose tasks are the nodes of a run."""

    def __init__(
        self, slurm: Slurm, run: Scenario, tasks: int, *options: str, step_s: float = STEP_S
    ) -> None:
        """`options` are those of sbatch. The paths have a space; `elastic-pt` is only on PATH, as in an environment."""
        self.slurm, self.run = slurm, run
        (run.directory / "the run.toml").write_bytes((run.directory / "config.toml").read_bytes())
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ELASTIC_PT_INTERFACE": "lo",
            "ELASTIC_PT_FAILPOINTS": f"step.forward@1+:delay={step_s}",
        }
        self.id = slurm.submit(
            f"--array=0-{tasks - 1}",
            "--cpus-per-task=1",
            f"--output={run.directory}/slurm-%A-%a.log",
            *options,
            str(SCRIPT),
            "the run.toml",
            "--set",
            "elastic.zone=a zone",
            environment=environment,
            directory=run.directory,
        )

    def node(self, task: int) -> str:
        """The name of a task's node in the run."""
        return f"slurm-{self.id}-{task}"

    def state(self, task: int) -> str:
        """A task's state, in the words of Slurm."""
        return self.slurm.job(f"{self.id}_{task}")["JobState"]

    def until_state(self, task: int, state: str) -> None:
        """Wait until Slurm says so of a task."""
        self.until(f"task {task} is {state}", lambda: self.state(task) == state)

    def machine(self, task: int) -> str:
        """The virtual node on which a task runs."""
        return self.slurm.job(f"{self.id}_{task}")["NodeList"]

    def preempt(self, task: int) -> str:
        """Submit a job that takes the machine of a task for a second; its id."""
        options = ["--parsable", "--partition=urgent", f"--nodelist={self.machine(task)}"]
        return self.slurm.command(
            "sbatch", *options, "--output=/dev/null", "--wrap=sleep 1"
        ).strip()

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait for a condition; fails with the ends of the logs of Slurm and of the nodes."""
        try:
            self.run.until(what, condition)
        except AssertionError as error:
            raise AssertionError(
                f"{error}\n{self.slurm.command('squeue')}\n{self.slurm.log_tails()}"
            ) from error

    def until_training(self, *tasks: int) -> Generation:
        """Wait until the nodes of exactly these tasks have done a step together."""

        def reached() -> bool:
            generation = self.run.view().generation
            return (
                generation is not None
                and {each.node for each in generation.members} == {*map(self.node, tasks)}
                and self.run.step() > generation.resume_step
            )

        self.until(f"tasks {tasks} train", reached)
        assert self.run.view().stop is None, "the run was over too early"
        return self.run.generation()

    def until_left(self, task: int) -> None:
        """Wait until a task's agent has ended, in good order and at the first request."""
        node = self.node(task)
        self.until(f"{node} left", lambda: bool(self.run.events(node, "agent_left")))
        assert not self.run.events(node, "agent_stopped")

    def start_again(self, *tasks: int) -> None:
        """Start requeued tasks now instead of after two minutes, while the run is paused; return when their agents are up."""
        self.run.request(Verb.PAUSE)
        for task in tasks:
            self.until_state(task, "PENDING")
        starts = {task: self._starts(task) for task in tasks}
        for task in tasks:
            self.slurm.command("scontrol", "update", f"JobId={self.id}_{task}", "StartTime=now")
        self.until(
            f"tasks {tasks} are up",
            lambda: all(self._starts(task) > starts[task] for task in tasks),
        )
        self.run.request(Verb.RESUME)

    def _starts(self, task: int) -> int:
        return len(self.run.events(self.node(task), "agent_started"))

    def finish(self, *tasks: int) -> None:
        """Wait until these tasks have completed."""
        for task in tasks:
            self.until_state(task, "COMPLETED")
        self.run.check_goodput()


@pytest.mark.quick
def test_tasks_are_preempted_cancelled_and_lost(
    start: StartScenario, start_slurm: StartSlurm, reference_digest: str
) -> None:
    """Each task that Slurm queues again joins under its name; one that is cancelled does not come back.

    The others go on each time, and the weights are those of an undisturbed run.
    """
    slurm = start_slurm(5)
    run = start("elastic.nodes_max=4", "elastic.join_window_s=1")
    array = Array(slurm, run, 4)
    array.until_training(0, 1, 2, 3)

    urgent = array.preempt(0)
    array.until_left(0)
    after = array.until_training(1, 2, 3)
    assert after.resume_step == after.frontier_step
    slurm.kill_node(array.machine(2))
    array.until_training(1, 3)

    array.start_again(0, 2)
    array.until_training(0, 1, 2, 3)
    assert slurm.job(urgent)["JobState"] == "COMPLETED"

    slurm.command("scancel", f"{array.id}_1")
    array.until_left(1)
    after = array.until_training(0, 2, 3)
    assert after.resume_step == after.frontier_step
    array.finish(0, 2, 3)
    assert array.state(1) == "CANCELLED"
    run.check_whole(reference_digest)


@pytest.mark.quick
def test_a_task_that_is_warned_queues_itself_again(
    start: StartScenario, start_slurm: StartSlurm, reference_digest: str
) -> None:
    """USR1 at the begin of a grace time: the task leaves at once and comes back, even where Slurm would cancel it.

    In the last task of an array SLURM_JOB_ID is the id of the array: the other task must not be queued again with it.
    """
    slurm = start_slurm(
        2,
        preempt_mode="CANCEL",
        grace_s=600,
        lines=["SlurmctldParameters=preempt_send_user_signal"],
    )
    run = start("elastic.nodes_max=2", "elastic.join_window_s=1")
    array = Array(slurm, run, 2)
    array.until_training(0, 1)
    urgent = array.preempt(1)
    array.until_left(1)
    after = array.until_training(0)
    assert after.resume_step == after.frontier_step
    array.start_again(1)
    array.until_training(0, 1)
    assert slurm.job(urgent)["JobState"] == "COMPLETED"
    array.finish(0, 1)
    assert [slurm.job(f"{array.id}_{task}")["Restarts"] for task in (0, 1)] == ["0", "1"]
    run.check_whole(reference_digest)


def test_a_task_is_queued_again_before_its_time_limit(
    start: StartScenario, start_slurm: StartSlurm, reference_digest: str
) -> None:
    """The limit is Slurm's least, a minute. The task leaves before it, in good order, and joins again."""
    slurm = start_slurm(2)
    run = start("elastic.nodes_max=2", "elastic.join_window_s=1")
    array = Array(slurm, run, 2, "--signal=B:USR1@50", step_s=1.0)
    slurm.command("scontrol", "update", f"JobId={array.id}_0", "TimeLimit=1")
    array.until_training(0, 1)
    array.until_left(0)
    after = array.until_training(1)
    assert after.resume_step == after.frontier_step
    # It would be warned again before the end.
    slurm.command("scontrol", "update", f"JobId={array.id}_0", "TimeLimit=10")
    array.start_again(0)
    array.until_training(0, 1)
    array.finish(0, 1)
    run.check_whole(reference_digest)


def test_a_task_that_slurm_suspends_joins_again(
    start: StartScenario, start_slurm: StartSlurm, reference_digest: str
) -> None:
    """The others go on without a task whose processes stand still. It joins when they go on."""
    slurm = start_slurm(2)
    run = start("elastic.nodes_max=2", "elastic.join_window_s=1")
    array = Array(slurm, run, 2)
    array.until_training(0, 1)
    slurm.command("scontrol", "suspend", f"{array.id}_0")
    array.until_training(1)
    slurm.command("scontrol", "resume", f"{array.id}_0")
    array.until_training(0, 1)
    array.finish(0, 1)
    run.check_whole(reference_digest)


def test_a_task_outlives_its_slurmd(
    start: StartScenario, start_slurm: StartSlurm, reference_digest: str
) -> None:
    """Slurm gives up a machine whose slurmd is dead and starts the task elsewhere, beside an agent that still trains."""
    slurm = start_slurm(3)
    run = start("elastic.nodes_max=2", "elastic.join_window_s=1")
    array = Array(slurm, run, 2)
    array.until_training(0, 1)
    slurm.kill_slurmd(array.machine(0))
    array.start_again(0)
    array.finish(0, 1)
    run.check_whole(reference_digest)
