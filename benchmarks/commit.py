"""Time from the last upload to the COMMIT in a large fleet, with a store of fixed latency.

    python benchmarks/commit.py --nodes 1000 --workers 8 --latency-ms 30

The store is in this process. Every worker holds one row of each tensor of a 1B model and of its moments, about 80 KB of
slices. Node records, notices, manifest, history and log are real, and so is the time to make and to read them. Shards
are not uploaded, so the counts of requests leave out a `write` and a `size` for each shard. All nodes finish their last
upload at the same moment, after the committing node has waited for `--wait-s`: the worst case.

`node` is the work of one node after its last upload. All nodes do it at the same time. `commit` is the time from then,
when all notices appear at once, to the COMMIT. `worker` is the time in which a worker reads the index to find its rows.
`check` is the time in which a node that resumes the run compares the sizes of all files.
"""

import argparse
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from elastic_pt.checkpoint.commit import CommitRules, Committer, directory_of
from elastic_pt.checkpoint.history import StepHistory
from elastic_pt.checkpoint.index import read_index
from elastic_pt.checkpoint.layout import (
    ShardFile,
    Tensor,
    TensorSlice,
    TrainingState,
    shard_key,
)
from elastic_pt.checkpoint.upload import KeptShard, UploadedShard, publish_node
from elastic_pt.checkpoint.verify import quick_check
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Checkpoint, Generation, Member
from elastic_pt.store.open import open_store

STEP = 10
SHARD_BYTES = 1 << 40
LAYERS = 16
PER_LAYER = (
    "attention.query.weight",
    "attention.key.weight",
    "attention.value.weight",
    "attention.output.weight",
    "attention_norm.weight",
    "feed_forward.gate.weight",
    "feed_forward.up.weight",
    "feed_forward.down.weight",
    "feed_forward_norm.weight",
)
COLUMNS = 2048


class SlowStore:
    """A store with a fixed time for each request, which it counts by kind. It hides notices while `hides` is true."""

    def __init__(self) -> None:
        self._store = open_store(f"memory://{uuid.uuid4().hex}/run")
        self.latency_s = 0.0
        self.hides = False
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        answer = getattr(self._store, name)
        if not callable(answer):
            return answer

        def ask(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                self.requests[name] += 1
            time.sleep(self.latency_s)
            if self.hides and name == "read" and "/notice-" in arguments[0]:
                return self._store.read("hidden")
            if name == "size" and arguments[0].endswith(".safetensors"):
                return SHARD_BYTES
            return answer(*arguments, **named)

        return ask


def tensors_of(world_size: int) -> tuple[Tensor, ...]:
    """All tensors of a 1B model and its moments, each with one row per worker."""
    names = [f"layers.{layer}.{part}" for layer in range(LAYERS) for part in PER_LAYER]
    names += ["embedding.weight", "norm.weight", "output.weight"]
    return tuple(
        Tensor(f"{kind}/{name}", "F32", (world_size,) if "norm" in name else (world_size, COLUMNS))
        for kind in ("exp_avg", "exp_avg_sq", "model")
        for name in sorted(names)
    )


def uploaded(tensors: tuple[Tensor, ...], state: TrainingState, shard: KeptShard) -> UploadedShard:
    """One worker's shard, as after its upload."""
    offset, slices = 65_536, []
    for tensor in tensors:
        slices.append(
            TensorSlice(
                tensor.name,
                tensor.dtype,
                tensor.global_shape,
                shard.rank,
                shard.rank + 1,
                offset,
                1,
                (2_900_000_000 + shard.rank,),
            )
        )
        offset = slices[-1].end_offset
    key = shard_key(shard.directory, shard.rank)
    file = ShardFile(key, SHARD_BYTES, f"{shard.rank:064x}", tuple(slices))
    return UploadedShard(shard, file, state, tensors)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--wait-s", type=float, default=10.0)
    options = parser.parse_args()
    world_size = options.nodes * options.workers
    store: Any = SlowStore()
    run_log = RunLog(store, writer="node-0")
    members = tuple(
        Member(f"node-{n}", f"{n:08x}", "10.0.0.1", 29_500, 1, options.workers)
        for n in range(options.nodes)
    )
    generation = Generation(1, members, (), "10.0.0.1", 29_400, None, "started")
    run_log.append(lambda _: generation, generation=0)
    directory, run_id = directory_of(generation, STEP), run_log.view.run_id
    zeros = "0" * 64
    state = TrainingState(STEP, STEP, 0, zeros, zeros, zeros)
    tensors = tensors_of(world_size)

    node_s, sizes = 0.0, []
    store.requests.clear()
    for ranks in generation.worker_ranks():
        shards = [
            uploaded(tensors, state, KeptShard(Path(), run_id, directory, rank, ranks))
            for rank in ranks
        ]
        store.latency_s = options.latency_ms / 1000 if ranks.start == 0 else 0.0
        started_s = time.monotonic()
        notice = publish_node(store, shards)
        if ranks.start == 0:
            node_s = time.monotonic() - started_s
        sizes.append((notice.share.size, len(notice.to_bytes())))
    by_nodes = Counter(store.requests)

    committed = threading.Event()
    commits: list[Checkpoint] = []

    class Listener:
        def committed(self, checkpoint: Checkpoint) -> None:
            commits.append(checkpoint)
            committed.set()

        def ended(self, generation: Generation, step: int, failure: Exception | None) -> None:
            if failure is not None:
                print(f"the commit failed: {failure}")

        def untidy(self, failure: Exception) -> None:
            print(f"tidying failed: {failure}")

    store.latency_s, store.hides = options.latency_ms / 1000, True
    store.requests.clear()
    committer = Committer(
        store,
        run_log,
        StepHistory(),
        generation.members[0].incarnation,
        CommitRules(keep=2, keep_every_steps=0, last_step=10 * STEP, timeout_s=600.0),
        Listener(),
    )
    committer.note_step(1, {"step": STEP, "loss": 1.0})
    committer.expect(STEP, generation)
    time.sleep(options.wait_s)
    polls = store.requests.total()
    store.hides, started_s = False, time.monotonic()
    assert committed.wait(600)
    commit_s = time.monotonic() - started_s
    by_committer = Counter(store.requests)
    committer.close(10.0)

    wanted = {tensor.name: (world_size // 2, world_size // 2 + 1) for tensor in tensors}
    store.requests.clear()
    started_s = time.monotonic()
    read_index(store, commits[0], run_id, wanted)
    worker_s, worker_requests = time.monotonic() - started_s, store.requests.total()
    store.requests.clear()
    started_s = time.monotonic()
    quick_check(store, commits[0], run_id)
    check_s = time.monotonic() - started_s

    total = by_nodes.total() + by_committer.total()
    print(
        f"{options.nodes} nodes x {options.workers} workers, {options.latency_ms:g} ms a request:\n"
        f"  node    {node_s:.2f} s after its last upload; record {sizes[-1][0] / 1e3:.0f} KB, "
        f"notice {sizes[-1][1] / 1e3:.1f} KB\n"
        f"  commit  {commit_s:.2f} s from the notices to the COMMIT; manifest "
        f"{commits[0].manifest_size / 1e6:.2f} MB\n"
        f"  total   {node_s + commit_s:.2f} s from the last upload to the COMMIT\n"
        f"  requests without the uploads: {total / options.nodes:.2f} a node "
        f"(nodes {dict(by_nodes)}, committing node {dict(by_committer)}, of which {polls} while it waited)\n"
        f"  worker  {worker_s:.2f} s and {worker_requests} requests to find its rows\n"
        f"  check   {check_s:.2f} s and {store.requests.total()} requests for the sizes of all files"
    )


if __name__ == "__main__":
    main()
