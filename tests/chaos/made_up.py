"""Made-up runs for the oracles: what was played, the log, events and scrapes, written by hand. No process.

fault, struck, training, life ─► played     what was seen from outside
member, generation, checkpoint ─► log_of    the records
MadeRun                                     all of a run of three nodes, with what its agents wrote, for `evidence`
"""

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from elastic_pt.chaos.arena import Life
from elastic_pt.chaos.evidence import check_evidence
from elastic_pt.chaos.play import Played, Progress, Struck
from elastic_pt.chaos.scenario import FaultSpec, Scenario
from elastic_pt.chaos.scrape import Counters
from elastic_pt.chaos.watched import WatchedRun
from elastic_pt.config import parse_config
from elastic_pt.runlog.records import (
    COMPLETED,
    ORIGIN,
    Body,
    Cause,
    CauseKind,
    Checkpoint,
    Commit,
    Control,
    Generation,
    InMemory,
    Member,
    Record,
    Request,
    Stop,
    Verb,
)

BEGAN_S: Final = 1e9
"""Unix time of second 0 of a made-up run."""
STEP_S: Final = 0.4
NODES: Final = ("node-0", "node-1", "node-2")
"""Those of a `MadeRun`."""
SCENARIO: Final = Scenario(name="made", hypothesis="It is made up.", store="directory")


def fault(kind: str = "kill_node", *, for_s: float | None = None) -> FaultSpec:
    """A fault of the first node."""
    return FaultSpec.model_validate(
        {"kind": kind, "node": "node-0", "at": {"seconds": 0}}
        | ({} if for_s is None else {"for_s": for_s})
    )


def struck(second: float, spec: FaultSpec | None = None, *, generation: int = 1) -> Struck:
    """It strikes the first of two members."""
    spec = spec or fault()
    members = ("node-0", "node-1")
    return Struck(
        1, spec, ("node-0",), second, BEGAN_S + second, generation, 0, members, spec.of.ends_node
    )


def played(
    *faults: Struck,
    lives: Sequence[Life] = (),
    steps: Sequence[tuple[float, int]] = (),
) -> Played:
    """A run of two nodes. `steps`: at which second a worker began to compute, after how many steps."""
    scenario = Scenario(name="s", hypothesis="h", nodes=2, store="directory", step_s=0.1)
    config = parse_config('[run]\nurl = "run"\n[data]\nurl = "data"\n', source="test")
    return Played(
        scenario,
        1,
        config,
        Path("/nowhere"),
        struck=list(faults),
        lives=list(lives),
        progress=[Progress(BEGAN_S + second, step) for second, step in steps],
    )


def training(from_s: float, first: int, last: int) -> list[tuple[float, int]]:
    """Steps one after the other."""
    return [(from_s + STEP_S * (step - first), step) for step in range(first, last + 1)]


def life(
    node: str, from_s: float, until_s: float | None, code: int | None = 0, *, pid: int = 0
) -> Life:
    """An agent."""
    began_s, end_s = BEGAN_S + from_s, None if until_s is None else BEGAN_S + until_s
    return Life(node, pid or pid_of(node), began_s, began_s, end_s, code)


def pid_of(node: str) -> int:
    """The process of a node's agent, unless it is started again."""
    return 100 + int(node[-1])


def member(node: str, *, pid: int = 0) -> Member:
    """Its incarnation is the node's name and the process."""
    pid = pid or pid_of(node)
    return Member(node, f"{node}.{pid}", "127.0.0.1", 1, pid, 1)


def checkpoint(step: int, generation: int = 1) -> Checkpoint:
    """A checkpoint, in its directory."""
    return Checkpoint(
        step, generation, f"ckpt/{step:010d}-g{generation}-abcd", 9, "0" * 64, loss=None
    )


def generation(
    number: int,
    *members: Member,
    resume_step: int = 0,
    reached: int | None = None,
    frontier: int = 0,
    causes: tuple[Cause, ...] = (),
    agree_s: float = 0.0,
) -> Generation:
    """A generation that resumes from memory, or from the start."""
    memory = InMemory(number - 1, resume_step, sources=(0,)) if resume_step else None
    return Generation(
        number,
        members,
        slots=(),
        store_address="127.0.0.1",
        store_port=1,
        resume=None,
        reason="made up",
        causes=causes,
        frontier_step=frontier,
        agree_s=agree_s,
        memory=memory,
        reached_step=reached,
    )


def log_of(*bodies: tuple[float, Body]) -> list[Record]:
    """The records of a log, each with the second of its time."""
    records: list[Record] = []
    for second, body in bodies:
        append(records, second, body)
    return records


def append(records: list[Record], second: float, body: Body, writer: str = "node-0") -> None:
    """Add a record to a log."""
    before = records[-1].generation if records else 0
    number = body.number if isinstance(body, Generation) else before
    time = _text_of(second)
    records.append(Record(len(records), number, writer, "nonce", time, ORIGIN, {}, body))


def _text_of(second: float) -> str:
    at = datetime.datetime.fromtimestamp(BEGAN_S + second, datetime.UTC)
    return at.isoformat(timespec="milliseconds")


@dataclass
class MadeRun:
    """Three nodes that train from second 5 on, and complete 48 steps in second 50 unless a test says otherwise."""

    directory: Path
    seconds: float = 60.0
    struck: list[Struck] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        for node in NODES:
            self.event(1.0, node, "agent_started")
        self.generation(5.0, *NODES)
        for node in NODES:
            self.event(5.1, node, "decision", kind="wait", reason="training")

    def strike(
        self,
        at_s: float,
        kind: str,
        *nodes: str,
        generation: int = 1,
        step: int = 20,
        members: Sequence[str] = NODES,
        by_agent: bool = False,
        **spec: Any,
    ) -> Struck:
        """A fault. One that lasts is healed after its time. `by_agent`: its deed was done by an agent."""
        at = {"step": step} if "phase" not in spec else {"phase": spec.pop("phase")}
        fault = FaultSpec.model_validate({"kind": kind, "at": at, **spec})
        healed_s = None if fault.for_s is None else at_s + fault.for_s
        struck = Struck(
            len(self.struck) + 1,
            fault,
            nodes,
            at_s,
            BEGAN_S + at_s,
            generation,
            step,
            tuple(members),
            fault.of.ends_node or by_agent,
            healed_s,
        )
        self.struck.append(struck)
        return struck

    def generation(
        self,
        at_s: float,
        *members: str,
        causes: Sequence[tuple[CauseKind, str] | tuple[CauseKind, str, str]] = (),
        agree_s: float = 0.0,
        lost: int = 0,
    ) -> None:
        """A GENERATION that loses so many steps. Causes have kind, node and detail. A member such as `node-1/2` is the second agent of node-1."""
        made = [each.partition("/") for each in members]
        body = generation(
            self.records[-1].generation + 1 if self.records else 1,
            *(member(node, pid=int(again or 1)) for node, _, again in made),
            causes=tuple(Cause(*each) for each in causes),
            agree_s=agree_s,
            reached=lost,
        )
        append(self.records, at_s, body, made[0][0])

    def control(self, at_s: float, verb: Verb, node: str = "", *, done: bool = False) -> None:
        """What an operator asks, or an agent's answer."""
        request = Request(verb, "chaos", node=node, index=len(self.records), done=done)
        append(self.records, at_s, Control(request, (), 0), "chaos")

    def commit(self, at_s: float, request: int) -> None:
        """A checkpoint that meets the request with this index."""
        append(self.records, at_s, Commit((checkpoint(6),), "history", request=request))

    def stop(self, at_s: float = 50.0, reason: str = COMPLETED) -> None:
        """The end."""
        append(self.records, at_s, Stop(reason, 48))

    def event(self, at_s: float, node: str, name: str, level: str = "info", **more: Any) -> None:
        """What an agent or a worker wrote."""
        with (self.directory / f"{node}.log").open("a") as file:
            file.write(_event(at_s, node, name, level, **more))

    def shipped_event(self, at_s: float, node: str, name: str) -> None:
        """What an agent wrote to the run's directory alone."""
        directory = self.directory / "run" / "events" / node
        directory.mkdir(parents=True)
        (directory / "00000000.jsonl").write_text(_event(at_s, node, name, "error"))

    def scrape(self, at_s: float, node: str, *samples: str) -> None:
        """What a node's metrics showed, each sample with its value, as in `elastic_pt_notices_total 1.0`."""
        self.counters.take(node, "\n".join(samples), BEGAN_S + at_s)

    def judged(self) -> str:
        """What the oracle says. Raises `Objection`."""
        config = SCENARIO.run_config(
            f"file://{self.directory}/run", f"file://{self.directory}/data"
        )
        played = Played(
            SCENARIO,
            1,
            config,
            self.directory,
            struck=self.struck,
            seconds=self.seconds,
            counters=self.counters,
        )
        return check_evidence(played, WatchedRun(config, self.directory), self.records)


def _event(at_s: float, node: str, name: str, level: str, **more: Any) -> str:
    event = {"timestamp": _text_of(at_s), "level": level, "event": name, "node": node, **more}
    return json.dumps(event) + "\n"
