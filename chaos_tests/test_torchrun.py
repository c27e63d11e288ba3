"""Stock torchrun with our rendezvous: a script that knows nothing of this project becomes elastic."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_pt.chaos.processes import kill_all, mark_children, marked
from elastic_pt.runlog.log import RunLog
from elastic_pt.store.open import open_store
from elastic_pt.workers.forking import die_with_parent

pytestmark = pytest.mark.chaos

STEPS_ALONE = 5
PATIENCE_S = 90.0
SCRIPT = Path(__file__).with_name("all_reduce.py")


class Torchrun:
    """Agents of stock torchrun, each with its own mark: their workers are in separate sessions."""

    def __init__(self, directory: Path) -> None:
        self.url = f"file://{directory / 'run'}"
        self.results = directory / "results"
        self._directory = directory
        self.agents: list[tuple[subprocess.Popen[bytes], str]] = []

    def start(self) -> None:
        """Start one more agent."""
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += [
            "--rdzv-backend",
            "elastic_pt",
            "--rdzv-endpoint",
            self.url,
            "--rdzv-id",
            "sums",
        ]
        command += ["--nnodes", "1:2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1"]
        command += ["--max-restarts", "3", str(SCRIPT), str(self.results), str(STEPS_ALONE)]
        with mark_children() as mark, self._log(len(self.agents)).open("wb") as output:
            agent = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.agents.append((agent, mark))

    def kill(self, index: int) -> None:
        """Simulate the loss of an agent's machine."""
        agent, mark = self.agents[index]
        kill_all(mark)
        agent.wait()

    def lines(self) -> list[str]:
        """What rank 0 has written, whole lines only."""
        text = self.results.read_text() if self.results.exists() else ""
        return text.split("\n")[:-1]

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait for a condition; fails with the ends of the agents' logs after `PATIENCE_S`."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not within {PATIENCE_S} s: {what}\n{self.log_tails()}")
            time.sleep(0.02)

    def log_tails(self) -> str:
        """The end of each agent's output."""
        return "\n---\n".join(
            self._log(index).read_text()[-4000:] for index in range(len(self.agents))
        )

    def _log(self, index: int) -> Path:
        return self._directory / f"agent-{index}.log"


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Torchrun]:
    """Agents that are all gone at the end of the test."""
    running = Torchrun(tmp_path)
    try:
        yield running
    finally:
        for index in range(len(running.agents)):
            running.kill(index)


@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_continues_without_a_lost_agent(torchrun: Torchrun, victim: int) -> None:
    """Two agents of stock torchrun meet through a bucket; when either is lost, the other continues and finishes."""
    torchrun.start()
    torchrun.start()
    torchrun.until("a world of two adds up", lambda: "2 3" in torchrun.lines())
    generation = RunLog(open_store(torchrun.url), writer="chaos").refresh().generation
    assert generation is not None
    pids = [agent.pid for agent, _ in torchrun.agents]
    lost = pids.index(generation.members[victim].pid)
    survivor, mark = torchrun.agents[1 - lost]
    torchrun.kill(lost)
    torchrun.until("the other has ended", lambda: survivor.poll() is not None)
    assert survivor.returncode == 0, torchrun.log_tails()
    assert torchrun.lines()[-STEPS_ALONE:] == ["1 1"] * STEPS_ALONE
    newest = RunLog(open_store(torchrun.url), writer="chaos").refresh().generation
    assert newest is not None
    # Its own worker may have noticed before the agents did; then the reason tells that too.
    assert newest.reason.startswith(f"lost {generation.members[victim].node}")
    assert [member.address for member in newest.members] == ["127.0.0.1"]
    torchrun.until("no process is left", lambda: not marked(mark))


def test_torchrun_continues_without_a_member_that_never_enters(torchrun: Torchrun) -> None:
    """A stopped member does not stop the others: a node that waits for it in a new generation moves on to the next one."""
    torchrun.start()
    torchrun.start()
    torchrun.until("a world of two adds up", lambda: "2 3" in torchrun.lines())
    generation = RunLog(open_store(torchrun.url), writer="chaos").refresh().generation
    assert generation is not None
    pids = [agent.pid for agent, _ in torchrun.agents]
    stopped = pids.index(generation.members[1].pid)
    agent, mark = torchrun.agents[stopped]
    os.kill(agent.pid, signal.SIGSTOP)
    for worker in marked(mark).keys() - {agent.pid}:
        os.kill(worker, signal.SIGKILL)
    survivor, _ = torchrun.agents[1 - stopped]
    torchrun.until("the other has ended", lambda: survivor.poll() is not None)
    assert survivor.returncode == 0, torchrun.log_tails()
    assert torchrun.lines()[-STEPS_ALONE:] == ["1 1"] * STEPS_ALONE
