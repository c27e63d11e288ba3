"""A whole Ceph on loopback: one monitor, one OSD, one S3 gateway, with a data directory of its own.

The daemons run in the foreground as children of this process; the kernel kills them when it ends. The OSD keeps its
objects in memory (memstore), which starts fastest. Nothing survives the daemons: what is tested is the gateway's S3,
not the disk. Nodes in network namespaces reach the gateway through a proxy that listens on their hub.
"""

import json
import os
import shutil
import subprocess
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import fsspec

from elastic_pt.chaos.bucket import Bucket
from elastic_pt.chaos.servers import free_port, listens, start, stop, wait_until
from elastic_pt.errors import UnexpectedError

ACCESS_KEY: Final = "ELASTICPTTEST"
SECRET_KEY: Final = "elastic-pt-test-secret"

_COMMANDS: Final = (
    "radosgw",
    "radosgw-admin",
    "ceph",
    "ceph-authtool",
    "ceph-mon",
    "ceph-osd",
    "monmaptool",
)

_COMMAND_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 10.0
_CONFIGURATION: Final = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}
public network = 127.0.0.0/8
ms bind msgr1 = false
auth allow insecure global id reclaim = false
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
paxos propose interval = 0.05
paxos min wait = 0.01
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
keyring = {home}/keyring
log file = {home}/log/$name.log
run dir = {home}/run
admin socket = {home}/run/$name.asok
pid file = {home}/run/$name.pid
[mon]
mon data = {home}/mon
mon data avail crit = 1
mon data avail warn = 2
[osd]
osd data = {home}/osd
keyring = {home}/osd/keyring
osd objectstore = memstore
memstore device bytes = 4294967296
osd op num shards = 2
[client]
rgw frontends = beast endpoint=127.0.0.1:{gateway_port} tcp_nodelay=1
rgw data = {home}/rgw
rgw enable usage log = false
rgw enable ops log = false
rgw gc obj min wait = 60
rgw thread pool size = 64
rgw multipart min part size = {part_bytes_min}
"""
_PART_BYTES_MIN: Final = 5 << 20
"""The least size of a part but the last, as in Amazon's S3."""


def missing_for_ceph() -> str:
    """Why this machine cannot start a Ceph, as a clause ("since ... are not installed"); empty if it can."""
    absent = [command for command in _COMMANDS if shutil.which(command) is None]
    return f"since {', '.join(absent)} are not installed" if absent else ""


@dataclass
class Ceph:
    """A running cluster; `stop()` ends the gateway, then the OSD, then the monitor."""

    home: Path
    part_bytes_min: int = _PART_BYTES_MIN
    gateway_port: int = field(default_factory=free_port)
    mon_port: int = field(default_factory=free_port)
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        """The URL of the S3 gateway."""
        return f"http://127.0.0.1:{self.gateway_port}"

    def start(self) -> None:
        """From an empty directory to a gateway that answers, in about 15 s. Call it from a thread that outlives the cluster.

        Raises `UnexpectedError` if that fails, and leaves no daemon.
        """
        try:
            self._start_monitor()
            self._start_osd()
            self._start_gateway()
        except BaseException:
            self.stop()
            raise

    def create_bucket(self, name: str) -> Bucket:
        """An empty bucket and a user of its own, who may use no other bucket. Raises `UnexpectedError`."""
        access_key, secret_key = uuid.uuid4().hex, uuid.uuid4().hex
        self.create_user(name, access_key, secret_key)
        bucket = Bucket(name, self.endpoint, access_key, secret_key)
        owner = fsspec.filesystem(
            "s3",
            endpoint_url=self.endpoint,
            key=access_key,
            secret=secret_key,
            skip_instance_cache=True,
        )
        owner.mkdir(name)
        return bucket

    def create_user(self, name: str, access_key: str, secret_key: str, *, caps: str = "") -> None:
        """A user without a bucket. `caps` are rights to administer, such as `user-policy=*`. Raises `UnexpectedError`."""
        self.administer(
            *("user", "create", f"--uid={name}", f"--display-name={name}"),
            *(f"--access-key={access_key}", f"--secret-key={secret_key}"),
            *([f"--caps={caps}"] if caps else []),
        )

    def administer(self, *arguments: str) -> None:
        """Run `radosgw-admin`. Raises `UnexpectedError` if it fails."""
        self._run("radosgw-admin", *arguments)

    def stop(self) -> None:
        """End every daemon, the last one started first."""
        while self._running:
            stop(self._running.pop(), _STOP_TIMEOUT_S)

    def _start_monitor(self) -> None:
        for name in ("mon", "osd", "run", "log", "rgw"):
            (self.home / name).mkdir(parents=True)
        fsid = str(uuid.uuid4())
        (self.home / "ceph.conf").write_text(
            _CONFIGURATION.format(
                fsid=fsid,
                home=self.home,
                mon_port=self.mon_port,
                gateway_port=self.gateway_port,
                part_bytes_min=self.part_bytes_min,
            )
        )
        keyring, monmap = str(self.home / "keyring"), str(self.home / "monmap")
        admin = [word for daemon in ("mon", "osd", "mgr") for word in ("--cap", daemon, "allow *")]
        self._run(
            "ceph-authtool",
            keyring,
            *("--create-keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"),
        )
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *admin)
        address = f"[v2:127.0.0.1:{self.mon_port}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._daemon("ceph-mon", "-f", "-i", "a")
        wait_until(
            "ceph-mon", lambda: listens(self.mon_port), 30.0, self.home / "log" / "ceph-mon.out"
        )

    def _start_osd(self) -> None:
        identity = str(uuid.uuid4())
        secret = self._run("ceph-authtool", "--gen-print-key").strip()
        new = ("ceph", "--connect-timeout", "30", "osd", "new", identity, "-i", "-")
        number = self._run(*new, text=json.dumps({"cephx_secret": secret})).strip()
        keyring = str(self.home / "osd" / "keyring")
        self._run(
            "ceph-authtool", "--create-keyring", keyring, "-n", f"osd.{number}", "--add-key", secret
        )
        self._run("ceph-osd", "-i", number, "--mkfs", "--osd-uuid", identity)
        self._daemon("ceph-osd", "-f", "-i", number)

    def _start_gateway(self) -> None:
        self.create_user("test", ACCESS_KEY, SECRET_KEY)
        self._daemon("radosgw", "-f", "-n", "client.admin")
        log = self.home / "log" / "radosgw.out"
        wait_until("radosgw", lambda: listens(self.gateway_port), 60.0, log)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CEPH_CONF": str(self.home / "ceph.conf")}

    def _run(self, *command: str, text: str = "") -> str:
        try:
            done = subprocess.run(
                command,
                input=text,
                capture_output=True,
                text=True,
                timeout=_COMMAND_TIMEOUT_S,
                env=self._environment(),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UnexpectedError(str(error)) from error
        if done.returncode:
            raise UnexpectedError(
                f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}"
            )
        return done.stdout

    def _daemon(self, *command: str) -> None:
        log = self.home / "log" / f"{command[0]}.out"
        self._running.append(start(list(command), log, self._environment()))
