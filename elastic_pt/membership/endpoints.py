"""Where the nodes of a run serve /metrics, and which of these endpoints an asker can reach. No socket and no clock.

    statuses of nodes that are up ─► Endpoint ─► reachable, for one asker ─► targets   JSON of Prometheus' http_sd, file_sd

Each machine, and each network namespace, has a loopback of its own. An endpoint on loopback is for an asker on the
same machine only: the asker has an address of this machine, and so has the node.
"""

import ipaddress
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import Field, TypeAdapter

from elastic_pt.membership.decision.status import NodeStatus, Peer, is_lost

NODE_LABEL: Final = "__meta_elastic_pt_node"
_ENCRYPTED: Final = {"__scheme__": "https"}
"""The node's name, for relabelling. Prometheus drops labels that begin with `__` after it."""


@dataclass(frozen=True)
class Endpoint:
    """A node's metrics server."""

    node: str
    address: Annotated[str, Field(max_length=64)]
    """Where the node's peers find it."""
    metrics_url: Annotated[str, Field(max_length=256)]


ENDPOINTS: Final = TypeAdapter(list[Endpoint])


def nodes_up(peers: Iterable[Peer], now_s: float, silence_s: float) -> list[NodeStatus]:
    """The newest statuses of the peers that have sent a message within `silence_s` and are not known to be gone."""
    return [
        peer.status
        for peer in peers
        if peer.status is not None
        and peer.spoke_s is not None
        # A leader's silence clock does not run for every node that it knows, so `is_lost` alone is not enough.
        and now_s - peer.spoke_s <= silence_s
        and not is_lost(peer, now_s, silence_s)
    ]


def endpoints_of(statuses: Iterable[NodeStatus]) -> list[Endpoint]:
    """The endpoints of these nodes. A node of stock torchrun has none."""
    return [
        Endpoint(each.member.node, each.member.address, each.metrics_url)
        for each in statuses
        if each.metrics_url
    ]


def reachable(
    endpoints: Iterable[Endpoint], asker: str, own_addresses: Collection[str]
) -> list[Endpoint]:
    """The endpoints that an asker at this address can reach, in the order of their names.

    `own_addresses` are those of this machine.
    """

    def is_here(address: str) -> bool:
        plain = plain_address(address)
        return _is_loopback(plain) or plain in own_addresses

    asks_here = is_here(asker)
    found = {
        each
        for each in filter(_is_its_own, endpoints)
        if not _is_loopback(urlsplit(each.metrics_url).hostname or "")
        or (asks_here and is_here(each.address))
    }
    return sorted(found, key=lambda each: (each.node, each.metrics_url))


def as_targets(endpoints: Iterable[Endpoint]) -> list[Mapping[str, Any]]:
    """The endpoints in the form that Prometheus reads over HTTP and from a file.

    No labels `run` and `node`: the metrics themselves have them.
    """
    return [
        {
            "targets": [url.netloc],
            # Plain HTTP is the default of a scrape configuration, which may say otherwise.
            "labels": {NODE_LABEL: each.node} | ({} if url.scheme == "http" else _ENCRYPTED),
        }
        for each in filter(_is_its_own, endpoints)
        for url in [urlsplit(each.metrics_url)]
    ]


def _is_its_own(endpoint: Endpoint) -> bool:
    """Whether this may be where the node serves metrics. A node must not make Prometheus ask just any server.

    It is an IP address with a port: the node's own, loopback, or another private one, for `telemetry.metrics_address`. A name,
    a public address and a link-local one, at which clouds have their metadata, are nobody's.
    """
    try:
        url = urlsplit(endpoint.metrics_url)
        host, port = plain_address(url.hostname or ""), url.port
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    private = address.is_private and not (
        address.is_link_local or address.is_unspecified or address.is_multicast
    )
    return (
        url.scheme in ("http", "https")
        and (url.path, url.query, url.fragment, url.username) == ("/metrics", "", "", None)
        and bool(port)
        and (host == plain_address(endpoint.address) or private)
    )


def plain_address(address: str) -> str:
    """An address without its scope. A server on :: sees an asker with IPv4 as ::ffff:192.0.2.1: returns 192.0.2.1."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(plain_address(host)).is_loopback
    except ValueError:
        return False
