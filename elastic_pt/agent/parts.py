"""Builds parts of an agent from the configuration. Agent process.

`Agent.__init__` creates the parts in order; here are those that need many values of the configuration.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Final

from elastic_pt.agent.checkpointing import choose_resume
from elastic_pt.agent.leaving import Leaving
from elastic_pt.agent.observation import Observation
from elastic_pt.agent.start import Prepared
from elastic_pt.config import Config
from elastic_pt.membership.decision.mirrors import mirrored_by
from elastic_pt.membership.resources import InMemoryStates, Resources
from elastic_pt.membership.tcp_store import bind_store
from elastic_pt.notices.detect import chosen, read_machine, sources
from elastic_pt.notices.watch import Watch
from elastic_pt.runlog.access import Access
from elastic_pt.store.open import open_store
from elastic_pt.telemetry.catalogue import Metrics
from elastic_pt.telemetry.requests import CountRequests
from elastic_pt.workers.channel import AgentSide
from elastic_pt.workers.watchdog import WatchdogLimits

_HINTS_TIMEOUT_S: Final = 2.0
_PROGRESS_TIMEOUT_S: Final = 30.0


def resources_of(
    prepared: Prepared,
    channel: AgentSide,
    states: InMemoryStates,
    on_leave: Callable[[float], None],
    observation: Observation,
) -> Resources:
    """What the membership of this node needs from the rest of its agent."""
    config, member = prepared.config, prepared.member
    return Resources(
        log=prepared.log,
        hints=open_store(
            config.run.url, timeout_s=_HINTS_TIMEOUT_S, observer=CountRequests(observation.metrics)
        ),
        clock_s=time.monotonic,
        bind_store=partial(bind_store, member.address),
        choose_resume=partial(
            choose_resume, prepared.store, prepared.log, incarnation=member.incarnation
        ),
        choose_mirrors=partial(
            mirrored_by,
            copies=config.checkpoint.mirror_copies,
            across_zones=config.checkpoint.mirror_zones,
        ),
        on_drain=channel.drain,
        on_checkpoint=channel.checkpoint,
        on_leave=on_leave,
        on_decision=observation.idle,
        platform=prepared.platform,
        states=states,
        fenced_url=prepared.fenced_url,
    )


def notices_of(prepared: Prepared, access: Access, leaving: Leaving, metrics: Metrics) -> Watch:
    """The watch of this machine's notices, which does not run yet."""
    elastic = prepared.config.elastic
    return Watch(
        sources(
            chosen(elastic.notices, read_machine()), prepared.member.node, access.token.encode()
        ),
        leaving.heed,
        metrics,
        usual_lead_s=elastic.leave_timeout_s,
    )


def limits_of(config: Config) -> WatchdogLimits:
    """How long a worker may be silent."""
    return WatchdogLimits(
        hang_timeout_s=config.elastic.hang_timeout_s,
        # No worker makes progress while one of them still waits for its data; that wait ends with a better error.
        progress_timeout_s=_PROGRESS_TIMEOUT_S + config.store.deadline_s,
        startup_timeout_s=config.elastic.startup_timeout_s,
    )
