"""The small parts of a node: the channel to its workers, its scratch directory, its address."""

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Queue

import pytest

from elastic_pt.errors import ConfigError
from elastic_pt.membership.address import interface_of, local_address
from elastic_pt.workers.channel import ORPHANED_EXIT_CODE, AgentSide, Message, WorkerSide
from elastic_pt.workers.scratch import scratch_directory

DEADLINE_S = 30.0


def test_messages_arrive_complete_and_in_order(tmp_path: Path) -> None:
    """Messages arrive complete and in order. All messages of a worker are handled before it counts as gone."""
    heard: Queue[Message] = Queue()
    agent = AgentSide(tmp_path / "socket")
    agent.listen(heard.put)
    worker = WorkerSide(tmp_path / "socket", 1)
    for number in range(100):
        worker.send("step", step=number, padding="x" * 5000)
    assert [heard.get(timeout=5)["step"] for _ in range(100)] == list(range(100))
    agent.release(2, 8)
    agent.release(1, 7)
    assert worker.checkpoint_request == -1
    agent.checkpoint(42)
    agent.drain("the world changes")
    waiting = threading.Event()
    while not worker.drain_requested:
        waiting.wait(0.01)
    assert worker.released(7)
    assert not worker.released(8)
    assert worker.checkpoint_request == 42
    worker.send("last")
    worker.close()
    agent.drain_messages(5.0)
    assert heard.get_nowait()["kind"] == "last"
    agent.close()


def test_a_worker_that_reads_nothing_is_disconnected(tmp_path: Path) -> None:
    """The agent's messages never wait for a stopped worker. The other workers get all of them."""
    heard: Queue[Message] = Queue()
    agent = AgentSide(tmp_path / "socket")
    agent.listen(heard.put)
    stopped = socket.socket(socket.AF_UNIX)
    stopped.connect(str(tmp_path / "socket"))
    worker = WorkerSide(tmp_path / "socket", 1)
    worker.send("hello")
    assert heard.get(timeout=DEADLINE_S)["kind"] == "hello"
    told = 0

    def tell() -> None:
        nonlocal told
        while len(agent._connections) > 1 and told < 10_000:
            told += 1
            agent.release(1, told)
            while not worker.released(told):
                threading.Event().wait(0.001)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    teller.join(DEADLINE_S)
    assert not teller.is_alive()
    assert len(agent._connections) == 1
    assert all(worker.released(step) for step in range(1, told + 1))
    while stopped.recv(1 << 20):
        pass
    worker.close()
    agent.close()
    stopped.close()


def test_a_worker_without_an_agent_exits(tmp_path: Path) -> None:
    """If the agent is gone, the worker process ends at once, with a special exit code."""
    code = (
        "import sys, threading; from pathlib import Path; from elastic_pt.workers.channel import WorkerSide;"
        "w = WorkerSide(Path(sys.argv[1]), 1); w.send('hello'); threading.Event().wait(30)"
    )
    ready = threading.Event()
    agent = AgentSide(tmp_path / "socket")
    agent.listen(lambda _: ready.set())
    worker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "socket")])
    assert ready.wait(30)
    for connection in list(agent._connections):
        connection.shutdown(2)
    assert worker.wait(10) == ORPHANED_EXIT_CODE
    agent.close()


def test_a_dead_agents_scratch_directory_is_swept(tmp_path: Path) -> None:
    """A new agent removes directories with a free lock, and keeps those of live agents."""
    dead, alive = tmp_path / "elastic_pt-dead", tmp_path / "elastic_pt-alive"
    for directory in (dead, alive):
        directory.mkdir()
        (directory / "shard").write_bytes(b"x")
    held = os.open(alive, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with scratch_directory(str(tmp_path)) as mine:
        assert mine.is_dir()
        assert not dead.exists()
        assert (alive / "shard").exists()
    os.close(held)
    assert not mine.exists()


def test_sweep_keeps_a_directory_that_is_being_created(tmp_path: Path) -> None:
    """If many agents start and sweep at once, each keeps its own directory until its end."""
    lost: list[BaseException] = []
    begin = threading.Barrier(8)

    def live() -> None:
        try:
            begin.wait(DEADLINE_S)
            for _ in range(40):
                with scratch_directory(str(tmp_path)) as mine:
                    (mine / "file").write_text("mine")
                    assert (mine / "file").read_text() == "mine"
        except BaseException as error:
            lost.append(error)

    threads = [threading.Thread(target=live) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert lost == []
    assert list(tmp_path.iterdir()) == []


def test_a_missing_staging_directory_is_named(tmp_path: Path) -> None:
    """A wrong checkpoint.staging gives one line that names it."""
    with (
        pytest.raises(ConfigError, match=r"checkpoint\.staging = .*nowhere.*expected a writable"),
        scratch_directory(str(tmp_path / "nowhere")),
    ):
        pass


def test_addresses_and_their_interfaces() -> None:
    """This machine's address for peers is on one of its interfaces; a foreign address is on none."""
    assert interface_of(local_address()) is not None
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("::1") == "lo"
    assert interface_of("192.0.2.77") is None
    assert interface_of("2001:db8::77") is None


def test_worker_keeps_reading_after_an_invalid_line(tmp_path: Path) -> None:
    """A line that a worker cannot decode does not end the worker, and it reads the next line."""
    agent = AgentSide(tmp_path / "socket")
    agent.listen(lambda _: None)
    worker = WorkerSide(tmp_path / "socket", 1)
    while not agent._connections:
        threading.Event().wait(0.001)
    (connection,) = agent._connections
    connection.sendall(b'\xff no JSON\n{"step": 3}\n[1]\n')
    deadline_s = time.monotonic() + DEADLINE_S
    agent.drain("the world changes")
    while not worker.drain_requested:
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.001)
    worker.close()
    agent.close()


def test_a_message_that_cannot_be_handled_keeps_the_connection(tmp_path: Path) -> None:
    """After an error in a handler or a line that cannot be decoded, the next message is handled."""
    heard: Queue[Message] = Queue()

    def handle(message: Message) -> None:
        heard.put(message)
        assert message["kind"] != "bad"

    agent = AgentSide(tmp_path / "socket")
    agent.listen(handle)
    worker = socket.socket(socket.AF_UNIX)
    worker.connect(str(tmp_path / "socket"))
    worker.sendall(b'{"kind": "bad"}\n\xff\xfe no JSON \n{"kind": "good"}\n')
    assert heard.get(timeout=10)["kind"] == "bad"
    assert heard.get(timeout=10)["kind"] == "good"
    worker.close()
    agent.close()
