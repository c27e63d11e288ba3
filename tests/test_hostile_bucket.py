"""A writer that puts anything into the bucket: each reader refuses it with one line, and touches nothing outside."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest

from elastic_pt.checkpoint.history import read_history
from elastic_pt.checkpoint.nodes import NodeNotice, NodeRecord, RootManifest
from elastic_pt.data.manifest import MANIFEST_KEY, Page, page_shards, read_manifest
from elastic_pt.errors import ElasticPtError, StoreError
from elastic_pt.membership.decision.progress import step_in_pulse
from elastic_pt.membership.lobby import LOBBY, members_in
from elastic_pt.membership.pulse import KEY as PULSE
from elastic_pt.membership.pulse import Pulse
from elastic_pt.report.goodput import read_accounts
from elastic_pt.report.status import open_run, read_status
from elastic_pt.runlog.access import AUTHORITY_KEY, TOKEN_KEY, join_access, read_access
from elastic_pt.runlog.identity import (
    CONFIG_KEY,
    IDENTITY_KEY,
    order_version,
    read_identity,
    read_run_config,
)
from elastic_pt.runlog.log import RunLog, record_key
from elastic_pt.runlog.records import Record
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

STORED: Final = Path(__file__).parent / "stored_run"
HISTORY: Final = "history/0000000006-g1-abcd-2.jsonl"

VALUES: Final[list[Any]] = [
    None,
    -1,
    2**63,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "../../canary",
    "/etc/passwd",
    "a\0b",
    "a\\b",
    "x" * 5000,
    "\x1b[31m\nforged",
    [],
    {},
    [[[]]],
]

BYTES: Final[dict[str, bytes]] = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe\x00\x01",
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "huge number": b'{"schema": ' + b"9" * 100_000 + b"}",
    "endless float": b'{"schema": 1e999999}',
    "not a number": b'{"schema": NaN}',
    "null": b"null",
    "a list": b"[1, 2, 3]",
    "a text": b'"text"',
    "surrogate": b'{"schema": "\\ud800"}',
    "zeros": bytes(100_000),
    "escape": b"\x1b[2J\x1b]0;title\x07",
}


def damaged(valid: bytes) -> Iterator[bytes]:
    """An object with each of its values replaced, if it is JSON; else cut."""
    yield from BYTES.values()
    yield valid[: len(valid) // 2]
    try:
        tree = json.loads(valid)
    except ValueError:
        return
    for way in paths(tree):
        for value in VALUES:
            changed = json.loads(valid)
            place = changed
            for key in way[:-1]:
                place = place[key]
            place[way[-1]] = value
            yield json.dumps(changed).encode()


def paths(tree: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of each value of a JSON tree; of a long list only the first ones."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:2])
    for key, value in items:
        yield (*way, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*way, key))


@pytest.fixture(scope="module")
def stored() -> Store:
    """A run of an earlier version, with each kind of record."""
    (path,) = [each.parent for each in STORED.rglob(CONFIG_KEY)]
    return open_store(f"file://{path}")


def refuses(read: Callable[[bytes], object], valid: bytes) -> int:
    """Give a reader all damaged forms; returns how many it refused. Any other error than ours fails the test."""
    refused = 0
    for data in damaged(valid):
        try:
            read(data)
        except ElasticPtError as error:
            text = str(error)
            assert text.isprintable(), text
            assert len(text) < 2000, text[:200]
            assert "expected" in text or "http" in text, text
            refused += 1
    return refused


def test_records_of_the_log(stored: Store) -> None:
    """A changed record of any kind is refused with one line, or read with values that its fields may have."""
    keys = stored.keys("log/")
    kinds = {}
    for key in keys:
        data = stored.read(key)
        kinds[json.loads(data)["kind"]] = data
    assert len(kinds) >= 3
    for data in kinds.values():
        read = lambda changed: Record.from_bytes(changed, key="log/1")  # noqa: E731
        read(data)
        assert refuses(read, data) > len(BYTES)


@pytest.mark.parametrize("field", ["history", "directory"])
@pytest.mark.parametrize("key", ["../canary", "/etc/passwd", "a/../../b", "a\0", "x" * 2000, ""])
def test_no_record_names_anything_outside(stored: Store, field: str, key: str) -> None:
    """A COMMIT whose checkpoint or history lies elsewhere is damaged."""
    commits = [stored.read(each) for each in stored.keys("log/")]
    data = json.loads(next(each for each in commits if b'"COMMIT"' in each[:200]))
    place = data["body"] if field == "history" else data["body"]["checkpoints"][0]
    place[field] = key
    with pytest.raises(ElasticPtError, match="not a record"):
        Record.from_bytes(json.dumps(data).encode(), key="log/1")


DOCUMENTS: Final[dict[str, tuple[str, Callable[[Store], object]]]] = {
    "config": (CONFIG_KEY, lambda store: read_run_config(store, [])),
    "identity": (IDENTITY_KEY, lambda store: order_version(store.url, read_identity(store))),
    "history": (HISTORY, lambda store: read_history(store, HISTORY)),
    "account": ("events/a-01/account.json", read_accounts),
    "pulse": (PULSE, lambda store: step_in_pulse(Pulse(store, "a").feel(), 1)),
    "token": (TOKEN_KEY, lambda store: read_access(store, "a", tls=False)),
    "authority": (AUTHORITY_KEY, lambda store: read_access(store, "a", tls=True)),
    "data manifest": (MANIFEST_KEY, read_manifest),
    "log": (record_key(0), lambda store: RunLog(store, writer="a").refresh()),
    "status": (record_key(0), lambda store: read_status(open_run(store.url))),
}
EXAMPLES: Final = {
    "history": b'{"kind": "step", "step": 1, "loss": 1.0, "rows": [0, 8], "phases": {"data": 0.1}, '
    b'"sources": {"a": [8, 1.0]}, "seconds": 0.1, "skipped": ""}\n',
    "account": json.dumps(
        {
            "schema": 1,
            "node": "a",
            "incarnation": "a1",
            "run_id": "r",
            "started_at": 1.0,
            "written_at": 2.0,
            "price_per_hour": 1.0,
            "ended": False,
            "reason": "",
            "seconds": {"start": 1.0},
            "bucket": "start",
            "steps": 3,
        }
    ).encode(),
    "pulse": b'[1, "a1", 2, 3]',
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_of_a_run(name: str, tmp_path: Path, stored: Store) -> None:
    """Whatever an object holds, its reader returns, or raises one of our errors in one line."""
    key, read = DOCUMENTS[name]
    store = open_store(f"file://{tmp_path}")
    join_access(store, "a", tls=True)
    valid = EXAMPLES.get(name, b"")
    if not valid and stored.size(key) is not None:
        valid = stored.read(key)

    def replaced(data: bytes) -> object:
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(data)
        return read(store)

    refused = refuses(replaced, valid)
    assert refused or name in ("account", "pulse"), "hints are left out"


@pytest.mark.parametrize("kind", [RootManifest, NodeNotice, NodeRecord])
def test_documents_of_a_checkpoint(kind: Any) -> None:
    """They are sealed: anything else is refused."""
    assert refuses(kind.from_bytes, b'{"schema": 3, "kind": "x"}') >= len(BYTES)


def test_a_page_of_the_data() -> None:
    """A page is bound to its hash, so any other is refused."""
    page = Page("pages/a.json", 64, "0" * 64)
    read = lambda data: page_shards(data, page, origin="pages/a.json")  # noqa: E731
    assert refuses(read, b"[]") > len(BYTES)


@pytest.mark.parametrize("name", [each for each in DOCUMENTS if each != "status"])
def test_an_object_that_is_too_large_is_not_read(name: str, tmp_path: Path, stored: Store) -> None:
    """300 MB of zeros at any place raise one line at once, or are left out, without being in memory."""
    key, read = DOCUMENTS[name]
    store = open_store(f"file://{tmp_path}")
    join_access(store, "a", tls=True)
    path = tmp_path / key
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(300 << 20)
    before = peak_bytes()
    with suppress(ElasticPtError):
        read(store)
    assert peak_bytes() - before < 16 << 20


def peak_bytes() -> int:
    """The most memory that this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


@pytest.mark.parametrize(
    "key",
    [
        "a!a1!not an address!1!1!1",
        "a!a1!evil.example!1!1!1",
        "a!a1!127.0.0.1!99999!1!1",
        "a!a1!127.0.0.1!1!-1!1",
        "a!a1!127.0.0.1!1!1!0",
        "a!a%2F..%2F1!127.0.0.1!1!1!1",
        "%1b[2J!a1!127.0.0.1!1!1!1",
        "a!a1!127.0.0.1!1!1!1!z!more",
        "!" * 1000,
        "x" * 3000,
    ],
)
def test_cards_of_the_lobby(key: str) -> None:
    """A card with anything but a node's address is left out; the others count."""
    good = "b!b1!127.0.0.1!1!1!1"
    assert [each.node for each in members_in([LOBBY + key, LOBBY + good])] in (["b"], ["a", "b"])
    assert all(each.zone.isprintable() for each in members_in([LOBBY + key]))


# ---- files and links ---------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory beside the run, which stays as it is."""
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "canary").write_text("canary")
    yield directory
    assert [each.name for each in directory.iterdir()] == ["canary"]
    assert (directory / "canary").read_text() == "canary"


@pytest.mark.parametrize("key", ["../outside/canary", "a/../../outside/canary", "..\\outside"])
def test_no_key_leads_outside(tmp_path: Path, outside: Path, key: str) -> None:
    """Nothing outside is read, written or deleted, whatever the key."""
    store = open_store(f"file://{tmp_path / 'run'}")
    store.write("a/b", b"1")
    for use in (
        store.read,
        store.delete,
        store.size,
        lambda key: store.write(key, b"x"),
        lambda key: store.create(key, b"x"),
    ):
        with pytest.raises(ElasticPtError, match="not a key"):
            use(key)


def test_no_link_leads_a_writer_outside(tmp_path: Path, outside: Path) -> None:
    """Nothing is written, created or deleted through a symbolic link that leads outside."""
    store = open_store(f"file://{tmp_path / 'run'}")
    store.write("a", b"1")
    (tmp_path / "run" / "log").symlink_to(outside)
    (tmp_path / "run" / "pulse.json").symlink_to(outside / "canary")
    for use in (
        lambda: store.write("log/canary", b"x"),
        lambda: store.create("log/new", b"x"),
        lambda: store.write("log/below/new", b"x"),
        lambda: store.delete("log/canary"),
    ):
        with pytest.raises(ElasticPtError, match="symbolic link"):
            use()
    # A link in the place of an object is replaced.
    store.write("pulse.json", b"x")
    assert not (tmp_path / "run" / "pulse.json").is_symlink()


@pytest.mark.parametrize("place", ["outside", "log", "file", "nowhere"])
def test_the_folder_of_unfinished_files_is_a_directory_itself(
    tmp_path: Path, outside: Path, place: str
) -> None:
    """What is old in it is removed, so a link in its place would have files removed elsewhere."""
    store = open_store(f"file://{tmp_path / 'run'}")
    store.write("log/a", b"1")
    folder = tmp_path / "run" / ".elastic-pt-unfinished"
    folder.rmdir()
    old = [outside / "canary", tmp_path / "run" / "log" / "a"]
    for each in old:
        os.utime(each, (0, 0))
    if place == "file":
        folder.write_bytes(b"")
    else:
        targets = {"outside": outside, "log": tmp_path / "run" / "log", "nowhere": tmp_path / "x"}
        folder.symlink_to(targets[place])
    fresh = open_store(store.url)
    for use in (lambda: fresh.write("b", b"1"), lambda: fresh.create("c", b"1")):
        with pytest.raises(StoreError, match=r"unfinished: is a symbolic link or a file; expected"):
            use()
    assert all(each.exists() for each in old)


@pytest.mark.parametrize("name", ["notes.txt", "0" * 31, "G" * 32])
def test_only_unfinished_files_are_removed(tmp_path: Path, name: str) -> None:
    """A file of another name stays, however old it is."""
    store = open_store(f"file://{tmp_path / 'run'}")
    store.write("a", b"1")
    folder = tmp_path / "run" / ".elastic-pt-unfinished"
    for each in (name, "0" * 32):
        (folder / each).write_bytes(b"")
        os.utime(folder / each, (0, 0))
    open_store(store.url).write("b", b"1")
    assert [each.name for each in folder.iterdir()] == [name]


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/tty", "pipe", "/"])
def test_only_regular_files_are_read(tmp_path: Path, target: str) -> None:
    """A link to a device, a pipe or a directory is no object: reading neither waits nor goes on for ever."""
    store = open_store(f"file://{tmp_path / 'run'}")
    store.write("a", b"1")
    if target == "pipe":
        os.mkfifo(tmp_path / "run" / "pipe")
    else:
        (tmp_path / "run" / "pipe").symlink_to(target)
    with pytest.raises(ElasticPtError, match="reading pipe"):
        store.read("pipe")
