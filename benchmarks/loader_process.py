"""One reader of `benchmarks/loader.py` in a process of its own: it reads commands, and answers each with a line of JSON.

    python -m benchmarks.loader_process CASE      CASE is the JSON of a `Case`

A command is the name of a reader's method, and its arguments: `read` (how fast), `seek` (how soon a batch at any other place comes),
`prepare` (once before, such as the choice of the best settings; those that are given are used).
"""

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

MICRO_BATCH: Final = 8
PREFETCH_STEPS: Final = 2
"""The default of `data.prefetch_steps`."""
REQUEST_BYTES: Final = 4 * 2**20
"""Neighbouring blocks of a batch are one plain request up to this size."""
_QUIET_S: Final = 0.3


@dataclass(frozen=True)
class Case:
    """What a process reads."""

    reader: str
    url: str
    """Of prepared data; for torch and grain a file with the same ids, for mosaic a directory."""
    sequence_length: int
    rows: int
    """Per batch."""
    order: int = 2
    global_batch: int = 0
    window_tokens: int = 0
    cache_bytes: int = 0


def timed_batches(begin: Callable[[], Iterator[Any]], seconds: float | None) -> dict[str, Any]:
    """The seconds to the first batch, and the speed after it, until the end or for some seconds."""
    started_s = time.perf_counter()
    batches = begin()
    shape = tuple(next(batches).shape)
    first_s = time.perf_counter()
    count = 0
    for batch in batches:
        assert tuple(batch.shape) == shape
        count += 1
        if seconds is not None and time.perf_counter() - first_s > seconds:
            break
    ended_s = time.perf_counter()
    row_tokens = shape[-1] - 1
    tokens = shape[0] * row_tokens
    return {
        "first_batch_s": first_s - started_s,
        "tokens_per_s": count * tokens / (ended_s - first_s),
        "tokens": (count + 1) * tokens,
        "rss_bytes": rss_bytes(),  # now: the loader's processes end with it
    }


class Ours:
    """`SlotLoader` over prepared data."""

    def __init__(self, case: Case) -> None:
        # Not at the top: the processes of the other readers need no part of this.
        from elastic_pt.data.cache import ShardCache
        from elastic_pt.data.lanes import lanes_of
        from elastic_pt.data.loader import SlotLoader
        from elastic_pt.data.manifest import read_manifest
        from elastic_pt.data.plan import DataPlan
        from elastic_pt.data.shards import TokenReader
        from elastic_pt.store.open import open_store

        self._case = case

        def opened(cache: str) -> tuple[Any, Any, Any]:
            store = open_store(case.url)
            manifest = read_manifest(store)
            lanes = lanes_of(case.order, MICRO_BATCH, case.window_tokens)
            plan = DataPlan(manifest, case.sequence_length, 0, case.global_batch, lanes)
            room = ShardCache(Path(cache), case.cache_bytes)
            return store, plan, TokenReader(manifest, store, cache=room, timeout_s=60.0)

        def loader(plan: Any, reader: Any, slots: range, steps: range) -> Any:
            return SlotLoader(
                plan,
                reader,
                slots=slots,
                first_step=steps.start,
                last_step=steps.stop,
                micro_batch=MICRO_BATCH,
                prefetch_steps=PREFETCH_STEPS,
            )

        self._opened, self._loader = opened, loader
        self._local: tuple[Any, Any, Any] | None = None
        """Kept between reads: it has verified the files."""

    def prepare(self, seconds: float, settings: dict[str, Any] | None = None) -> dict[str, Any]:
        """Nothing."""
        return {}

    def read(
        self, cache: str, node: int, nodes: int, steps: list[int], seconds: float | None = None
    ) -> dict[str, Any]:
        """Read the slots of one node. From a bucket as a new process does: the store is opened first."""
        used: list[Any] = []

        def begin() -> Iterator[Any]:
            store, plan, reader = self._local or self._opened(cache)
            loader = self._loader(plan, reader, self._slots(node, nodes), range(*steps))
            used.append(loader)
            if self._case.url.startswith("file://"):
                self._local = store, plan, reader
            else:
                used.append(reader)
            return (batch.tokens_VBT.flatten(0, 1) for batch in loader)

        try:
            return timed_batches(begin, seconds)
        finally:
            for each in used:
                each.close()

    def seek(self, cache: str, count: int, threads: int, seed: int) -> dict[str, Any]:
        """Read batches of steps anywhere, beside plain reads of the same blocks, hashed, at the same time as each other."""
        store, plan, reader = self._opened(cache)
        slots = self._slots(0, self._case.global_batch // self._case.rows)
        steps = plan.rows_per_source[0] // self._case.global_batch
        chosen = random.Random(seed)
        seeks, fetches, blocks = [], [], []
        with ThreadPoolExecutor(threads) as pool:
            for number in range(count + 1):
                step = chosen.randrange(steps - 1)
                requests = requests_of(plan, store, step, slots)
                time.sleep(_QUIET_S)  # nothing is fetched ahead for the step before
                started_s = time.perf_counter()
                loader = self._loader(plan, reader, slots, range(step, steps))
                next(loader)
                read_s = time.perf_counter()
                loader.close()
                time.sleep(_QUIET_S)
                plain_s = time.perf_counter()
                list(pool.map(lambda each: hashlib.sha256(store.read(*each)), requests))
                done_s = time.perf_counter()
                store.read(*requests[0])
                if number:  # the first one opens connections
                    seeks.append(1e3 * (read_s - started_s))
                    fetches.append(1e3 * (done_s - plain_s))
                    blocks.append(1e3 * (time.perf_counter() - done_s))
        reader.close()
        return {"seek_ms": seeks, "fetch_ms": fetches, "fetch_block_ms": blocks}

    def _slots(self, node: int, nodes: int) -> range:
        return range(node, self._case.global_batch // MICRO_BATCH, nodes)


def requests_of(plan: Any, store: Any, step: int, slots: range) -> list[tuple[str, int, int]]:
    """Key and byte range of the blocks that a step's batch needs; neighbours are one request."""
    from elastic_pt.data.table import ShardTable

    table = ShardTable(plan.manifest, store)
    block_tokens, length = plan.manifest.block_tokens, plan.sequence_length
    wanted: set[tuple[str, int, int]] = set()
    for source, row in plan.slot_rows(step, slots, MICRO_BATCH):
        token, end = row * length, (row + 1) * length + 1
        while token < end:
            placed = table.find(source, "train", token)
            block = (token - placed.start) // block_tokens
            first = block * block_tokens
            last = min(first + block_tokens, placed.shard.tokens)
            wanted.add((placed.shard.key, 2 * first, 2 * last))
            token = placed.start + last
    requests: list[tuple[str, int, int]] = []
    for key, start, end in sorted(wanted):
        if requests:
            before, began, ended = requests[-1]
            if (before, ended) == (key, start) and end - began <= REQUEST_BYTES:
                requests[-1] = (key, began, end)
                continue
        requests.append((key, start, end))
    return requests


class Plain:
    """Plain range reads by the same client, many at once."""

    def __init__(self, case: Case) -> None:
        from elastic_pt.data.manifest import read_manifest
        from elastic_pt.data.table import ShardTable
        from elastic_pt.store.open import open_store

        self._store = open_store(case.url)
        manifest = read_manifest(self._store)
        self._manifest_bytes = len(manifest.to_json())
        self._shards: list[tuple[str, int]] = []
        table, token = ShardTable(manifest, self._store), 0
        while token < manifest.tokens("train") and len(self._shards) < 64:
            placed = table.find(0, "train", token)
            self._shards.append((placed.shard.key, 2 * placed.shard.tokens))
            token = placed.end

    def prepare(self, seconds: float, settings: dict[str, Any] | None = None) -> dict[str, Any]:
        """The best of a few sizes and numbers of requests."""
        found = []
        for request_bytes in (2**16, 2**18, 2**20, 2**22):
            for threads in (8, 32):
                speed = self.read(2**40, request_bytes, threads, seconds)["tokens_per_s"]
                found.append((speed, request_bytes, threads))
        _, request_bytes, threads = max(found)
        tried = [
            {"request_bytes": size, "threads": threads, "tokens_per_s": round(speed)}
            for speed, size, threads in found
        ]
        settings = {"request_bytes": request_bytes, "threads": threads}
        return {"settings": settings, "tried": tried, "manifest_bytes": self._manifest_bytes}

    def read(
        self, count: int, request_bytes: int, threads: int, seconds: float = 60.0
    ) -> dict[str, Any]:
        """Read `count` bytes, or for some seconds."""
        ranges = [
            (key, start, min(start + request_bytes, size))
            for key, size in self._shards
            for start in range(0, size, request_bytes)
        ][: -(-count // request_bytes)]
        deadline_s = time.perf_counter() + seconds

        def read_one(each: tuple[str, int, int]) -> int:
            return len(self._store.read(*each)) if time.perf_counter() < deadline_s else 0

        started_s = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            done = sum(pool.map(read_one, ranges))
        return {"tokens_per_s": done / 2 / (time.perf_counter() - started_s)}

    def seek(self, **options: Any) -> dict[str, Any]:
        """Nothing."""
        return {}


def reader_of(case: Case) -> Any:
    """The reader of a case."""
    if case.reader == "ours":
        return Ours(case)
    if case.reader == "plain":
        return Plain(case)
    from benchmarks.loader_peers import PEERS

    return PEERS[case.reader](case)


def rss_bytes() -> int:
    """The most memory that this process and its children have had, each at its own moment."""
    pids = [os.getpid()]
    for pid in pids:
        # Threads end while they are listed.
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):
                pids.extend(int(child) for child in task.read_text().split())
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        total += 1024 * sum(
            int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM:")
        )
    return total


def best_of(settings: list[dict[str, Any]], speed: Callable[[dict[str, Any]], float]) -> Any:
    """The fastest settings. Raises the last error if none works."""
    found: list[tuple[float, int]] = []
    error: Exception = ValueError("no settings")
    for number, each in enumerate(settings):
        try:
            found.append((speed(each), number))
        except Exception as failed:
            error = failed
    if not found:
        raise error
    return settings[max(found)[1]]


def main() -> None:
    """Answer commands until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    case = Case(**json.loads(sys.argv[1]))
    reader: Any = None
    start_bytes = 0
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if reader is None:
                reader = reader_of(case)
                start_bytes = rss_bytes()
            answer = getattr(reader, command.pop("do"))(**command)
            answer = {"rss_bytes": rss_bytes(), "rss_start_bytes": start_bytes, **answer}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
