"""The checks before a node takes part, so that a mistake fails the start and not step 1000. Agent process.

read_data ─► prepare ─► Prepared     the agent is built from it; on a mistake an `ElasticPtError` names it
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from elastic_pt import __version__
from elastic_pt.config import Config
from elastic_pt.data.cache import cache_directory
from elastic_pt.data.manifest import Manifest, read_manifest
from elastic_pt.doctor.at_start import warn_at_start
from elastic_pt.doctor.requirements import (
    require_cache,
    require_device,
    require_held_out,
    require_staging_space,
    require_work,
    workers_of,
)
from elastic_pt.errors import ConfigError, DataError, NotFound, StoreError
from elastic_pt.membership.address import interface_of
from elastic_pt.membership.node import new_member
from elastic_pt.membership.pulse import beats
from elastic_pt.runlog.access import Access, join_access
from elastic_pt.runlog.identity import IDENTITY_KEY, agree_on_identity, fingerprint
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Member
from elastic_pt.store.check import is_fenced
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from elastic_pt.workers.forking import ForkedCall, await_fork_server


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
    access: Access
    """To the other agents."""


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
    workers = workers_of(config)
    require_device(config)
    run_log = RunLog(store, writer=name)
    view = run_log.refresh()
    require_one_release(store, view, config.elastic.takeover_s)
    fenced_url = require_fencing(store, config, view.fenced_url)
    require_staging_space(config, data.vocab_size)
    require_work(config, data, workers)
    require_held_out(config, data)
    require_cache(config, data)
    members = () if view.generation is None else view.generation.members
    warn_at_start(config, data.vocab_size, len(members) or None)
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
        access=join_access(store, name, tls=config.elastic.tls),
    )


def require_one_release(store: Store, view: RunView, watch_s: float) -> None:
    """Refuse to join members of another version of elastic_pt: they would refuse this node, or not understand it.

    A generation of another version whose members are gone is no obstacle: that is an upgrade. So watch for `watch_s` whether
    it still trains.
    """
    generation = view.generation
    if generation is None or view.stop is not None or generation.release == __version__:
        return
    if beats(store, watch_s):
        other = generation.release or "an earlier version"
        raise ConfigError(
            f"elastic_pt {__version__}: {store.url} is trained by {other} now (generation {generation.number}); expected "
            "one version on all nodes: use theirs, or end them first (docs/upgrading.md)"
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
