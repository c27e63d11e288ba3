"""What an agent checks and sets before it takes part, so that mistakes are named at the start and not at step 1000."""

import os
import shutil

import structlog
import torch

from elastic_pt.checkpoint.footprint import footprint
from elastic_pt.config import Config
from elastic_pt.data.cache import ShardCache, cache_directory
from elastic_pt.data.manifest import TOKEN_BYTES, Manifest
from elastic_pt.data.plan import DataPlan
from elastic_pt.errors import ConfigError, NodeFailure
from elastic_pt.membership.address import interface_of
from elastic_pt.store.check import is_fenced
from elastic_pt.store.port import Store

log = structlog.get_logger("elastic_pt.agent.start")


def require_fencing(store: Store, config: Config, checked_url: str) -> str:
    """Refuse a run of several nodes on a store that lets two writers create the same record.

    Once per run is enough: the check is skipped if the log says (`RunView.fenced_url`) that it has succeeded at this URL.
    Returns the URL for the next GENERATION; empty where nothing was checked.
    """
    if checked_url == store.url:
        return checked_url
    if config.elastic.nodes_max == 1:
        return ""
    report = is_fenced(store)
    if not report.fenced:
        raise ConfigError(
            f"run.url = {store.url!r}: unfenced ({report.reason}); expected a store with create-once "
            "for several nodes, or elastic.nodes_max = 1"
        )
    return store.url


def require_work(config: Config, data: Manifest, workers: int) -> None:
    """Refuse more workers than a step has slots, and data without a whole row."""
    if workers > config.train.slots:
        raise ConfigError(
            f"elastic.workers_per_node = {workers}: more than the {config.train.slots} slots of a step "
            "(train.global_batch / train.micro_batch); fewer workers or smaller micro-batches would be right"
        )
    DataPlan(
        data,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
    )


def require_cache(config: Config, data: Manifest) -> None:
    """Refuse a cache of token shards that workers could not use: not this user's own, or too small for one shard."""
    shards = [shard for source in data.sources for shard in source.train]
    largest = max(shards, key=lambda shard: shard.tokens)
    # Shards of a directory are mapped where they lie.
    size = (
        0
        if config.data.url.startswith("file://")
        else largest.tokens * TOKEN_BYTES[data.token_type]
    )
    cache = ShardCache(cache_directory(config.data.cache), config.data.cache_bytes)
    cache.require(size, largest.key)


def require_device(config: Config) -> None:
    """Refuse CUDA where there is none, before the run is begun."""
    if config.train.device == "cuda" and torch.cuda.device_count() == 0:
        raise ConfigError(
            "train.device = 'cuda': torch finds no CUDA device on this machine; "
            "expected a machine with one, or 'cpu' or 'auto'"
        )


def require_staging_space(config: Config, vocabulary: int) -> None:
    """Refuse a staging directory that could never hold this node's share of a checkpoint.

    Containers give /dev/shm 64 MB unless told otherwise, and writing beyond that kills the writer. A directory
    that is large enough but full now is a `NodeFailure`: that may pass, so the node may be started again.
    """
    size = footprint(config.model, vocabulary).checkpoint_bytes
    staging = config.checkpoint.staging
    try:
        usage = shutil.disk_usage(staging)
    except OSError as error:
        raise ConfigError(
            f"checkpoint.staging = {staging!r}: {error.strerror}; a writable local directory would be right"
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
    if usage.free < 2 * size:
        log.warning(
            "staging_is_small", free_bytes=usage.free, checkpoint_bytes=size, directory=staging
        )


def environment_of_workers(address: str) -> dict[str, str]:
    """What workers need to know of this node beyond that; set in this process too."""
    try:
        interface = interface_of(address)
    except ValueError:
        raise ConfigError(
            f"--address {address}: not an IP address; one of this machine's own would be right"
        ) from None
    if interface is None:
        raise ConfigError(
            f"--address {address}: no interface of this machine has it; one of its own would be right"
        )
    environment = {
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }
    os.environ.update(environment)
    return environment
