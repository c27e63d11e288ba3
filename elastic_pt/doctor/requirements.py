"""What a node refuses to start without. Each function raises an `ElasticPtError` that names the key and its value.

Agent process, and the command line's process.
"""

import shutil

import torch

from elastic_pt.checkpoint.footprint import footprint
from elastic_pt.config import Config
from elastic_pt.data.cache import ShardCache, cache_directory
from elastic_pt.data.manifest import Manifest, largest_block
from elastic_pt.data.plan import DataPlan
from elastic_pt.errors import ConfigError, NodeFailure


def workers_of(config: Config) -> int:
    """Workers of this node: as many as configured, or one per GPU, or one."""
    return config.elastic.workers_per_node or max(1, torch.cuda.device_count())


def require_work(config: Config, data: Manifest, workers: int) -> None:
    """Refuse more workers than a step has slots, and data without a whole row."""
    if workers > config.train.slots:
        raise ConfigError(
            f"elastic.workers_per_node = {workers}: more than the {config.train.slots} slots of a step "
            "(train.global_batch / train.micro_batch); expected fewer workers or smaller micro-batches"
        )
    DataPlan(
        data,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
    )


def require_held_out(config: Config, data: Manifest) -> None:
    """Refuse evaluations of data that has nothing to evaluate."""
    if config.evaluation.every_steps and data.tokens("held_out") == 0:
        raise ConfigError(
            f"evaluation.every_steps = {config.evaluation.every_steps}: the data at {config.data.url} has no held-out "
            "text; expected 0, or data that was prepared with --held-out above 0"
        )


def require_cache(config: Config, data: Manifest) -> None:
    """Refuse a cache of token shards that belongs to another user, or is too small for one block."""
    size, name = 0, "a block"
    # Shards on a file system are read in place.
    if not config.data.url.startswith("file://"):
        size, name = largest_block(data, held_out=bool(config.evaluation.every_steps))
    cache = ShardCache(cache_directory(config.data.cache), config.data.cache_bytes)
    cache.require(size, name)


def require_device(config: Config) -> None:
    """Refuse `train.device = 'cuda'` without a CUDA device, before the run starts."""
    if config.train.device == "cuda" and torch.cuda.device_count() == 0:
        raise ConfigError(
            "train.device = 'cuda': torch finds no CUDA device on this machine; "
            "expected a machine with one, or 'cpu' or 'auto'"
        )


def require_staging_space(config: Config, vocabulary: int) -> None:
    """Refuse a staging directory that could never hold this node's share of a checkpoint.

    /dev/shm of a container has 64 MB by default. A directory that is large enough but full now is a
    `NodeFailure`: start the node again when there is room.
    """
    size = footprint(config.model, vocabulary).checkpoint_bytes
    staging = config.checkpoint.staging
    try:
        usage = shutil.disk_usage(staging)
    except OSError as error:
        raise ConfigError(
            f"checkpoint.staging = {staging!r}: {error.strerror}; expected a writable local directory"
        ) from error
    smallest_share = size // config.elastic.nodes_max
    if usage.free < smallest_share:
        what = (
            f"checkpoint.staging = {staging!r}: {usage.free:,} of {usage.total:,} bytes free, but a node's "
            f"share of a checkpoint takes {smallest_share:,} to {size:,}"
        )
        if usage.total < smallest_share:
            raise ConfigError(f"{what}; expected a larger directory (docker: --shm-size)")
        raise NodeFailure(f"{what}; start this node again when there is room")
