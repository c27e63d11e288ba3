"""Helpers that the tests of this folder import."""

import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elastic_pt.data.cache import ShardCache, cache_directory
from elastic_pt.data.manifest import Manifest, Shard, Split, Stream
from elastic_pt.data.shards import TokenReader
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store


def words(seed: int, count: int = 200) -> str:
    """A deterministic text of `count` made-up words."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdeé", k=rng.randint(1, 7))) for _ in range(count))


@dataclass(frozen=True)
class Prepared:
    """Prepared data on this machine's disk."""

    manifest: Manifest
    store: Store
    root: Path


def cache_at(directory: Path | None = None, bytes_max: int = 2**30) -> ShardCache:
    """A cache of token shards; by default the shared one of this user's processes."""
    return ShardCache(directory or cache_directory(""), bytes_max)


def shard_name(number: int) -> str:
    """The SHA-256 that names a shard of a test."""
    return hashlib.sha256(bytes([number])).hexdigest()


def blocks_in(directory: Path, sha256: str) -> list[int]:
    """The blocks of a shard in a cache."""
    return sorted(
        number
        for path in (directory / sha256).glob("*")
        if re.fullmatch("[0-9]+(-[0-9]+)?", path.name)
        for first, _, end in [path.name.partition("-")]
        for number in range(int(first), int(end or int(first) + 1))
    )


def disk_bytes(directory: Path) -> int:
    """Bytes that a cache takes on the disk. Nobody creates a file there meanwhile."""
    total = 0
    with open(directory / "bytes", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        seen = set()
        paths = [
            os.path.join(place, name)
            for place, _, files in os.walk(directory)
            for name in (".", *files)
        ]
        for path in paths:
            with suppress(FileNotFoundError):
                found = os.lstat(path)
                # One that is renamed may be listed twice.
                if found.st_ino not in seen:
                    seen.add(found.st_ino)
                    total += found.st_blocks * 512
    return total


def settle(reader: TokenReader) -> None:
    """Wait until a reader has written its blocks: a batch does not wait for that."""
    deadline_s = time.monotonic() + 60.0
    while reader._blocks._flights:
        assert time.monotonic() < deadline_s
        # Without this its threads hardly run.
        time.sleep(0.001)


def shards_of(prepared: Prepared, source: int, split: Split) -> tuple[Shard, ...]:
    """The shards of a stream, without the code under test."""
    stream = prepared.manifest.sources[source].stream(split)
    if not isinstance(stream, Stream):
        return stream
    pages = [json.loads((prepared.root / page.key).read_text()) for page in stream.pages]
    return tuple(Shard(**each) for page in pages for each in page)


def in_schema_1(prepared: Prepared) -> Prepared:
    """The same tokens as version 0.1 wrote them, next to the others: each shard is one block, named by its own hash."""

    def whole(source: int, split: Split) -> tuple[Shard, ...]:
        return tuple(_whole(prepared, each) for each in shards_of(prepared, source, split))

    sources = tuple(
        replace(each, train=whole(number, "train"), held_out=whole(number, "held_out"))
        for number, each in enumerate(prepared.manifest.sources)
    )
    manifest = replace(prepared.manifest, sources=sources, schema=1, block_tokens=0)
    return replace(prepared, manifest=manifest)


def copy_of(prepared: Prepared, directory: Path) -> Prepared:
    """A copy that a test may damage."""
    shutil.copytree(prepared.root, directory)
    return Prepared(prepared.manifest, open_store(str(directory)), directory)


def _whole(prepared: Prepared, shard: Shard) -> Shard:
    data = (prepared.root / shard.key).read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    key = f"{shard.key.rpartition('-')[0]}-{sha256[:12]}.bin"
    (prepared.root / key).write_bytes(data)
    return replace(shard, key=key, sha256=sha256)


def in_memory(prepared: Prepared, name: str) -> Store:
    """The prepared data in a store that is not on this machine's disk."""
    store = open_store(f"memory://test-data-{name}-{uuid.uuid4().hex}")
    for path in sorted(each for each in prepared.root.rglob("*") if each.is_file()):
        store.write(str(path.relative_to(prepared.root)), path)
    return store


def stream_of(prepared: Prepared, source: int, split: Split = "train") -> NDArray[np.int64]:
    """A source's stream, read from its files without the code under test."""
    data = b"".join(
        (prepared.root / each.key).read_bytes() for each in shards_of(prepared, source, split)
    )
    return np.frombuffer(data, dtype="<u2").astype(np.int64)
