"""The checks before a node takes part, so that a mistake fails the start and not step 1000. Agent process.

read_data ─► prepare ─► Prepared     the agent is built from it; on a mistake an `ElasticPtError` names it
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import structlog
import torch

from elastic_pt.checkpoint.footprint import footprint
from elastic_pt.config import Config
from elastic_pt.data.cache import ShardCache, cache_directory
from elastic_pt.data.manifest import Manifest, largest_block, read_manifest
from elastic_pt.data.plan import DataPlan
from elastic_pt.errors import ConfigError, DataError, NodeFailure, NotFound, StoreError
from elastic_pt.membership.address import interface_of
from elastic_pt.membership.node import new_member
from elastic_pt.runlog.identity import IDENTITY_KEY, agree_on_identity, fingerprint
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Member
from elastic_pt.store.check import is_fenced
from elastic_pt.store.open import open_store
from elastic_pt.store.port import KeepsUnfinished, Store
from elastic_pt.workers.forking import ForkedCall, await_fork_server

_RULES_TIMEOUT_S: Final = 2.0

log = structlog.get_logger("elastic_pt.agent.start")


@dataclass(frozen=True)
class Prepared:
    """A node that may take part."""

    config: Config
    """With the effective `data.cache`."""
    store: Store
    """The run directory."""
    log: RunLog
    member: Member
    fingerprint: Mapping[str, str]
    """The values that members compare when a node joins."""
    platform: Mapping[str, str]
    """The platform of this node (docs/glossary.md). Empty with native numerics."""
    fenced_url: str
    """The URL that `require_fencing` returned."""
    environment: Mapping[str, str]
    """Environment variables for the workers."""
    order_version: int
    """Of the run's data order."""


def read_data(config: Config, store: Store) -> Manifest:
    """The prepared data's manifest. `StoreError` if it is missing but the run in `store` has read it before."""
    try:
        return read_manifest(open_store(config.data.url, timeout_s=config.store.deadline_s))
    except DataError as error:
        if isinstance(error.__cause__, NotFound) and store.size(IDENTITY_KEY) is not None:
            raise StoreError(
                f"data.url = {config.data.url!r}: missing ({error.__cause__}), but the run has read it before; "
                "expected the same data: start this node again when it is there"
            ) from error
        raise


def prepare(
    config: Config, store: Store, data: Manifest, name: str, address: str, platform: ForkedCall
) -> Prepared:
    """Check everything that could prevent this node from training, and compare the run's identity."""
    environment = environment_of_workers(address)
    workers = config.elastic.workers_per_node or max(1, torch.cuda.device_count())
    require_device(config)
    run_log = RunLog(store, writer=name)
    fenced_url = require_fencing(store, config, run_log.refresh().fenced_url)
    require_staging_space(config, data.vocab_size)
    require_work(config, data, workers)
    require_held_out(config, data)
    warn_of_unfinished(open_store(config.run.url, timeout_s=_RULES_TIMEOUT_S))
    require_cache(config, data)
    computes = platform.wait(config.elastic.startup_timeout_s)
    # A node must not join before it can start workers, or all others would wait for it.
    await_fork_server(config.elastic.startup_timeout_s)
    order = agree_on_identity(store, config, data, computes, run_log.refresh().platform)
    cache = str(cache_directory(config.data.cache))
    return Prepared(
        config=config.model_copy(update={"data": config.data.model_copy(update={"cache": cache})}),
        store=store,
        log=run_log,
        member=new_member(name, address, workers, config.elastic.zone),
        fingerprint=fingerprint(config, data, computes),
        platform=computes if config.train.numerics == "exact" else {},
        fenced_url=fenced_url,
        environment=environment,
        order_version=order,
    )


def require_fencing(store: Store, config: Config, checked_url: str) -> str:
    """Refuse a run of several nodes on a store that lets two writers create the same record.

    Once per run is enough: the check is skipped if, by the log (`RunView.fenced_url`), it has succeeded at this URL.
    Returns the URL for the next GENERATION; empty if nothing was checked.
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


def warn_of_unfinished(store: Store) -> None:
    """Warn if the bucket has no rule that removes the parts of uploads that are never finished.

    A run removes such parts while it trains. Without a rule, those of a run that does not continue remain, cost money
    and appear in no listing. `store` has a short deadline: some servers do not know such rules.
    """
    if not isinstance(store, KeepsUnfinished):
        return
    try:
        expires = store.expires_unfinished("ckpt/")
    except StoreError as error:
        log.info("lifecycle_not_read", cause=str(error))
        return
    if not expires:
        log.warning(
            "no_lifecycle_rule",
            directory=store.url,
            cause="no rule of the bucket removes unfinished uploads; "
            "expected AbortIncompleteMultipartUpload after one or two days",
        )


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


def environment_of_workers(address: str) -> dict[str, str]:
    """Environment variables for this node's workers; set in this process too. Raises `ConfigError`."""
    try:
        interface = interface_of(address)
    except ValueError:
        raise ConfigError(f"--address {address}: expected an IP address of this machine") from None
    if interface is None:
        raise ConfigError(
            f"--address {address}: no interface has it; expected an IP address of this machine"
        )
    environment = {
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }
    os.environ.update(environment)
    return environment
