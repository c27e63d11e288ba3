"""Servers for `benchmarks/loader.py`, each a process of its own that does not import torch.

    python -m benchmarks.loader_servers proxy PORT UPSTREAM_PORT DELAY_MS COUNTER
    python -m benchmarks.loader_servers made-up PORT TOKENS

`proxy` forwards TCP. Each request waits for the delay, and so does its answer; the rate of the answers is not limited. The file COUNTER
holds the bytes of all answers, with their HTTP heads.

`made-up` speaks as much S3 as reading needs. It makes up prepared data of any size: each block of a shard is one of 64,
and which one depends on the numbers of the block and of the shard, so that all shards differ.
"""

import fcntl
import hashlib
import mmap
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from elastic_pt.data.manifest import (
    SCHEMA,
    Manifest,
    Page,
    Shard,
    Source,
    Stream,
    blocks_key,
    page_bytes,
)
from elastic_pt.data.shard_writer import BLOCK_TOKENS, PAGE_SHARDS, SHARD_TOKENS

COUNTER_BYTES: Final = 8
MADE_UP_URL: Final = "s3://made-up/data"
_PIPE_BYTES: Final = 2**20
_DISTINCT: Final = 64
_BLOCK_BYTES: Final = 2 * BLOCK_TOKENS
_RANGE: Final = re.compile(rb"\r\nrange: *bytes=(\d+)-(\d*)\r\n", re.IGNORECASE)


def manifest_of(stream: Stream, name: str = "text") -> Manifest:
    """The manifest of one source of random ids, which needs no tokenizer."""
    source = Source(name, 1.0, 1, stream, 0, 0, Stream(0, ()))
    return Manifest(
        vocab_size=2**16,
        token_type="uint16",
        end_token="<end>",
        end_token_id=0,
        tokenizer_key="tokenizer-none.json",
        tokenizer_sha256="0" * 64,
        held_out_share=0.0,
        sources=(source,),
        skipped={},
        schema=SCHEMA,
        block_tokens=BLOCK_TOKENS,
    )


class MadeUp:
    """Prepared data of `tokens` ids, rounded up to whole shards, made from the keys alone."""

    def __init__(self, tokens: int) -> None:
        blocks = np.random.default_rng(0).integers(
            2**16, size=(_DISTINCT, BLOCK_TOKENS), dtype=np.uint16
        )
        self._blocks = [memoryview(each.tobytes()) for each in blocks]
        hashes = [hashlib.sha256(each).digest() for each in self._blocks]
        self._hashes = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(_DISTINCT, -1)
        self._objects: dict[str, bytes] = {}
        pages: list[Page] = []
        shards = [self._shard(number) for number in range(-(-tokens // SHARD_TOKENS))]
        for start in range(0, len(shards), PAGE_SHARDS):
            some = shards[start : start + PAGE_SHARDS]
            data = page_bytes(some)
            key = f"pages/text/train-{len(pages):05d}.json"
            self._objects[key] = data
            pages.append(Page(key, SHARD_TOKENS * len(some), hashlib.sha256(data).hexdigest()))
        stream = Stream(SHARD_TOKENS * len(shards), tuple(pages))
        self._objects["manifest.json"] = manifest_of(stream).to_json()

    def object(self, key: str) -> tuple[int, bytes | int] | None:
        """Size, and the bytes or the number of the shard; None if there is no such object."""
        if data := self._objects.get(key):
            return len(data), data
        found = re.fullmatch(r"shards/text/train-(\d+)(\.bin|\.blocks)", key)
        if found is None:
            return None
        if found[2] == ".bin":
            return 2 * SHARD_TOKENS, int(found[1])
        index = self._index(int(found[1]))
        return len(index), index

    def parts(self, shard: int, start: int, end: int) -> Iterator[memoryview]:
        """The bytes [start, end) of a shard."""
        chosen = self._chosen(shard)
        while start < end:
            number, offset = divmod(start, _BLOCK_BYTES)
            count = min(end - start, _BLOCK_BYTES - offset)
            yield self._blocks[chosen[number]][offset : offset + count]
            start += count

    def _shard(self, number: int) -> Shard:
        sha256 = hashlib.sha256(self._index(number)).hexdigest()
        key = f"shards/text/train-{number:05d}.bin"
        assert blocks_key(key) == f"shards/text/train-{number:05d}.blocks"
        return Shard(key, SHARD_TOKENS, sha256)

    def _index(self, shard: int) -> bytes:
        return self._hashes[self._chosen(shard)].tobytes()

    def _chosen(self, shard: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """Which of the distinct blocks each block is: its number plus one of the shard's three digits."""
        number = np.arange(SHARD_TOKENS // BLOCK_TOKENS)
        return (number + (shard >> (6 * (number % 3)))) % _DISTINCT


def serve_made_up(port: int, tokens: int) -> None:
    """Answer until the process ends."""
    made_up = MadeUp(tokens)
    for client in _accepted(port):
        threading.Thread(target=_answer, args=(client, made_up), daemon=True).start()


def _answer(client: socket.socket, made_up: MadeUp) -> None:
    request = b""
    with client, suppress(OSError):
        while True:
            while b"\r\n\r\n" not in request:
                data = client.recv(65536)
                if not data:
                    return
                request += data
            head, _, request = request.partition(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode().partition("?")[0]
            found = made_up.object(path.removeprefix(f"/{MADE_UP_URL[len('s3://') :]}/"))
            _send(client, head + b"\r\n", found, made_up)


def _send(
    client: socket.socket, head: bytes, found: tuple[int, bytes | int] | None, made_up: MadeUp
) -> None:
    if found is None:
        text = b"<Error><Code>NoSuchKey</Code></Error>"
        client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
        return
    size, content = found
    start, end, status, extra = 0, size, b"200 OK", b""
    if wanted := _RANGE.search(head):
        start, end = int(wanted[1]), min(size, int(wanted[2] or size - 1) + 1)
        status = b"206 Partial Content"
        extra = b"Content-Range: bytes %d-%d/%d\r\n" % (start, end - 1, size)
    reply = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s" % (status, end - start, extra)
    reply += b'ETag: "0"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n'
    if isinstance(content, bytes):
        client.sendall(reply + content[start:end])
        return
    client.sendall(reply)
    for part in made_up.parts(content, start, end):
        client.sendall(part)


@dataclass
class Proxy:
    """Where answers come from, and how many bytes they had."""

    upstream_port: int
    delay_s: float
    count: memoryview
    lock: threading.Lock

    def requests(self, client: socket.socket, server: socket.socket) -> None:
        """Forward requests, each after the delay."""
        with suppress(OSError):
            while data := client.recv(65536):
                time.sleep(self.delay_s)
                server.sendall(data)
        _end(client, server)

    def answers(self, client: socket.socket, server: socket.socket) -> None:
        """Forward answers at once, without a copy in this process."""
        source, sink = os.pipe()
        try:
            with suppress(OSError):
                fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
                while found := os.splice(server.fileno(), sink, _PIPE_BYTES):
                    with self.lock:
                        self.count[0] += found
                    while found:
                        found -= os.splice(source, client.fileno(), found)
        finally:
            os.close(source)
            os.close(sink)
        _end(client, server)


def serve_proxy(port: int, upstream_port: int, delay_s: float, counter: Path) -> None:
    """Forward until the process ends."""
    with counter.open("r+b") as file:
        count = memoryview(mmap.mmap(file.fileno(), COUNTER_BYTES)).cast("Q")
    proxy = Proxy(upstream_port, delay_s, count, threading.Lock())
    for client in _accepted(port):
        server = socket.create_connection(("127.0.0.1", upstream_port))
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for work in (proxy.requests, proxy.answers):
            threading.Thread(target=work, args=(client, server), daemon=True).start()


def _accepted(port: int) -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", port), backlog=256) as listener:
        while True:
            client, _ = listener.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield client


def _end(*connections: socket.socket) -> None:
    for each in connections:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """One of the servers."""
    what, port, *rest = sys.argv[1:]
    if what == "made-up":
        serve_made_up(int(port), int(rest[0]))
    else:
        serve_proxy(int(port), int(rest[0]), float(rest[1]) / 1e3, Path(rest[2]))


if __name__ == "__main__":
    main()
