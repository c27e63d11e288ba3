"""What a node tells of itself: its metrics, the account of its time, and its events. Agent process.

run_agent ─► Telemetry.open        events and account go to the bucket, from here to the end of the agent
Agent     ─► begin ─► follow       what the parts of the agent know becomes metrics
             start ─► close        the threads of the metrics server and of GPU health
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from elastic_pt.agent.counting import (
    CountRecords,
    ReadAtScrape,
    count_lost_events,
    describe,
    flops_of,
    metrics_of,
)
from elastic_pt.agent.events import Events
from elastic_pt.agent.observation import Observation
from elastic_pt.agent.start import Prepared
from elastic_pt.config import Config
from elastic_pt.membership.node import Node
from elastic_pt.runlog.access import Access
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import Generation
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from elastic_pt.telemetry.account import WRITE_TIMEOUT_S, Account, AccountWriter
from elastic_pt.telemetry.exporter import MetricsServer
from elastic_pt.telemetry.gpu import GpuWatch
from elastic_pt.telemetry.protection import Protection
from elastic_pt.telemetry.requests import CountRequests


class Telemetry:
    """Nothing in here waits for a receiver, and no failure of one reaches the agent."""

    def __init__(self, config: Config, name: str) -> None:
        self._config = config
        self._name = name
        self.metrics = metrics_of(config, name)
        self.requests = CountRequests(self.metrics)
        """The observer of the agent's stores."""
        self.observation = Observation(
            self.metrics, Account(node=name, price_per_hour=config.telemetry.price_per_hour)
        )
        self._gpus = GpuWatch(
            self.metrics, self._gpu_is_known, os.environ.get("CUDA_VISIBLE_DEVICES")
        )

    @contextmanager
    def open(self, store: Store) -> Iterator[None]:
        """Events and account are written until the end of the block. Raises `ConfigError` for a malformed webhook."""
        directory = f"{self._name}-{secrets.token_hex(4)}"
        quick = open_store(self._config.run.url, timeout_s=WRITE_TIMEOUT_S, observer=self.requests)
        with (
            AccountWriter(quick, directory, self.observation.account) as self._accounts,
            Events(self._config, store, self._name, directory) as self.events,
        ):
            yield

    def ended(self, reason: str) -> None:
        """The agent is about to end in good order."""
        self._accounts.reason = reason

    # ---- while the agent takes part ----------------------------------------------------------------

    def begin(self, prepared: Prepared, access: Access) -> str:
        """The checks are passed; returns the URL of this node's metrics. Raises `ConfigError` if its port is in use."""
        for secret in access.secrets:
            self.events.hide(secret)
            self._accounts.hide(secret)
        self.observation.identify(incarnation=prepared.member.incarnation)
        prepared.log.listen(CountRecords(self.metrics))
        telemetry = self._config.telemetry
        self._server = MetricsServer(
            self.metrics.registry,
            telemetry.metrics_address,
            telemetry.metrics_port,
            prepared.member.address,
            Protection(telemetry),
        )
        return self._server.url

    def follow(
        self, node: Node, access: Access, pending: Callable[[], int], step: Callable[[], int]
    ) -> None:
        """Read from these parts at a scrape and for an event. `pending()` counts checkpoints, `step()` is the newest."""
        self._server.start(node.discovery(access).targets)
        self.metrics.before_scrape(ReadAtScrape(self.metrics, node, pending))
        count_lost_events(self.metrics, self.events)
        self.events.context.changing = lambda: {
            "generation": node.view.generation_number,
            "step": step(),
        }

    def count_flops(self, vocabulary: int) -> None:
        """Steps have an MFU as soon as a peak is known: that of the configuration now, that of a GPU after `start`."""
        self._vocabulary = vocabulary
        self._gpu_is_known("")

    def _gpu_is_known(self, name: str) -> None:
        """Takes effect with the next step (thread of the GPUs)."""
        self.metrics.flops = flops_of(self._config, self._vocabulary, name)

    def start(self) -> None:
        """Begin to watch the GPUs."""
        self._gpus.start()

    def workers_start(self, view: RunView, generation: Generation, known_s: float) -> None:
        """The workers of a generation, known since `known_s`, are about to start."""
        self.observation.identify(run_id=view.run_id)
        describe(self.metrics, self._config, view)
        self.metrics.mirrors_change()
        if generation.memory is None:
            self.metrics.states_lost()
        self.observation.starts(generation, known_s)

    def close(self) -> None:
        """Stop serving metrics."""
        self._gpus.close()
        self._server.close()
