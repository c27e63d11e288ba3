"""The peer: jobs of stock torchrun that train the same model, with the same disturbances.

    agents of torchrun ─► torchrun_peer.py (FSDP2, DCP) ─► steps.jsonl ─► Sample

Each repetition starts a new job, because a disturbed job does not reliably accept a replacement. If torchrun does not
recover, the failure is recorded: no step within the limit, or all agents ended.
"""

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from benchmarks.recovery_report import Sample, Summary, summarize, unavailable
from benchmarks.recovery_run import CHECKPOINT_STEPS, Plan, network_of, plan_of
from benchmarks.recovery_watch import StepPoint, normal_step_s
from elastic_pt.chaos.processes import kill_all, mark_children, marked
from elastic_pt.errors import ElasticPtError
from elastic_pt.fleet.network import Network, missing_for_networks
from elastic_pt.workers.forking import die_with_parent

_SCRIPT: Final = Path(__file__).with_name("torchrun_peer.py")
START_S: Final = 180.0
_POLL_S: Final = 0.01
_STEPS_BEFORE: Final = 2 * CHECKPOINT_STEPS
_NETWORK_PORT: Final = 29400

Line = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The settings of torchrun."""

    collective_timeout_s: float
    arguments: tuple[str, ...] = ()
    rendezvous: tuple[str, ...] = ()
    """Parts of `--rdzv-conf`."""
    environment: dict[str, str] = field(default_factory=dict)


SETTINGS: Final = {
    # torchrun's defaults, except the process group's timeout of 30 minutes, which users usually change.
    "torchrun_default": Setting(collective_timeout_s=60.0),
    "torchrun_tuned": Setting(
        collective_timeout_s=10.0,
        arguments=("--monitor-interval=0.02", "--shutdown-timeout=1"),
        rendezvous=("last_call_timeout=1", "keep_alive_interval=1", "keep_alive_max_attempt=3"),
        environment={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    ),
}


class TorchrunJob:
    """Agents of one job, with one worker each. A context manager that ends all processes. Main thread.

    With a network each agent has its own network namespace, else all use the loopback interface. The first agent
    hosts the rendezvous, unless it is `hosted` at `endpoint` by the caller.
    """

    def __init__(
        self,
        setting: Setting,
        directory: Path,
        nodes_max: int,
        network: Network | None,
        *,
        hosted: bool = False,
        arguments: Sequence[str] = (),
    ) -> None:
        """`arguments` are further arguments of the script."""
        directory.mkdir(parents=True)
        self._setting = setting
        self._directory = directory
        self._nodes_max = nodes_max
        self._network = network
        self._agents: list[tuple[subprocess.Popen[bytes], str]] = []
        self._read_bytes = 0
        self._lines: list[Line] = []
        self._hosted = hosted
        self._arguments = arguments
        self.endpoint = (
            f"127.0.0.1:{_free_port()}"
            if network is None
            else f"{network.address(network.nodes[0])}:{_NETWORK_PORT}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for index in self.agents:
            self.kill(index)

    def start(self, prefix: Sequence[str] = ()) -> int:
        """Start one more agent; returns its number. `prefix` goes before the command, and must become the agent."""
        index = len(self._agents)
        address, inside, interface = "127.0.0.1", [], "lo"
        # On one machine torchrun cannot find the host of the rendezvous by its host name.
        rendezvous = ",".join(
            (*self._setting.rendezvous, f"is_host={int(index == 0 and not self._hosted)}")
        )
        if self._network is not None:
            address, interface = self._network.address(self._network.nodes[index]), "eth0"
            inside = self._network.prefix(self._network.nodes[index])
        command = [*inside, *prefix, sys.executable, "-m", "torch.distributed.run"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}", "--rdzv-id=peer"]
        command += [f"--nnodes=1:{self._nodes_max}", "--nproc-per-node=1", "--max-restarts=1000"]
        command += [f"--rdzv-conf={rendezvous}", f"--local-addr={address}"]
        command += [*self._setting.arguments, str(_SCRIPT), str(self._directory)]
        command += [f"--timeout={self._setting.collective_timeout_s}"]
        command += [f"--checkpoint-steps={CHECKPOINT_STEPS}", *self._arguments]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
        # torchrun's workers have their own sessions. The mark finds them again.
        with mark_children() as mark, self._log(index).open("wb") as output:
            agent = subprocess.Popen(
                command,
                env=os.environ | environment | self._setting.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._agents.append((agent, mark))
        return index

    @property
    def agents(self) -> range:
        """The numbers of all started agents."""
        return range(len(self._agents))

    def kill(self, index: int) -> None:
        """Simulate the loss of an agent's machine."""
        agent, mark = self._agents[index]
        kill_all(mark)
        agent.wait()
        # Again, for a worker that was being created during the first call.
        kill_all(mark)

    def leave(self, index: int) -> None:
        """SIGTERM to an agent."""
        self._agents[index][0].terminate()

    def worker(self, index: int) -> int:
        """Process id of an agent's worker."""
        agent, mark = self._agents[index]
        (pid,) = [pid for pid, parent in marked(mark).items() if parent == agent.pid]
        return pid

    def cut(self, index: int) -> None:
        """Take an agent's link down."""
        assert self._network is not None
        self._network.link_down(self._network.nodes[index])

    def ended(self, among: Sequence[int]) -> bool:
        """Whether all these agents have ended."""
        return all(self._agents[index][0].poll() is not None for index in among)

    def lines(self) -> list[Line]:
        """One line per completed step, from rank 0 of each world."""
        path = self._directory / "steps.jsonl"
        if path.exists() and path.stat().st_size > self._read_bytes:
            with path.open("rb") as file:
                file.seek(self._read_bytes)
                *whole, _ = file.read().split(b"\n")
            self._read_bytes += sum(len(line) + 1 for line in whole)
            self._lines += [json.loads(line) for line in whole]
        return self._lines

    def until_training(self, nodes: int, steps: int, limit_s: float = START_S) -> None:
        """Wait until a world of `nodes` nodes has done `steps` steps. Raises `ElasticPtError` after `limit_s`."""
        deadline_s = time.monotonic() + limit_s
        while sum(line["world_size"] == nodes for line in self.lines()) < steps:
            if time.monotonic() > deadline_s:
                tails = [self._log(index).read_text()[-2000:] for index in range(nodes)]
                raise ElasticPtError(f"torchrun: expected a start within {limit_s} s\n{tails}")
            time.sleep(_POLL_S)

    def _log(self, index: int) -> Path:
        return self._directory / f"agent-{index}.log"


def _free_port() -> int:
    # torchrun needs the number before it starts. The kernel does not reuse it so soon.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def disturb(job: TorchrunJob, kind: str, victim: int) -> list[int]:
    """Disturb the job. Returns the agents that should continue."""
    victims = {victim, (victim + 2) % len(job.agents)} if kind == "two_nodes" else {victim}
    others = [index for index in job.agents if index not in victims]
    match kind:
        case "worker":
            os.kill(job.worker(victim), signal.SIGKILL)
        case "hang":
            os.kill(job.worker(victim), signal.SIGSTOP)
        case "node" | "two_nodes":
            for each in sorted(victims):
                job.kill(each)
        case "silent":
            job.cut(victim)
        case "leave":
            job.leave(victim)
        case "join":
            job.start()
    return [*others, victim] if kind in ("worker", "hang", "join") else others


def await_new_world(
    job: TorchrunJob, before: Line, world_size: int | None, going_on: Sequence[int], limit_s: float
) -> Line | str:
    """The first step of a world after that of `before`, or the reason why there is none."""
    deadline_s = time.monotonic() + limit_s
    while True:
        for line in job.lines():
            other = line["time_s"] > before["time_s"] and line["pid"] != before["pid"]
            if other and world_size in (None, line["world_size"]):
                return line
        if job.ended(going_on):
            return "the job ended"
        if time.monotonic() > deadline_s:
            return f"> {limit_s:g} s"
        time.sleep(_POLL_S)


def await_progress(job: TorchrunJob, first: Line, limit_s: float) -> None:
    """Wait until the new world has done a step beyond the last step of the old one, for at most `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    before = [line["step"] for line in job.lines() if line["time_s"] < first["time_s"]]
    while job.lines()[-1]["step"] <= max(before) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def sample_of(kind: str, lines: Sequence[Line], start_s: float, first: Line) -> Sample:
    """The measurements of a recovery, from the first step of the new world."""
    frontier = max(line["step"] for line in lines if line["time_s"] < first["time_s"])
    beside = {"lost_steps": float(frontier - first["step"] + 1)}
    again_s = next((line["time_s"] for line in lines if line["step"] > frontier), None)
    if again_s is not None:
        beside["new_progress_s"] = again_s - start_s
    if kind == "join":
        beside["joiner_s"] = first["time_s"] - start_s
    if kind not in ("join", "leave"):
        return Sample(first["time_s"] - start_s, phases_from(start_s, first), beside)
    since = [line for line in lines if line["time_s"] <= first["time_s"]]
    normal_s = normal_step_s([StepPoint(line["time_s"], line["step"]) for line in since], start_s)
    # If there were several worlds, the longest wait counts.
    last, following = max(
        ((one, other) for one, other in itertools.pairwise(since) if other["time_s"] > start_s),
        key=lambda pair: pair[1]["time_s"] - pair[0]["time_s"],
    )
    phases = phases_from(last["time_s"], following)
    phases["first step"] -= normal_s
    return Sample(sum(phases.values()), phases, {**beside, "normal_step_s": normal_s})


def phases_from(since_s: float, first: Line) -> dict[str, float]:
    """Seconds of each part between a moment and the first step of a world. Their sum is the whole time."""
    began_s = max(since_s, first["began_s"])
    parts = {
        # torchrun does not report when it detected the fault.
        "detect and agree": began_s - since_s,
        "fork": first["fork_s"],
        "process group": first["group_s"],
        "restore": first["restore_s"],
    }
    return parts | {"first step": first["time_s"] - since_s - sum(parts.values())}


def measure_once(kind: str, setting: Setting, plan: Plan, directory: Path, turn: int) -> Sample:
    """One job, one disturbance."""
    randomness = random.Random(f"{plan.seed} {kind} {turn}")
    victim = turn % plan.nodes
    with ExitStack() as stack:
        network = stack.enter_context(network_of(plan.nodes)) if kind == "silent" else None
        nodes_max = plan.nodes + (kind == "join")
        job = stack.enter_context(TorchrunJob(setting, directory, nodes_max, network))
        for _ in range(plan.nodes):
            job.start()
        steps = _STEPS_BEFORE + randomness.randint(1, 2 * CHECKPOINT_STEPS)
        job.until_training(plan.nodes, steps)
        before = job.lines()[-1]
        start_s = time.time()
        going_on = disturb(job, kind, victim)
        wanted = plan.nodes + 1 if kind == "join" else None
        found = await_new_world(job, before, wanted, going_on, plan.limit_s)
        if not isinstance(found, str):
            await_progress(job, found, plan.limit_s)
        lines = list(job.lines())
    place = "" if kind == "join" else ("rendezvous host" if victim == 0 else f"agent {victim}")
    if isinstance(found, str):
        return Sample(None, victim=place, failure=found)
    sample = sample_of(kind, lines, start_s, found)
    return Sample(sample.seconds, sample.phases, sample.beside, place)


def measure_peer(name: str, kind: str, plan: Plan) -> Summary:
    """All repetitions of one kind with one setting. The victim is another agent each time, the rendezvous host last."""
    if kind == "silent" and (reason := missing_for_networks()):
        return unavailable(f"not measured: needs networks, {reason}")
    plan = plan_of(kind, plan)
    samples: list[Sample] = []
    for turn in range(1, plan.repeats + 1):
        directory = plan.directory / name / f"{kind}-{turn}"
        try:
            sample = measure_once(kind, SETTINGS[name], plan, directory, turn)
        except ElasticPtError as error:
            plan.tell(f"{name} {kind}: {error}")
            sample = Sample(None, failure=str(error).partition("\n")[0])
        samples.append(sample)
        shown = sample.failure if sample.seconds is None else f"{sample.seconds:.2f} s"
        phases = " ".join(f"{part} {seconds:.2f}" for part, seconds in sample.phases.items())
        plan.tell(f"{name} {kind} {turn}/{plan.repeats} {sample.victim}: {shown}  {phases}")
    return summarize(samples)
