"""A WireGuard network between the nodes of a run, without a server: the nodes find each other through the run's bucket.

    own key ──► interface ──► object secret/wireguard/<public key>@<endpoint> of the run directory
    listing of secret/wireguard/, each --interval-s ──► peers of the interface

    address=$(mesh.py RUN_URL --once)       # makes the interface, prints this node's address in the network
    mesh.py RUN_URL &                       # keeps the peers up to date
    elastic-pt run RUN_URL --address "$address"

A process of its own, beside the agent; docs/security.md explains it. It needs CAP_NET_ADMIN, `ip`, `wg`, and
`wireguard-go` where the kernel has no WireGuard. Who may write below `secret/` is a peer. The private key stays on this
machine, in memory. An address is a hash of a public key, so nobody assigns it and no peer can take that of another.
"""

import argparse
import base64
import hashlib
import ipaddress
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from elastic_pt.errors import ConfigError, ElasticPtError, StoreError
from elastic_pt.membership.address import interface_of, local_address
from elastic_pt.store.open import open_store
from elastic_pt.store.port import PRIVATE, Store

PREFIX = f"{PRIVATE}wireguard/"
NETWORK = ipaddress.IPv6Network("fdca:e1a5:71c0:d71::/64")
OVERHEAD_BYTES = 80
KEEPALIVE_S = 25
SILENT_S = 600.0
"""A live peer agrees on a new session key each two minutes. The object of one that has not for so long is deleted."""
MISSED_MAX = 6
"""Listings in a row without a peer's object after which it is removed. A live one writes it again before."""


@dataclass
class Peer:
    """What is known of a peer of the interface."""

    heard_s: float
    handshake: str = "0"
    """When it last agreed on a session key, as `wg` prints it."""
    missed: int = 0


def run(*command: str, text: str = "") -> str:
    """What a command prints. Raises `ConfigError` if it fails or is not installed."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}; expected it to be installed") from error
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())
        raise ConfigError(f"{' '.join(command)}: {reason}; expected it to succeed")
    return done.stdout


def address_of(public_key: str) -> ipaddress.IPv6Address:
    """A node's address in the network."""
    digest = hashlib.sha256(base64.b64decode(public_key)).digest()
    return NETWORK[int.from_bytes(digest[:8], "big")]


def public_key_in(entry: str) -> str | None:
    """The public key that an object's key names; None for another object, or an endpoint that no peer reaches."""
    form = PREFIX + r"([0-9a-f]{64})@(?:([0-9.]+)|\[([0-9a-f:.]+)\]):([0-9]{1,5})"
    if (found := re.fullmatch(form, entry)) is None:
        return None
    try:
        host = ipaddress.ip_address(found[2] or found[3])
    except ValueError:
        return None
    if host.is_loopback or host.is_unspecified or not 1 <= int(found[4]) <= 65535:
        return None
    return base64.b64encode(bytes.fromhex(found[1])).decode()


def bring_up(interface: str, endpoint: str, key_file: Path) -> str:
    """Make key and interface; those that are there stay, with their connections. Returns the public key."""
    host, _, port = endpoint.rpartition(":")
    outer = interface_of(host.strip("[]")) or interface_of(local_address()) or "lo"
    (link,) = json.loads(run("ip", "-json", "link", "show", "dev", outer))
    try:
        if not key_file.exists():
            private_key = run("wg", "genkey")
            key_file.parent.mkdir(parents=True, exist_ok=True)
            made = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(made, "w") as file:
                file.write(private_key)
        public_key = run("wg", "pubkey", text=key_file.read_text()).strip()
    except OSError as error:
        raise ConfigError(
            f"--key-file {key_file}: {error.strerror}; expected a file of this user's own"
        ) from error
    if interface not in run("wg", "show", "interfaces").split():
        try:
            run("ip", "link", "add", interface, "type", "wireguard")
        except ConfigError as error:
            try:
                run("wireguard-go", interface)
            except ConfigError:
                text = f"{error}, or wireguard-go to be installed and allowed to use /dev/net/tun"
                raise ConfigError(text) from None
    shown = [run("wg", "show", interface, each).strip() for each in ("public-key", "listen-port")]
    if shown != [public_key, port]:
        # Not always: it makes user-space WireGuard open its port anew.
        run("wg", "set", interface, "listen-port", port, "private-key", str(key_file))
    own = f"{address_of(public_key)}/{NETWORK.prefixlen}"
    run("ip", "address", "replace", own, "dev", interface, "nodad")
    run("ip", "link", "set", interface, "mtu", str(link["mtu"] - OVERHEAD_BYTES), "up")
    return public_key


def sync(store: Store, interface: str, own: str, peers: dict[str, Peer], now_s: float) -> None:
    """Write the own object if it is missing; add the peers that are listed, remove those that are gone."""
    entries = store.keys(PREFIX)
    if own not in entries:
        store.create(own, b"")
    listed = {key: each for each in entries if each != own and (key := public_key_in(each))}
    for key in listed.keys() - peers.keys():
        endpoint = listed[key].rpartition("@")[2]
        peering = ["peer", key, "endpoint", endpoint, "allowed-ips", f"{address_of(key)}/128"]
        run("wg", "set", interface, *peering, "persistent-keepalive", str(KEEPALIVE_S))
        peers[key] = Peer(now_s)
        print(f"peer {address_of(key)} at {endpoint}", file=sys.stderr)
    shown = run("wg", "show", interface, "latest-handshakes").splitlines()
    handshakes = dict(line.split() for line in shown)
    for key, peer in list(peers.items()):
        peer.missed = 0 if key in listed else peer.missed + 1
        if handshakes.get(key, "0") != peer.handshake:
            peer.handshake, peer.heard_s = handshakes.get(key, "0"), now_s
        silent = now_s - peer.heard_s > SILENT_S
        if silent or peer.missed >= MISSED_MAX:
            run("wg", "set", interface, "peer", key, "remove")
            del peers[key]
            print(f"peer {address_of(key)} is gone", file=sys.stderr)
            if silent and key in listed:
                store.delete(listed[key])


def main() -> None:
    """The command. Raises `ElasticPtError`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run_url")
    parser.add_argument("--endpoint", help="IP:PORT at which peers reach this node (UDP)")
    parser.add_argument("--interface", default="elastic-pt")
    parser.add_argument("--key-file", type=Path, help="default: /run/elastic-pt/INTERFACE.key")
    parser.add_argument("--interval-s", type=float, default=10.0, help="between two listings")
    parser.add_argument("--once", action="store_true", help="print the address in the network, end")
    options = parser.parse_args()
    host = local_address()
    endpoint = options.endpoint or f"{f'[{host}]' if ':' in host else host}:51820"
    if public_key_in(f"{PREFIX}{'0' * 64}@{endpoint}") is None:
        raise ConfigError(f"--endpoint {endpoint}: expected IP:PORT at which peers reach this node")
    key_file = options.key_file or Path(f"/run/elastic-pt/{options.interface}.key")
    public_key = bring_up(options.interface, endpoint, key_file)
    own = f"{PREFIX}{base64.b64decode(public_key).hex()}@{endpoint}"
    present = run("wg", "show", options.interface, "peers").split()
    peers = {key: Peer(time.monotonic(), "") for key in present}
    store = open_store(options.run_url)
    while True:
        try:
            sync(store, options.interface, own, peers, time.monotonic())
        except StoreError as error:
            if options.once:
                raise
            print(error, file=sys.stderr)
        if options.once:
            return print(address_of(public_key))
        time.sleep(options.interval_s)


if __name__ == "__main__":
    try:
        main()
    except ElasticPtError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
