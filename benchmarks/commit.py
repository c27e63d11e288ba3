"""How long the committing node takes from the last upload to the end of `collect` and `publish_manifest`.

The store is in this process and waits `--latency-ms` per request; parts are there already. The slices of a
rank are those of `--tensors` tensors. Usage: python benchmarks/commit.py --ranks 1000 --tensors 60
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from elastic_pt.checkpoint.layout import Part, TrainingState, checkpoint_directory
from elastic_pt.checkpoint.shard_file import write_shard
from elastic_pt.checkpoint.upload import StagedShard, collect, publish_manifest, upload_shard
from elastic_pt.store.open import open_store

DIRECTORY = checkpoint_directory(10, 1, "abcd")


class SlowStore:
    """A store whose every request takes a fixed time, counted by kind."""

    def __init__(self, latency_s: float) -> None:
        self._store = open_store("memory://commit-benchmark/run")
        self.latency_s = latency_s
        self.requests: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        answer = getattr(self._store, name)
        if not callable(answer):
            return answer

        def ask(*arguments: Any, **named: Any) -> Any:
            self.requests[name] += 1
            time.sleep(self.latency_s)
            return answer(*arguments, **named)

        return ask


def put_parts(store: Any, ranks: int, tensors: int) -> None:
    """Upload a shard and a part for every rank."""
    zeros = "0" * 64
    state = TrainingState(10, 0, 0, 0, 10, 10, 10, zeros, zeros, zeros, "exact", ranks)
    row = torch.zeros(1, 4)
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(ranks):
            path = Path(folder) / "shard"
            rows = {f"model/layer.{i}.weight": (row, (ranks, 4), rank) for i in range(tensors)}
            write_shard(path, rows, state)
            upload_shard(store, StagedShard(path, "0123456789abcdef", DIRECTORY, rank))


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--tensors", type=int, default=60)
    parser.add_argument("--latency-ms", type=float, default=30.0)
    options = parser.parse_args()
    store: Any = SlowStore(0.0)
    put_parts(store, options.ranks, options.tensors)
    store.latency_s = options.latency_ms / 1000
    store.requests.clear()
    started_s = time.monotonic()
    parts: list[Part] | None = collect(
        store,
        DIRECTORY,
        range(options.ranks),
        deadline_s=600.0,
        now=time.monotonic,
        wait=time.sleep,
        should_stop=lambda: False,
    )
    assert parts is not None
    collected_s = time.monotonic()
    reference = publish_manifest(store, parts)
    print(
        f"ranks {options.ranks}: collect {collected_s - started_s:.2f} s, "
        f"publish {time.monotonic() - collected_s:.2f} s, "
        f"manifest {reference.manifest_size} bytes, requests {dict(store.requests)}"
    )


if __name__ == "__main__":
    main()
