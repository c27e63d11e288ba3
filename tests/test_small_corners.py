"""Small rules of the agent: keys, directories, sockets, texts and bounds."""

import asyncio
import dataclasses
import errno
import os
import socket
import threading
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web

from elastic_pt.config import parse_config
from elastic_pt.data.manifest import Manifest, Shard, Source
from elastic_pt.doctor.requirements import require_cache, require_held_out
from elastic_pt.errors import ConfigError, DataError
from elastic_pt.membership import asking
from elastic_pt.membership.node import Node
from elastic_pt.runlog.log import GENERATIONS_KEPT
from elastic_pt.store import local
from elastic_pt.store.local import LocalStore
from elastic_pt.telemetry.shipping import EventSink
from elastic_pt.workers.channel import AgentSide, Message, WorkerSide
from elastic_pt.workers.failure import Evidence, RecordedError, classify

DEADLINE_S = 30.0
CONFIG = '[run]\nurl = "/run"\n[data]\nurl = "s3://bucket/data"\n'


def manifest(key: str = "tokens/0.bin") -> Manifest:
    """A manifest of one shard."""
    shard = Shard(key, 1000, "0" * 64)
    source = Source("text", 1.0, 1, (shard,), 0, 0, ())
    return Manifest(300, "uint16", "<end>", 0, "tokenizer.json", "0" * 64, 0.0, (source,), {})


@pytest.mark.parametrize("key", ["../secret", "/etc/passwd", "a//b", ""])
def test_manifest_with_a_key_outside_its_store_is_refused(key: str) -> None:
    """A key outside the prepared directory is refused when the manifest is read, for any store."""
    assert Manifest.from_json(manifest().to_json()) == manifest()
    with pytest.raises(DataError, match="not a key"):
        Manifest.from_json(manifest(key).to_json())
    with pytest.raises(DataError, match="not a key"):
        Manifest.from_json(dataclasses.replace(manifest(), tokenizer_key=key).to_json())


def test_new_directories_of_an_object_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each directory that a write creates is synced, and so is its parent."""
    synced: list[Path] = []
    monkeypatch.setattr(local, "_sync_directory", synced.append)
    LocalStore(f"file://{tmp_path}/run").write("log/parts/0", b"x")
    root = tmp_path / "run"
    assert set(synced) >= {root / "log" / "parts", root / "log", root}


def test_agent_accepts_workers_again_after_too_many_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that could not accept a worker (EMFILE) receives its message later."""
    heard: Queue[Message] = Queue()
    refusals = [OSError(errno.EMFILE, os.strerror(errno.EMFILE))] * 2
    accept = socket.socket.accept

    def refuse(listener: socket.socket) -> tuple[socket.socket, object]:
        if refusals:
            raise refusals.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", refuse)
    agent = AgentSide(tmp_path / "socket")
    agent.listen(heard.put)
    worker = WorkerSide(tmp_path / "socket", 1)
    worker.send("hello")
    assert heard.get(timeout=DEADLINE_S)["kind"] == "hello"
    assert not refusals
    worker.close()
    agent.close()


def signature(message: str) -> str:
    """The signature of a worker's failure with this message."""
    failure = classify(Evidence(0, 1, RecordedError(message, "", 0.0)))
    assert failure is not None
    return failure.signature


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("in /tmp/tmpab_cdefg/x", "in /tmp/tmpzyxwvuts/x"),
        ("in /dev/shm/elastic_pt-abcdefgh/x", "in /dev/shm/elastic_pt-q9z0kk_w/x"),
        ("job 1b4e28ba-2fa1-11d2-883f-b9a761bde3fb", "job 6fa459ea-ee8a-3ca4-894e-db77e160355e"),
        ("hash 9f86d081884c7d65", "hash 60303ae22b998861"),
        ("at 0x7f12aa", "at 0xdead"),
    ],
)
def test_signature_leaves_out_what_differs_between_nodes(here: str, there: str) -> None:
    """Temporary names, UUIDs, hashes and addresses do not make two nodes' failures different."""
    assert signature(f"ValueError: {here}") == signature(f"ValueError: {there}")


@pytest.mark.parametrize(("here", "there"), [("/data/training/x", "/data/holdouts/x")])
def test_signature_keeps_words_of_eight_letters(here: str, there: str) -> None:
    """Parts of a path with ordinary names make failures different, whatever their length."""
    assert signature(f"ValueError: {here}") != signature(f"ValueError: {there}")


def test_failure_limit_above_the_kept_generations_is_refused() -> None:
    """A limit above the number of generations that a view keeps could never be reached, so it is refused."""
    for key in ("failures_max", "same_failures_max"):
        parse_config(CONFIG, source="test", overrides=[f"elastic.{key}={GENERATIONS_KEPT}"])
        with pytest.raises(ConfigError, match=key):
            parse_config(CONFIG, source="test", overrides=[f"elastic.{key}={GENERATIONS_KEPT + 1}"])


def test_a_relative_staging_directory_is_refused() -> None:
    """The staging directory must not depend on the working directory of an agent."""
    with pytest.raises(
        ConfigError, match=r"checkpoint\.staging = 'shm': expected an absolute path"
    ):
        parse_config(CONFIG, source="test", overrides=["checkpoint.staging=shm"])


def test_unusable_cache_is_refused_before_workers_start(tmp_path: Path) -> None:
    """A directory open to other users, a file, or a size below the minimum is refused before a worker starts."""

    def require(directory: Path, count: int) -> None:
        overrides = [f"data.cache={directory}", f"data.cache_bytes={count}"]
        require_cache(parse_config(CONFIG, source="test", overrides=overrides), manifest())

    require(tmp_path / "cache", 2000)
    with pytest.raises(ConfigError, match=r"data\.cache_bytes = 1999: .*expected at least 2000"):
        require(tmp_path / "cache", 1999)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache = .*file"):
        require(tmp_path / "file", 2000)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match=r"data\.cache = .*open"):
        require(tmp_path / "open", 2000)


def test_evaluations_without_held_out_text_are_refused() -> None:
    """Data without held-out text and a cadence of evaluations do not go together: one line at the start names both."""
    off, on = (
        parse_config(CONFIG, source="test", overrides=[f"evaluation.every_steps={every}"])
        for every in (0, 10)
    )
    require_held_out(off, manifest())
    with pytest.raises(
        ConfigError, match=r"evaluation\.every_steps = 10: .*expected 0, or data"
    ) as caught:
        require_held_out(on, manifest())
    assert "\n" not in str(caught.value)


def test_events_are_written_after_an_unexpected_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a write raises, the thread goes on and the events are written later."""
    monkeypatch.setattr("elastic_pt.telemetry.shipping._FLUSH_INTERVAL_S", 0.05)
    store = LocalStore(f"file://{tmp_path}")
    errors = [RuntimeError("cannot schedule new futures")]
    tried = threading.Event()
    write = store.write

    def fail_once(key: str, source: bytes | Path) -> None:
        if errors:
            tried.set()
            raise errors.pop()
        write(key, source)

    monkeypatch.setattr(store, "write", fail_once)
    sink = EventSink(store, "node")
    sink.take({"event": "first"})
    assert tried.wait(DEADLINE_S)
    sink.close()
    assert "first" in next((tmp_path / "events" / "node").iterdir()).read_text()


@pytest.mark.parametrize("too_much", [False, True])
def test_answer_in_parts_is_read_completely(
    too_much: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that arrives in parts is read completely, but not beyond the limit."""
    parts, bound = [b"a" * 100, b"b" * 100, b"c" * 100], 150 if too_much else 1000
    monkeypatch.setattr(asking, "_ANSWER_BYTES_MAX", bound)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.05)
        return response

    async def ask() -> bytes:
        app = web.Application()
        app.router.add_get("/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with aiohttp.ClientSession() as session, session.get(site.name) as response:
            body = await asking.read_body(response)
        await runner.cleanup()
        return body

    monkeypatch.setattr(web.TCPSite, "name", property(lambda site: _url_of(site)))
    body = asyncio.run(ask())
    assert body == (b"".join(parts[:2]) if too_much else b"".join(parts))


def _url_of(site: web.TCPSite) -> str:
    assert site._server is not None
    host, port = site._server.sockets[0].getsockname()[:2]  # type: ignore[attr-defined]
    return f"http://{host}:{port}/"


def test_failure_with_a_lone_surrogate_is_escaped() -> None:
    """A lone surrogate in a failure's text is escaped, because messages to peers and the log are UTF-8."""
    node = SimpleNamespace(member=SimpleNamespace(node="a"))
    cause = Node.failure(node, "no such file: /x\udcff")  # type: ignore[arg-type]
    assert cause.detail == "no such file: /x\\udcff"
    assert cause.detail.encode("utf-8")
