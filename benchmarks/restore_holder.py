"""A node that holds a state in memory, in a process of its own: the agent's server for peers, and a plain one.

The plain server sends the bytes of the same buffer file over a socket with `sendfile`, once for each connection.
"""

import asyncio
import multiprocessing
import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

from aiohttp import web

from elastic_pt.agent.snapshots import Snapshots
from elastic_pt.checkpoint.history import StepHistory
from elastic_pt.checkpoint.memory import Place, Places
from elastic_pt.checkpoint.snapshot import PAYLOAD_OFFSET, Buffer, Snapshot
from elastic_pt.membership.node import Formed
from elastic_pt.runlog.access import Access, issue, new_authority
from elastic_pt.runlog.records import Generation, Member

ADDRESS: Final = "127.0.0.1"
_INCARNATION: Final = "holder"
_TIMEOUT_S: Final = 30.0
_ANSWER_S: Final = 120.0
_END_S: Final = 10.0


class Holder:
    """The holder's process, as seen from the benchmark."""

    def __init__(self, scratch: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        encrypted = Access("token", issue(new_authority(), "benchmark", "benchmark"))
        self._access = {"peer": encrypted, "peer_plain": Access("token")}
        arguments = (theirs, scratch, self._access)
        self._process = context.Process(target=_hold, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        answer = cast(tuple[dict[str, int], int], self._answer())
        self.peer_ports, self.plain_port = answer

    def hold(self, buffer: Buffer, step: int) -> None:
        """Hold the state of this step in a buffer file. Returns when its CRCs are known."""
        self._pipe.send((buffer, step))
        self._answer()

    def places(self, snapshot: Snapshot, path: Path) -> dict[str, Places]:
        """Where a worker reads the state, by tier: in its own node's file at `path`, and from the holder."""
        own = Place(_INCARNATION, str(path), snapshot.to_bytes().decode())
        found = {"memory": (own, self._access["peer"])}
        for tier, access in self._access.items():
            place = Place(_INCARNATION, host=ADDRESS, port=self.peer_ports[tier])
            found[tier] = place, access
        return {
            tier: Places(snapshot.generation, snapshot.step, ((place,),), access, _TIMEOUT_S)
            for tier, (place, access) in found.items()
        }

    def read_plain(self, target: memoryview) -> None:
        """Fill the memory with the state's bytes, over a plain socket."""
        with socket.create_connection((ADDRESS, self.plain_port), _TIMEOUT_S) as connection:
            filled = 0
            while filled < len(target):
                count = connection.recv_into(target[filled:])
                if count == 0:
                    raise RuntimeError(f"{filled} bytes, expected {len(target)}")
                filled += count

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()

    def _answer(self) -> object:
        if not self._pipe.poll(_ANSWER_S):
            raise TimeoutError(f"the holder's process: no answer for {_ANSWER_S:g} s")
        return self._pipe.recv()


def _hold(pipe: Connection, scratch: Path, accesses: Mapping[str, Access]) -> None:
    """The holder's process."""
    complete = threading.Event()
    snapshots = Snapshots(
        scratch,
        _INCARNATION,
        accesses["peer"],
        timeout_s=_TIMEOUT_S,
        history=StepHistory(),
        on_complete=lambda *_: complete.set(),
        on_change=lambda: None,
        on_skip=lambda: None,
    )
    served: list[Path] = []
    listener = socket.create_server((ADDRESS, 0))
    threading.Thread(target=_send_plain, args=(listener, served), daemon=True).start()
    ports = {tier: _serve(snapshots, access) for tier, access in accesses.items()}
    pipe.send((ports, listener.getsockname()[1]))
    while (order := pipe.recv()) is not None:
        buffer, step = order
        member = Member("holder", _INCARNATION, ADDRESS, 1, 0, 1)
        generation = Generation(buffer.generation, (member,), (1,), ADDRESS, 1, None, "benchmark")
        snapshots.starts(cast(Formed, SimpleNamespace(generation=generation, node_rank=0)))
        complete.clear()
        snapshots.written(_message(buffer, step))
        if not complete.wait(_ANSWER_S):
            return
        served[:] = [buffer.path(scratch)]
        pipe.send("held")


def _message(buffer: Buffer, step: int) -> dict[str, Any]:
    """A worker's message after it wrote a buffer."""
    return {
        "generation": buffer.generation,
        "rank": buffer.rank,
        "step": step,
        "buffer": buffer.number,
        "seconds": 0.0,
        "every_steps": 0,
        "step_seconds": 1.0,
        "complete_seconds": 0.0,
        "complete_step": 0,
        "mirrors_have_room": True,
        "checkpoint": False,
    }


def _serve(snapshots: Snapshots, access: Access) -> int:
    """Answer the requests of peers in a thread. Returns the port."""
    ready, ports = threading.Event(), []

    async def serve() -> None:
        application = web.Application()
        for path, answer in snapshots.routes.items():
            application.router.add_get(path, answer)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, ADDRESS, 0, ssl_context=access.server_context()).start()
        ports.append(int(runner.addresses[0][1]))
        ready.set()
        await asyncio.Event().wait()

    threading.Thread(target=asyncio.run, args=(serve(),), daemon=True).start()
    if not ready.wait(_ANSWER_S):
        raise TimeoutError("the holder's server does not start")
    return ports[0]


def _send_plain(listener: socket.socket, served: list[Path]) -> None:
    while True:
        connection, _ = listener.accept()
        with connection, served[0].open("rb") as file, suppress(OSError):
            end, offset = os.fstat(file.fileno()).st_size, PAYLOAD_OFFSET
            while offset < end:
                offset += os.sendfile(connection.fileno(), file.fileno(), offset, end - offset)
