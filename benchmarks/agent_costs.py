"""Processor time of an agent in a large fleet. `tests/sim/scale.py` charges its simulated agents with it.

    python benchmarks/agent_costs.py [--nodes 1000] [--repeats 5] [--json FILE]

Three costs, as medians in microseconds:

    message   sent and received over a real WebSocket on loopback, with the peer table; sender and receiver together
    turn      of a leader that watches all nodes; divided by the nodes
    record    reading one GENERATION; divided by its members
"""

import argparse
import asyncio
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic_pt.config import ElasticSection
from elastic_pt.membership.decision.status import Limits, NodePhase, NodeStatus
from elastic_pt.membership.links import Links
from elastic_pt.membership.participant import Participant
from elastic_pt.membership.peers import Message
from elastic_pt.membership.resources import Resources
from elastic_pt.runlog.access import Access, issue, new_authority
from elastic_pt.runlog.log import RunLog, record_key
from elastic_pt.runlog.records import Generation, Member, Record
from elastic_pt.store.open import open_store

MESSAGES = 2000
LIMITS = Limits(ElasticSection(nodes_max=4096), slots=None)
FINGERPRINT = dict.fromkeys(
    ("code", "config", "data", "dtype", "processor", "torch"), "0123456789abcdef"
)


class NoStore:
    """Stands for a generation's store: only a port."""

    port = 1


def status_of(member: Member) -> NodeStatus:
    """A healthy member of generation 1."""
    return NodeStatus(member, NodePhase.RUNNING, 1, 1, 0, None, FINGERPRINT)


def participant_of(member: Member, directory: str) -> Participant:
    """A node of the run in `directory` that has read the log."""
    store = open_store(f"file://{directory}")
    log = RunLog(store, writer=member.node)
    log.refresh()
    return Participant(
        status_of(member),
        LIMITS,
        Resources(
            log=log,
            hints=store,
            clock_s=time.monotonic,
            bind_store=NoStore,
            choose_resume=lambda _: None,
            on_drain=lambda _: None,
        ),
    )


@contextmanager
def world(nodes: int) -> Iterator[tuple[str, tuple[Member, ...]]]:
    """A run directory; its log has one generation with `nodes` members."""
    members = tuple(
        Member(f"n{index:05d}", f"{index:016x}", "127.0.0.1", 20000, index, 8)
        for index in range(nodes)
    )
    generation = Generation(1, members, (), "127.0.0.1", 1, None, "started")
    with tempfile.TemporaryDirectory() as directory:
        RunLog(open_store(f"file://{directory}"), writer="x").append(
            lambda _: generation, generation=0
        )
        yield directory, members


async def message_s(directory: str, members: tuple[Member, ...]) -> float:
    """Processor seconds of one message, sender and receiver together."""
    here, there = (participant_of(member, directory) for member in members[:2])
    access = Access("token", issue(new_authority(), "benchmark", "benchmark"))
    links = [Links(each, access, lambda: None) for each in (here, there)]
    try:
        ports = [await each.serve("127.0.0.1") for each in links]
        there_member = dataclasses.replace(members[1], port=ports[1])
        there.me.say(member=there_member)
        received = there.table.received
        count = 0

        def counted(message: Message) -> bool:
            nonlocal count
            count += 1
            return received(message)

        there.table.received = counted  # type: ignore[method-assign]
        links[0].aim([there_member])
        while not count:
            await asyncio.sleep(0.01)
        before, began_s = count, time.process_time()
        while count < before + MESSAGES:
            links[0].say(asks=True)
            await asyncio.sleep(0)
        # Twice the count: each message was answered.
        return (time.process_time() - began_s) / (2 * (count - before))
    finally:
        for each in links:
            await each.close()


def turn_s(directory: str, members: tuple[Member, ...]) -> float:
    """Processor seconds of a leader's turn, divided by the nodes."""
    leader = participant_of(members[0], directory)
    leader.turn()
    for count, member in enumerate(members[1:], start=1):
        leader.received(Message(count, 0, False, status_of(member)))
    began_s, turns = time.process_time(), 20
    for _ in range(turns):
        leader.turn()
    return (time.process_time() - began_s) / turns / len(members)


def record_s(directory: str, members: tuple[Member, ...]) -> float:
    """Processor seconds to read a GENERATION record, divided by its members."""
    key = record_key(0)
    data = open_store(f"file://{directory}").read(key)
    began_s, times = time.process_time(), 20
    for _ in range(times):
        Record.from_bytes(data, key=key)
    return (time.process_time() - began_s) / times / len(members)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with world(options.nodes) as (directory, members):
        runs = [
            {
                "message": asyncio.run(message_s(directory, members)),
                "turn": turn_s(directory, members),
                "record": record_s(directory, members),
            }
            for _ in range(options.repeats)
        ]
    result = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    for name, seconds in result.items():
        print(f"{name:>8}: {1e6 * seconds:6.1f} us")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
