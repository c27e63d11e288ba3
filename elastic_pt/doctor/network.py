"""Checks of this node's address and ports, and of the way to the agents of a run.

    own_address ─► interface, MTU        listening ─► a port that the kernel gives, reached by that address
    members of the log, cards of the lobby ─► ask each agent ─► members, path_mtu, same_code

Command line's process.
"""

import errno
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastic_pt.config import ElasticSection
from elastic_pt.doctor.check import Check, judged
from elastic_pt.errors import AccessDenied, NotFound
from elastic_pt.membership.address import interface_of, local_address, without_dns
from elastic_pt.membership.asking import ask_status
from elastic_pt.membership.decision.status import NodeStatus
from elastic_pt.membership.lobby import LOBBY, members_in
from elastic_pt.membership.pulse import beats
from elastic_pt.runlog.access import read_access
from elastic_pt.runlog.identity import code
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Member
from elastic_pt.store.port import Store

_CONNECT_TIMEOUT_S: Final = 3.0
_ANSWER_TIMEOUT_S: Final = 3.0
_AT_ONCE: Final = 64
_SHOWN_MAX: Final = 8
_PADDING_BYTES: Final = 8000
"""Nearly a packet of 9,000 bytes, which is the largest that machines send. Servers accept a header of that size."""
_USUAL_NAMES: Final = ("localhost", "localhost.localdomain", "debian", "ubuntu", "raspberrypi")


def own_address(address: str | None, *, alone: bool) -> Check:
    """The address that a node of this machine gives to its peers. `alone`: a run of one node needs none.

    Raises `ValueError` if `address` is no IP address.
    """
    wanted = address or local_address()
    interface = interface_of(wanted)
    expected = "an address that the other nodes reach"
    remedy = "give the address of the network between the nodes: elastic-pt run … --address ADDR"
    if interface is None:
        return Check(
            "address", False, f"{wanted}: no interface of this machine has it", expected, remedy
        )
    found = f"{wanted} ({interface}, MTU {mtu_of(interface)})"
    loopback = interface == "lo"
    return judged(
        "address", alone or not loopback, found + ", loopback" * loopback, expected, remedy
    )


def mtu_of(interface: str) -> str:
    """Largest packet of an interface in bytes; `unknown` if the kernel does not tell."""
    try:
        return (Path("/sys/class/net") / interface / "mtu").read_text().strip()
    except OSError:
        return "unknown"


def host_name() -> Check:
    """The host's name, which is the node's name by default. It need not resolve: agents use addresses only."""
    name = socket.gethostname()
    found = name
    # /etc/hosts only: a DNS server that is silent would take seconds.
    with without_dns(), suppress(OSError):
        found += f" ({socket.gethostbyname(name)} in /etc/hosts, which agents do not use)"
    return judged(
        "host_name",
        name.lower() not in _USUAL_NAMES,
        found,
        "a name that no other node has: it is the node's name by default",
        "hostnamectl set-hostname NAME, or elastic-pt run … --node NAME",
    )


def listening(address: str, port: int, name: str = "ports") -> Check:
    """Listen on a port and connect to it by the node's address, as its peers do. Port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    expected = "a connection to this machine's own address"
    remedy = "allow TCP between the nodes, on all ports, in the firewall of this machine (nft list ruleset)"
    try:
        with socket.create_server((address, port), family=family) as server:
            number = server.getsockname()[1]
            with socket.create_connection((address, number), _CONNECT_TIMEOUT_S):
                return Check(name, True, f"{join(address, number)} can be reached", expected, "")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            expected = "a free port"
            remedy = "end the process that listens there (ss -ltnp), or choose another port; an agent that runs is none"
        why = error.strerror or str(error)
        return Check(name, False, f"{join(address, port)}: {why}", expected, remedy)


def join(address: str, port: int) -> str:
    """`address:port`, with brackets around an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@dataclass(frozen=True)
class Reached:
    """What came back from one agent."""

    member: Member
    trouble: str
    """Why no connection could be made; empty if one could."""
    source: str
    """This machine's address on that connection, with its interface."""
    mss: int
    """The largest segment that both ends of it agreed on, in bytes; 0 if unknown."""


def agents_of(view: RunView, store: Store) -> list[Member]:
    """The agents that may be up: the members of the newest generation, and the nodes that wait."""
    if view.stop is not None:
        return []
    members = () if view.generation is None else view.generation.members
    found = {each.incarnation: each for each in (*members, *members_in(store.keys(LOBBY)))}
    return list(found.values())


def peer_checks(view: RunView, store: Store, elastic: ElasticSection) -> Iterator[Check]:
    """Connect to every agent of the run and ask it. Nothing if none of them is up, by its pulse."""
    agents = agents_of(view, store)
    if not agents:
        return
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="doctor") as pool:
        reached = list(pool.map(connect, agents))
    try:
        access = read_access(store, "doctor", tls=elastic.tls)
    except (NotFound, AccessDenied):
        return
    answers = ask_status(agents, access, _ANSWER_TIMEOUT_S)
    if not answers and not beats(store, elastic.takeover_s):
        return
    yield members(reached, answers)
    if not answers:
        return
    padded = ask_status(
        [each for each in agents if each.incarnation in answers],
        access,
        _ANSWER_TIMEOUT_S,
        padding_bytes=_PADDING_BYTES,
    )
    yield path_mtu(reached, answers, padded)
    yield same_code(answers, code())


def connect(member: Member) -> Reached:
    """Open a connection to an agent's port. Sends nothing."""
    try:
        with socket.create_connection((member.address, member.port), _CONNECT_TIMEOUT_S) as opened:
            here = opened.getsockname()[0]
            mss = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    except OSError as error:
        return Reached(member, error.strerror or str(error), "", 0)
    interface = interface_of(here.partition("%")[0]) or "unknown interface"
    return Reached(member, "", f"{here} ({interface})", mss)


_MEMBERS: Final = "each agent of the run answers this machine"
_OPEN: Final = "open all TCP ports between the nodes (security groups, NetworkPolicy, firewalls on both machines)"


def members(reached: Sequence[Reached], answers: Mapping[str, NodeStatus]) -> Check:
    """Which agents answer. Pure."""
    good = [each for each in reached if each.member.incarnation in answers]
    bad = [
        f"{each.member.node} {_at(each.member)}: {each.trouble or 'connected, but no answer as a member of this run'}"
        for each in reached
        if each.member.incarnation not in answers
    ]
    sources = ", ".join(sorted({each.source for each in good if each.source})) or local_address()
    found = f"{len(good)} of {len(reached)} reached from {sources}"
    return judged(
        "members",
        not bad,
        found + (f"; not {_named(bad)}" if bad else ""),
        _MEMBERS,
        f"{_OPEN}; an agent that has just ended is gone from elastic-pt status after some seconds",
    )


def path_mtu(
    reached: Sequence[Reached], answers: Mapping[str, NodeStatus], padded: Mapping[str, NodeStatus]
) -> Check:
    """Whether full packets arrive: agents that answer a small request, and not a large one, are behind a smaller MTU. Pure."""
    asked = [each for each in reached if each.member.incarnation in answers]
    lost = [each.member.node for each in asked if each.member.incarnation not in padded]
    segments = sorted({each.mss for each in asked if each.mss})
    shown = " to ".join(dict.fromkeys(f"{each:,}" for each in (*segments[:1], *segments[-1:])))
    found = f"large requests arrive (segments of {shown or 'unknown'} bytes)"
    return judged(
        "path_mtu",
        not lost,
        f"small requests are answered, large ones not, by {_named(lost)}" if lost else found,
        "large requests are answered like small ones",
        "set the same MTU on the interfaces of all nodes and on the path (ip link set dev IFACE mtu 1500), "
        "and let ICMP 'fragmentation needed' pass",
    )


def same_code(answers: Mapping[str, NodeStatus], here: str) -> Check:
    """Whether the agents run this version of elastic_pt: nodes with other code are refused. Pure."""
    other = [
        each.member.node for each in answers.values() if each.fingerprint.get("code", here) != here
    ]
    return judged(
        "same_code",
        not other,
        f"other code than here on {_named(other)}"
        if other
        else f"{len(answers)} agents run this code",
        "the same code on all nodes that train together",
        "install the version of the other nodes here, or stop all nodes and start them with this one",
    )


def _at(member: Member) -> str:
    return join(member.address, member.port)


def _named(texts: Sequence[str]) -> str:
    more = len(texts) - _SHOWN_MAX
    return ", ".join(texts[:_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")
