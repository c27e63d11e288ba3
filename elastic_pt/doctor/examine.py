"""All checks, in the order of `elastic-pt doctor`.

    nothing asked     machine, GPUs, address, ports
    RUN_URL, CONFIG   … with what the run needs, and the bucket, the data, the time to save, the run and its agents

Checks are yielded as they are made; some take seconds. Command line's process.
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from elastic_pt.config import CheckpointSection, Config, ElasticSection, TrainSection
from elastic_pt.data.manifest import Manifest
from elastic_pt.doctor import bucket, gpus, machine, network, run, saving
from elastic_pt.doctor.check import Check, one_line
from elastic_pt.doctor.data import data_checks
from elastic_pt.doctor.requirements import workers_of
from elastic_pt.errors import AccessDenied, ElasticPtError, StoreError
from elastic_pt.membership.address import local_address
from elastic_pt.notices.detect import chosen, read_machine
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store


@dataclass(frozen=True)
class Question:
    """What is to be examined."""

    store: Store | None = None
    """The run directory; None: the machine alone."""
    config: Config | None = None
    """None if there is no run yet, or it cannot be read."""
    begun: bool = False
    """Whether the run's configuration is in its directory."""
    nodes: int | None = None
    """Nodes that train together; None: those that train now, or as few as may."""
    address: str | None = None
    """This node's address for its peers; None: that of the default route."""
    platform: Callable[[TrainSection], Mapping[str, str]] = lambda train: {}
    """The names of this node's platform (`train.probe.names_of`)."""


def examine(question: Question) -> Iterator[Check]:
    """Every check that can be made. Raises `ConfigError` only for a mistake in the question.

    If the store stops answering, or this machine refuses a file, that is the last check.
    """
    try:
        yield from _examine(question)
    except (StoreError, OSError) as error:
        expected = "no trouble while the checks are made"
        remedy = "mend it, then call doctor again: the checks after it were not made"
        yield Check("trouble", False, one_line(str(error)), expected, remedy)


def _examine(question: Question) -> Iterator[Check]:
    config, store = question.config, question.store
    yield machine.versions()
    reached = None if store is None else bucket.reached(store)
    view, of_run = None, list[Check]()
    if store is not None and reached is not None and reached.ok:
        view, of_run = _read_log(store, begun=question.begun)
    manifests, of_data = list[Manifest](), list[Check]()
    if config is not None:
        data = open_store(config.data.url, timeout_s=bucket.ANSWER_TIMEOUT_S, patient=False)
        of_data = list(data_checks(config, data, manifests))
    manifest = manifests[0] if manifests else None
    needs = None
    if config is not None and manifest is not None:
        nodes = question.nodes or _training(view)
        needs = machine.needs_of(config, manifest.vocab_size, nodes, workers_of(config))
    staging = CheckpointSection().staging if config is None else config.checkpoint.staging
    yield from machine.local_checks(Path(staging), needs)
    if config is not None and manifest is not None and not config.data.url.startswith("file://"):
        yield machine.cache(config, manifest)
    yield from gpus.gpu_checks(gpus.read_gpus(), config)
    yield from address_checks(question.address, config)
    elastic = ElasticSection() if config is None else config.elastic
    yield saving.notices(elastic, read_machine(), socket.gethostname())
    if store is None or reached is None:
        return
    speeds: list[bucket.Speed] = []
    yield from bucket.bucket_checks(store, reached, needs, elastic, speeds)
    yield from of_data
    if config is not None and needs is not None and speeds:
        watched = chosen(elastic.notices, read_machine())
        yield saving.checkpoint(config, needs, speeds[-1], watched)
    yield from of_run
    if view is not None:
        if config is not None and manifest is not None:
            platform = _platform(question, config.train)
            told = run.identity(store, config, manifest, platform, view)
            yield from [] if told is None else [told]
        yield from network.peer_checks(view, store, elastic)


def address_checks(address: str | None, config: Config | None) -> Iterator[Check]:
    """The node's address, name and ports."""
    alone = config is not None and config.elastic.nodes_max == 1
    yield network.own_address(address, alone=alone)
    yield network.host_name()
    own = address or local_address()
    yield network.listening(own, 0)
    if config is not None and config.elastic.port:
        yield network.listening(own, config.elastic.port, "agent_port")
    if config is not None and config.telemetry.metrics_port:
        telemetry = config.telemetry
        yield network.listening(telemetry.metrics_address, telemetry.metrics_port, "metrics_port")


def _read_log(store: Store, *, begun: bool) -> tuple[RunView | None, list[Check]]:
    try:
        view = RunLog(store, writer="elastic-pt").refresh()
    except AccessDenied:
        # The checks of the rights tell more.
        return None, []
    except ElasticPtError as error:
        remedy = (
            "elastic-pt log RUN_URL names the record; a damaged log cannot go on: start another run"
        )
        return None, [Check("run", False, one_line(str(error)), "a log that can be read", remedy)]
    return view, [run.state(view, begun=begun)]


def _platform(question: Question, train: TrainSection) -> Mapping[str, str]:
    """Empty where it cannot be told, such as without the device of the run; another check tells that."""
    try:
        return question.platform(train)
    except ElasticPtError:
        return {}


def _training(view: RunView | None) -> int | None:
    if view is None or view.stop is not None or view.generation is None:
        return None
    return len(view.generation.members)
