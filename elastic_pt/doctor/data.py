"""Checks of the prepared data: its manifest, the first block of each source, and whether the run can read it.

Command line's process.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from elastic_pt.config import Config
from elastic_pt.data.cache import ShardCache
from elastic_pt.data.manifest import Manifest, read_manifest
from elastic_pt.data.shards import TokenReader
from elastic_pt.doctor.check import Check, one_line, required
from elastic_pt.doctor.requirements import require_held_out, require_work, workers_of
from elastic_pt.errors import ElasticPtError
from elastic_pt.store.port import Store

_SOURCES_MAX: Final = 8
"""Sources of which a block is read."""
_CACHE_BYTES: Final = 2**40
_READ: Final = "the output of `elastic-pt prepare`, readable from this machine"
_REMEDY: Final = "check data.url and the right to read there; elastic-pt data URL --verify names every damaged block"


def data_checks(config: Config, store: Store, found: list[Manifest]) -> Iterator[Check]:
    """Read the manifest (appended to `found`) and a block of each source; then what the configuration asks of the data."""
    try:
        manifest = read_manifest(store)
    except ElasticPtError as error:
        yield Check("data", False, one_line(str(error)), _READ, _REMEDY)
        return
    found.append(manifest)
    yield required("data", _READ, _REMEDY, lambda: read_some(manifest, store))
    workers = workers_of(config)
    yield required(
        "plan",
        f"at most {config.train.slots} workers, and a row of {config.data.sequence_length} tokens",
        "change elastic.workers_per_node, train.micro_batch, or the data",
        lambda: planned(config, manifest, workers),
    )


def planned(config: Config, manifest: Manifest, workers: int) -> str:
    """Slots and workers. Raises `ElasticPtError` if this node or the evaluation cannot work with the data."""
    require_work(config, manifest, workers)
    require_held_out(config, manifest)
    return f"slots of a step: {config.train.slots}; workers of this node: {workers}"


def read_some(manifest: Manifest, store: Store) -> str:
    """Read and verify the first tokens of the first sources. Raises `ElasticPtError` for what is missing or damaged."""
    with tempfile.TemporaryDirectory(prefix="elastic-pt-doctor-") as directory:
        reader = TokenReader(manifest, store, cache=ShardCache(Path(directory), _CACHE_BYTES))
        try:
            read = [
                number
                for number, source in enumerate(manifest.sources[:_SOURCES_MAX])
                if source.tokens("train")
            ]
            for number in read:
                reader.stream(number, "train", 0, 1)
        finally:
            reader.close()
    tokens, sources = manifest.tokens("train"), len(manifest.sources)
    return f"{tokens:,} tokens; first block of {len(read)} of {sources} sources verified"
