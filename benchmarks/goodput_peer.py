"""Stock torchrun with FSDP2 and DCP, tuned, as a system that `goodput_drive.py` takes through a schedule.

It gets three favours that it does not have by itself. The store of its rendezvous is in the benchmark's process, which no
fault hits. Its newcomers come from a pool too: agents that have imported, and join when they are told to, at the
moment when a node is lost. An agent that ends by itself is started again at once.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch.distributed as dist

from benchmarks.goodput_run import SEQUENCE_LENGTH, warm_prefix
from benchmarks.processor_shares import ProcessorShares
from benchmarks.recovery_peer import SETTINGS, TorchrunJob
from benchmarks.recovery_watch import StepPoint

_MODULES: Final = ("torch.distributed.run",)


class PeerSystem:
    """A job of torchrun with a warm pool. Main thread."""

    def __init__(self, job: TorchrunJob, shares: ProcessorShares, directory: Path) -> None:
        self.living: list[tuple[float, int]] = []
        self.restarts = 0
        """Agents that ended by themselves and were started again."""
        self._job = job
        self._shares = shares
        self._directory = directory
        self._training: list[int] = []
        self._held: list[int] = []
        self._read = 0
        self._newest = StepPoint(0.0, 0)
        self.lost_steps = 0
        """Steps that were done again."""

    def newest(self) -> StepPoint:
        """The newest step that the job has ever done, and when."""
        lines = self._job.lines()
        for line in lines[self._read :]:
            if line["step"] > self._newest.step:
                self._newest = StepPoint(line["time_s"], line["step"])
            else:
                self.lost_steps += 1
        self._read = len(lines)
        return self._newest

    def until_training(self, nodes: int, steps: int, limit_s: float) -> None:
        """Wait until a world of this many nodes has done some more steps. Raises `ElasticPtError` after `limit_s`."""
        before = sum(line["world_size"] == nodes for line in self._job.lines())
        self._job.until_training(nodes, before + steps, limit_s)

    def warm(self, *, joins: bool = False) -> None:
        """Start an agent that imports, and then joins or waits until it is told to."""
        index = len(self._job.agents)
        go = None if joins else self._go(index)
        place = self._shares.place(f"agent-{index}")
        self._job.start(warm_prefix(place, go, _MODULES))
        (self._training if joins else self._held).append(index)

    def join(self) -> None:
        """Let the oldest agent of the pool join."""
        index = self._held.pop(0)
        self._go(index).touch()
        self._training.append(index)
        self.living.append((time.time(), 1))

    def lose(self, draw: float) -> None:
        """Kill one of the agents that train."""
        self._job.kill(self._training.pop(int(draw * len(self._training))))
        self.living.append((time.time(), -1))

    def tick(self) -> None:
        """Start the agents again that have ended by themselves. Their nodes live on."""
        for index in [each for each in self._training if self._job.ended([each])]:
            self._training.remove(index)
            self._job.kill(index)
            self.restarts += 1
            self.warm(joins=True)

    def _go(self, index: int) -> Path:
        return self._directory / f"agent-{index}.go"


@contextmanager
def peer_system(directory: Path, nodes_max: int, cores: float) -> Iterator[PeerSystem]:
    """A job whose rendezvous is in this process, with `cores` cores for each agent and its worker."""
    arguments = [f"--sequence-length={SEQUENCE_LENGTH}"]
    with ProcessorShares(cores) as shares:
        job = TorchrunJob(
            SETTINGS["torchrun_tuned"],
            directory,
            nodes_max,
            None,
            hosted=True,
            arguments=arguments,
        )
        host, _, port = job.endpoint.partition(":")
        store = dist.TCPStore(host, int(port), is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        with job:
            yield PeerSystem(job, shares, directory)
        del store
