"""Nodes with snapshots and mirrors, one of which is killed; the others must hold a whole state of one step.

    driver   all nodes: take the snapshot of step s ─► each is complete (a mirror has it) ─► step s + 1 ...
    victim   killed at a failpoint ─► the others: what is held ─► the membership's choice ─► restore ─► go on

A node is a process with the product's snapshots, mirrors, HTTP answers and a worker's buffers. The driver is this
process; it stands for the agreement of the workers and for the membership.
"""

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import torch

from elastic_pt import failpoints
from elastic_pt.checkpoint.memory import MemoryState
from elastic_pt.checkpoint.restore import load_rows
from elastic_pt.checkpoint.snapshot import (
    PAYLOAD_OFFSET,
    Buffer,
    SnapshotBuffers,
    describe_snapshot,
)
from elastic_pt.failpoints import Failpoint
from elastic_pt.membership.decision.resume import newest_in_memory
from elastic_pt.membership.decision.status import Held
from elastic_pt.runlog.records import Generation, InMemory
from tests.agent.test_snapshots import Node, generation, served
from tests.checkpoint.world import local_rows, same_bits, training_state
from tests.crash.bucket import state_of
from tests.crash.processes import TIMEOUT_S, Child, Say
from tests.membership.world import status

STEPS: Final = 5
AFTER: Final = 2
"""Steps of the second generation."""
_POLL_S: Final = 0.1
OF_WORKER: Final = (Failpoint.BUFFER_BEGUN, Failpoint.BUFFER_COPIED, Failpoint.BUFFER_DONE)


class NodeProcess:
    """The driver's end of one node's process."""

    def __init__(self, folder: Path, seed: int, rank: int, rules: str) -> None:
        self.rank = rank
        read, self._commands = os.pipe()
        self._child = Child(lambda say: _serve(folder, seed, rank, rules, read, say))
        os.close(read)
        port = self._child.line()
        assert port is not None
        self.port = int(port)

    def tell(self, **command: Any) -> None:
        """Send a command. A dead node does not get it."""
        with suppress(BrokenPipeError):
            os.write(self._commands, json.dumps(command).encode() + b"\n")

    def answer(self) -> Any:
        """Its answer to the oldest command without one; None if it is dead."""
        line = self._child.line()
        return None if line is None else json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        os.close(self._commands)
        os.waitpid(self._child.pid, 0)
        os.close(self._child.output)


def _serve(folder: Path, seed: int, rank: int, rules: str, commands: int, say: Say) -> None:
    """The process of a node: do one command after the other."""
    torch.set_num_threads(1)
    node = Node(folder / f"node-{rank}", rank)
    node.tensors = state_of(seed, 0)
    with served(node.snapshots) as port, os.fdopen(commands) as lines:
        failpoints.arm(rules)
        say(str(port))
        for line in lines:
            say(json.dumps(_do(node, seed, **json.loads(line))))


def _do(node: Node, seed: int, verb: str, **facts: Any) -> Any:
    match verb:
        case "begin":
            node.rank = facts["index"]
            node.begin(_generation(facts["nodes"], facts["number"], facts["memory"]))
            return True
        case "step":
            number, step = facts["number"], facts["step"]
            for name, each in state_of(seed, step).items():
                node.tensors[name].copy_(each)
            node.write(number, step, complete_step=facts["complete"])
            return True
        case "complete":
            wanted = facts["number"], facts["step"]
            with node._changed:
                return [node._changed.wait_for(lambda: wanted in node.complete, _POLL_S)]
        case "held":
            return [asdict(each) for each in node.snapshots.held]
        case "restore":
            following = _generation(facts["nodes"], facts["number"], facts["memory"])
            _require_state(node, following, seed)
            return True
    raise AssertionError(verb)


def _generation(
    nodes: Sequence[tuple[int, int]], number: int, memory: Sequence[Any] | None
) -> Generation:
    members = [cast(Node, SimpleNamespace(rank=rank, port=port)) for rank, port in nodes]
    state = None if memory is None else InMemory(memory[0], memory[1], tuple(memory[2]))
    return generation(members, number, state)


def _require_state(node: Node, following: Generation, seed: int) -> None:
    """Fail unless this node can read every row of the state that the generation resumes from."""
    places = node.snapshots.places(following)
    assert places is not None
    expected = state_of(seed, places.step)
    found = {name: torch.full_like(each, float("nan")) for name, each in expected.items()}
    wanted = {name: (0, each.shape[0]) for name, each in found.items()}
    with MemoryState(places, range(len(places.shards))) as memory:
        assert memory.index.state == training_state(places.step)
        load_rows(memory, memory.index, wanted, found)
    wrong = [name for name, each in expected.items() if not same_bits(found[name], each)]
    assert not wrong, f"step {places.step}: {wrong} differ"


def kill_worker_at(point: Failpoint, seed: int, folder: Path) -> None:
    """Kill a worker alone while it writes its buffers: its agent finds the newest state that was whole, and no other."""
    draw = random.Random(f"worker {seed} {point.label}")
    hit = draw.randint(1, STEPS)
    folder.mkdir()
    ended = Child(lambda say: _write_buffers(folder, seed, f"{point.label}@{hit}:kill", say)).wait()
    assert ended.killed, f"seed {seed} did not reach {point.label}@{hit}"
    last = hit if point is Failpoint.BUFFER_DONE else hit - 1
    Child(lambda _: _check_buffers(folder, seed, last)).wait()


def _write_buffers(folder: Path, seed: int, rules: str, say: Say) -> None:
    failpoints.arm(rules)
    live = state_of(seed, 0)
    buffers = SnapshotBuffers(folder, 1, 0, local_rows(live, 0, 1))
    buffers.allocate()
    for step in range(1, STEPS + 1):
        for name, each in state_of(seed, step).items():
            live[name].copy_(each)
        buffers.write(training_state(step), complete_step=step - 1)


def _check_buffers(folder: Path, seed: int, last: int) -> None:
    """Fail unless the newest whole buffer has the state of `last`, and each whole one that of its step."""
    found = {}
    for path in folder.iterdir():
        buffer = Buffer(1, 0, int(path.name.rpartition("-")[2]))
        record = describe_snapshot(buffer, folder)
        if record is None:
            continue
        data = path.read_bytes()[PAYLOAD_OFFSET:]
        for piece in record.slices:
            rows = state_of(seed, record.step)[piece.name].numpy().tobytes()
            assert data[piece.offset : piece.end_offset] == rows
        found[record.step] = path
    assert max(found, default=0) == last, f"{sorted(found)}, expected {last}"


def kill_node_at(point: Failpoint, seed: int, folder: Path) -> None:
    """Kill one of several nodes at a point; the others must go on from a state of the last two steps."""
    draw = random.Random(f"memory {seed} {point.label}")
    count, hit = draw.randint(2, 4), draw.randint(1, STEPS - 1)
    victim = draw.randrange(count)
    folder.mkdir()
    nodes: list[NodeProcess] = []
    try:
        for rank in range(count):
            rules = f"{point.label}@{hit}:kill" if rank == victim else ""
            nodes.append(NodeProcess(folder, seed, rank, rules))
        complete, done = _train(nodes, 1, 0, STEPS, None)
        assert done < STEPS, f"seed {seed} did not reach {point.label}@{hit}"
        nodes.pop(victim).close()
        memory = _choose(nodes, _generation_of(nodes, count, victim))
        assert complete == 0 or memory is not None, "no state is whole"
        step = 0 if memory is None else memory.step
        assert complete <= step <= done + 1, f"step {step}; complete was {complete}"
        reached, _ = _train(nodes, 2, step, step + AFTER, memory)
        assert reached == step + AFTER
        assert _choose(nodes, _generation([(each.rank, each.port) for each in nodes], 2, None))
    finally:
        for each in nodes:
            each.close()


def _generation_of(nodes: Sequence[NodeProcess], count: int, victim: int) -> Generation:
    """The first generation, the victim included; nobody needs its port any more."""
    ports = {each.rank: each.port for each in nodes}
    return _generation([(rank, ports.get(rank, 1)) for rank in range(count)], 1, None)


def _train(
    nodes: Sequence[NodeProcess], number: int, step: int, until: int, memory: InMemory | None
) -> tuple[int, int]:
    """Run a generation until a step or until a node is dead. Returns the newest step that was complete everywhere, and
    the last one that all have begun."""
    places = [(each.rank, each.port) for each in nodes]
    source = None if memory is None else [memory.generation, memory.step, list(memory.sources)]
    facts = {"nodes": places, "number": number, "memory": source}
    if source is not None and not all(_all(nodes, lambda _: {"verb": "restore", **facts})):
        raise AssertionError("a node is dead")
    begun = _all(nodes, lambda index: {"verb": "begin", "index": index, **facts})
    complete, done = 0, step
    while all(begun) and done < until:
        step += 1
        each = {"number": number, "step": step, "complete": complete}
        if not all(_all(nodes, lambda _: {"verb": "step", **each})):
            break
        if not _await_complete(nodes, number, step):
            break
        complete = done = step
    return complete, done


def _await_complete(nodes: Sequence[NodeProcess], number: int, step: int) -> bool:
    """Wait until a step is complete on all nodes; False if a node is dead."""
    give_up_at_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < give_up_at_s:
        answers = _all(nodes, lambda _: {"verb": "complete", "number": number, "step": step})
        if None in answers:
            return False
        if answers == [[True]] * len(nodes):
            return True
    raise AssertionError(f"step {step} is not complete after {TIMEOUT_S} s")


def _all(nodes: Sequence[NodeProcess], command: Callable[[int], dict[str, Any]]) -> list[Any]:
    """The answers of all nodes to a command; None from a dead one."""
    for index, node in enumerate(nodes):
        node.tell(**command(index))
    return [node.answer() for node in nodes]


def _choose(nodes: Sequence[NodeProcess], before: Generation) -> InMemory | None:
    """The state from which the membership would let these nodes resume."""
    members = _generation([(each.rank, each.port) for each in nodes], 2, None).members
    statuses = {}
    for node, member in zip(nodes, members, strict=True):
        node.tell(verb="held")
        held = tuple(Held(**each) for each in node.answer())
        statuses[member.incarnation] = replace(status("a"), member=member, held=held)
    return newest_in_memory(before, members, statuses, 0)
