"""Helpers that the tests of this folder import."""

import random
from dataclasses import dataclass
from pathlib import Path

from elastic_pt.data.cache import ShardCache, cache_directory
from elastic_pt.data.manifest import Manifest
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
