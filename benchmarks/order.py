"""How well the order of rows is mixed, what a node reads for it, and what it costs to compute.

    python benchmarks/order.py [--seeds 4] [--json FILE]

Compares order version 2 with several sizes of chunks, and version 1, which permutes all rows of a source.

**Mixing** of one source that is sorted by topic, in rows of 2,048 tokens: 64 slots of 8 rows. A slot has 2 Mi tokens of the
window, as each of 512 slots has with the default of `data.shuffle_window_tokens`.

- variance: of the topics' counts in a batch, divided by that of randomly drawn rows; 1 is a full permutation.
- distance: mean distance of two rows of a batch, as a share of the source; 1/3 for a full permutation.
- neighbours: the share of pairs of neighbouring rows that are read in one step, and within 16 steps.
- read: what a node fetches, in blocks of 2^15 tokens, divided by the tokens that its slots use, in an epoch with 1, 4 and 16
  nodes. held: the most blocks that all 16 nodes need again later, in windows.

**Loss** of a small model on a corpus sorted by topic, with as many chunks in the window as the default has; "sorted" is the
corpus as it is. On held-out rows after each quarter of an epoch: mean of the seeds, and their standard deviation at the end.

**Cost** of locating all 4,096 rows of a step (64 sources, 512 slots), in CPU time: the first call and later ones.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.summary import machine
from elastic_pt.data.lanes import CHUNK_TOKENS, Lanes
from elastic_pt.data.manifest import Manifest, Shard, Source
from elastic_pt.data.order import Integers
from elastic_pt.data.plan import DataPlan

ROW_TOKENS = 2048
BLOCK_ROWS = 2**15 // ROW_TOKENS
SLOT_WINDOW_TOKENS = 2**21
WINDOW_TOKENS = 2**30
CHUNK_SIZES = [2**power for power in (15, 16, 17, 18, 19, 20)]
TOPICS = 64

Locate = Callable[[Integers], Integers]


def manifest_of(tokens: list[int]) -> Manifest:
    """Sources of equal weights that need no files."""
    sources = tuple(
        Source(f"s{i}", 1 / len(tokens), 1, (Shard(f"s{i}", count, "0" * 64),), 0, 0, ())
        for i, count in enumerate(tokens)
    )
    return Manifest(64, "uint16", "", 0, "t", "0" * 64, 0.0, sources, {})


def order_of(
    rows: int, slots: int, micro_batch: int, chunk_rows: int, group_rows: int, seed: int = 0
) -> Locate:
    """The rows of one source by plan row; with `chunk_rows` 0 that of order version 1."""
    # The size of a chunk is fixed in tokens, so the length of a row selects how many rows it has.
    length = CHUNK_TOKENS // max(1, chunk_rows)
    lanes = Lanes(micro_batch, group_rows * slots * length) if chunk_rows else None
    plan = DataPlan(manifest_of([rows * length + 1]), length, seed, slots * micro_batch, lanes)
    return lambda plan_rows: plan.locate(plan_rows)[1]


def mixing(chunk_tokens: int) -> dict[str, float]:
    """The statistics of one epoch; `chunk_tokens` 0 is version 1."""
    slots, micro_batch = 64, 8
    batch = slots * micro_batch
    rows = batch * 2**9
    group_rows = SLOT_WINDOW_TOKENS // ROW_TOKENS
    plan_rows = np.arange(rows)
    order = order_of(rows, slots, micro_batch, chunk_tokens // ROW_TOKENS, group_rows)(plan_rows)
    steps = order.reshape(-1, batch)
    counts = np.stack([(steps * TOPICS // rows == topic).sum(axis=1) for topic in range(TOPICS)])
    step_of = np.empty(rows, dtype=np.int64)
    step_of[order] = plan_rows // batch
    apart = np.abs(np.diff(step_of))
    others = np.random.default_rng(0).permuted(steps, axis=1)
    found = {
        "variance": counts.var(axis=1).sum() / (batch * (1 - 1 / TOPICS)),
        "distance": np.abs(steps - others)[steps != others].mean() / rows,
        "neighbours_step": (apart == 0).mean(),
        "neighbours_16_steps": (apart <= 16).mean(),
    }
    for nodes in (1, 4, 16):
        fetched, held = reads(order, plan_rows // micro_batch % slots % nodes, nodes, batch)
        found[f"read_{nodes}"] = fetched
    return {**found, "held": held / (group_rows * slots)}


def reads(order: Integers, node_of: Integers, nodes: int, batch: int) -> tuple[float, int]:
    """Rows that are fetched per row that is used, and the most rows of blocks that are needed again later."""
    blocks = len(order) // BLOCK_ROWS + 1
    first = np.full((nodes, blocks), len(order))
    last = np.full((nodes, blocks), -1)
    at = np.arange(len(order)) // batch
    # A row's last target is the first token of the next row.
    for block in (order // BLOCK_ROWS, (order + 1) // BLOCK_ROWS):
        np.minimum.at(first, (node_of, block), at)
        np.maximum.at(last, (node_of, block), at)
    read = last >= 0
    steps = len(order) // batch
    begun, ended = (np.bincount(each[read], minlength=steps).cumsum() for each in (first, last))
    return read.sum() * BLOCK_ROWS / len(order), int((begun - ended).max()) * BLOCK_ROWS


class Corpus:
    """Sequences of a small vocabulary, sorted by topic: each topic has its own probabilities of the next token."""

    vocabulary, length, context, topics = 64, 12, 4, 32

    def __init__(self, rows: int) -> None:
        generator = np.random.default_rng(1)
        odds = generator.dirichlet(
            np.full(self.vocabulary, 0.05), (self.topics, self.vocabulary)
        ).cumsum(-1)
        self.train, self.held_out = (self._sample(odds, each, generator) for each in (rows, 4096))

    def _sample(self, odds: Any, rows: int, generator: np.random.Generator) -> torch.Tensor:
        topic = np.arange(rows) * self.topics // rows
        tokens = np.zeros((rows, self.context + self.length), dtype=np.int64)
        tokens[:, : self.context] = generator.integers(self.vocabulary, size=(rows, self.context))
        for place in range(self.context, tokens.shape[1]):
            drawn = generator.random((rows, 1))
            following = (odds[topic, tokens[:, place - 1]] < drawn).sum(-1)
            tokens[:, place] = following.clip(max=self.vocabulary - 1)
        return torch.from_numpy(tokens)

    def loss(self, model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of each token after the ones before it."""
        windows = tokens.unfold(1, self.context + 1, 1)
        logits = model(windows[..., :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[..., -1].flatten())

    def train_through(self, locate: Locate, batch: int, seed: int) -> list[float]:
        """The held-out loss after each quarter of one epoch."""
        torch.manual_seed(seed)
        width = 16
        model = torch.nn.Sequential(
            torch.nn.Embedding(self.vocabulary, width),
            torch.nn.Flatten(2),
            torch.nn.Linear(width * self.context, 64),
            torch.nn.GELU(),
            torch.nn.Linear(64, self.vocabulary),
        )
        steps = len(self.train) // batch
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        losses = []
        for step in range(steps):
            rows = torch.from_numpy(locate(np.arange(step * batch, (step + 1) * batch)))
            self.loss(model, self.train[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if (step + 1) % (steps // 4) == 0:
                with torch.no_grad():
                    losses.append(self.loss(model, self.held_out).item())
        return losses


def losses(corpus: Corpus, chunk_tokens: int | None, seeds: int) -> dict[str, Any]:
    """The held-out losses with one order; None is no permutation, 0 is version 1."""
    slots, micro_batch, group_rows = 128, 4, 256
    rows = len(corpus.train)
    curves = []
    for seed in range(seeds):
        locate: Locate = lambda plan_rows: plan_rows  # noqa: E731
        if chunk_tokens is not None:
            chunk_rows = chunk_tokens * group_rows * slots // WINDOW_TOKENS
            locate = order_of(rows, slots, micro_batch, chunk_rows, group_rows, seed)
        curves.append(corpus.train_through(locate, slots * micro_batch, seed))
    quarters = [statistics.mean(each) for each in zip(*curves, strict=True)]
    return {"quarters": quarters, "deviation": statistics.stdev(each[-1] for each in curves)}


def cost(rows: int) -> dict[str, float]:
    """CPU milliseconds to locate all rows of a step, medians: of a seek to any step, and of the next one."""
    plan = DataPlan(manifest_of([rows * ROW_TOKENS + 1] * 64), ROW_TOKENS, 0, 4096, Lanes(8, 2**30))
    plan.locate(np.arange(4096))
    seeks: list[float] = []
    nexts: list[float] = []
    for seek in range(30):
        step = (seek + 1) * (10**6 + seek)
        for times in (seeks, nexts):
            start = time.thread_time()
            plan.locate(np.arange(step * 4096, (step + 1) * 4096))
            times.append((time.thread_time() - start) * 1e3)
            step += 1
    return {"seek_ms": statistics.median(seeks), "next_ms": statistics.median(nexts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine(), "chunk_tokens": CHUNK_TOKENS}
    names = {0: "version 1"} | {size: f"chunks of 2^{int(math.log2(size))}" for size in CHUNK_SIZES}
    result["mixing"] = {name: mixing(size) for size, name in names.items()}
    columns = list(result["mixing"]["version 1"])
    print(f"{'':>16}" + "".join(f"{each:>20}" for each in columns))
    for name, found in result["mixing"].items():
        print(f"{name:>16}" + "".join(f"{found[each]:20.5f}" for each in columns))
    corpus = Corpus(2**17)
    compared: dict[int | None, str] = {size: names[size] for size in (0, CHUNK_TOKENS, 2**20)}
    result["loss"] = {
        name: losses(corpus, size, options.seeds)
        for size, name in (compared | {None: "sorted"}).items()
    }
    for name, found in result["loss"].items():
        quarters = "".join(f"{each:9.4f}" for each in found["quarters"])
        print(f"{name:>16}{quarters} +- {found['deviation']:.4f}")
    result["cost"] = {f"{rows:.0e} rows per source": cost(rows) for rows in (10**6, 10**9)}
    for name, found in result["cost"].items():
        print(f"{name:>24}: seek {found['seek_ms']:.1f} ms, next step {found['next_ms']:.1f} ms")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
