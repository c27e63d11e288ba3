"""What all chaos runs of one command share: prepared data, and the digests of undisturbed runs.

    Workbench(directory) ─► site(scenario, run) ─► Player ─► references(config)   one node, no fault, the same numerics

An undisturbed run is done once for each set of keys that decide the bits of the weights.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from elastic_pt.chaos.bucket import Bucket
from elastic_pt.chaos.ceph import Ceph, missing_for_ceph
from elastic_pt.chaos.scenario import Scenario
from elastic_pt.checkpoint.digest import digest
from elastic_pt.checkpoint.index import read_manifest
from elastic_pt.config import Config, parse_config
from elastic_pt.data.prepare import prepare
from elastic_pt.data.sources import standard_library_source
from elastic_pt.errors import ConfigError, UnexpectedError
from elastic_pt.fleet.local import Fleet
from elastic_pt.runlog.log import RunLog
from elastic_pt.store.open import open_store

_WHOLE_WINDOW_S: Final = 30.0
"""A run starts at once when all its nodes are there, and with fewer only after this time."""
_JOIN_WINDOW_S: Final = 3.0
"""The same where nodes come later: the first ones must not wait for them for long."""
_CHARACTERS: Final = 300_000
_BUCKET: Final = "elastic-pt-chaos"
_VOCABULARY: Final = 320
_REFERENCE_TIMEOUT_S: Final = 600.0
_DECIDES_THE_BITS: Final = ("run", "data", "model", "train")
_NOT: Final = {"run": {"url"}, "data": {"url", "cache", "cache_bytes", "prefetch_steps"}}

_BASE: Final = """
[run]
url = "{run_url}"
seed = 7
[data]
url = "{data_url}"
sequence_length = 64
[model]
layers = 2
width = 64
heads = 2
kv_heads = 1
[train]
steps = {steps}
global_batch = 8
micro_batch = 1
warmup_steps = 4
[elastic]
nodes_max = {nodes}
workers_per_node = {workers}
join_window_s = {join_window_s}
# Patient: a machine that runs all these processes at once must not make a healthy node look silent.
heartbeat_timeout_s = 4.0
takeover_s = 8.0
hang_timeout_s = 4.0
settle_timeout_s = 60.0
collective_timeout_s = 60.0
[checkpoint]
every_steps = 6
# Steps are so short here that the adaptive cadence would lose more of them than with a real model.
snapshot_every_steps = 1
[telemetry]
log_format = "json"
"""


@dataclass(frozen=True)
class Site:
    """Where one run is. Its data is a copy of its own."""

    config: Config
    bucket: Bucket | None
    """The bucket that its directory and data are in; None if they are in a local directory."""


class Workbench:
    """Keeps its files in `directory`, which may be empty or that of an earlier command. A context manager.

    An S3 server starts for the first run in a bucket. From then on the AWS variables of this process lead to it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._references: dict[str, dict[int, str]] = {}
        self._bucket: Bucket | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def site(self, scenario: Scenario, directory: Path) -> Site:
        """Everything that a new run needs: a place, its own copy of the data, and its configuration.

        `directory` is where it is if it is in no bucket. Raises `ConfigError` if it is to be in one and there is no S3 server.
        """
        bucket = self._open_bucket() if scenario.store == "bucket" else None
        base = f"{bucket.url}/{uuid.uuid4().hex}" if bucket else f"file://{directory.absolute()}"
        data_url = self.copy_data(f"{base}/data")
        return Site(self.config(scenario, f"{base}/run", data_url), bucket)

    def _open_bucket(self) -> Bucket:
        if self._bucket is None:
            if missing := missing_for_ceph():
                raise ConfigError(f"store = bucket: no S3 server, {missing}")
            home = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="elastic_pt-ceph-"))
            ceph = Ceph(Path(home) / "ceph")
            self._stack.callback(ceph.stop)
            ceph.start()
            self._bucket = ceph.create_bucket(_BUCKET)
            before = dict(os.environ)
            self._stack.callback(os.environ.update, before)
            self._stack.callback(os.environ.clear)
            environment = self._bucket.environment(before)
            os.environ.clear()
            os.environ.update(environment)
        return self._bucket

    def data_url(self) -> str:
        """A few hundred kilobytes of the standard library, tokenized on first use."""
        path = self.directory / "data"
        url = f"file://{path.absolute()}"
        if not path.exists():
            part = self.directory / "data.part"
            prepare(
                [standard_library_source(_CHARACTERS)],
                open_store(f"file://{part.absolute()}"),
                vocab_size=_VOCABULARY,
                held_out=0.05,
            )
            part.rename(path)
        return url

    def copy_data(self, url: str) -> str:
        """A copy of the prepared data for one run, which may be disturbed; returns its URL."""
        source, target = open_store(self.data_url()), open_store(url)
        for key in source.keys(""):
            target.write(key, source.read(key))
        return url

    def config(self, scenario: Scenario, run_url: str, data_url: str) -> Config:
        """The configuration of a scenario's run: it starts once all its nodes are there."""
        text = _BASE.format(
            run_url=run_url,
            data_url=data_url,
            steps=scenario.steps,
            nodes=scenario.nodes + scenario.joining,
            workers=scenario.workers_per_node,
            join_window_s=_JOIN_WINDOW_S if scenario.joining else _WHOLE_WINDOW_S,
        )
        return parse_config(text, source=scenario.name, overrides=scenario.overrides)

    def references(self, config: Config) -> Mapping[int, str]:
        """The digests of the undisturbed run with the same numerics, by step. Takes its time on first use.

        It has those of all steps that it committed, the last one among them.
        """
        deciding = config.model_dump(mode="json", include=set(_DECIDES_THE_BITS), exclude=_NOT)
        key = json.dumps(deciding, sort_keys=True)
        if key not in self._references:
            self._references[key] = self._undisturbed(config)
        return self._references[key]

    def _undisturbed(self, config: Config) -> dict[int, str]:
        directory = Path(tempfile.mkdtemp(prefix="reference-", dir=self.directory))
        url = f"file://{(directory / 'run').absolute()}"
        alone = config.model_copy(
            update={
                "run": config.run.model_copy(update={"url": url}),
                "data": config.data.model_copy(update={"url": self.data_url()}),
                "elastic": config.elastic.model_copy(
                    update={"nodes_min": 1, "nodes_max": 1, "workers_per_node": 1}
                ),
                "checkpoint": config.checkpoint.model_copy(update={"keep": config.train.steps}),
            }
        )
        with Fleet(alone, directory) as fleet:
            fleet.start("alone")
            codes = fleet.wait(_REFERENCE_TIMEOUT_S)
            if codes != {"alone": 0}:
                raise UnexpectedError(f"the undisturbed run failed: {codes}; {fleet.tail('alone')}")
        store = open_store(url)
        view = RunLog(store, writer="chaos").refresh()
        found = {
            each.step: digest(store, read_manifest(store, each, view.run_id))
            for each in view.checkpoints
        }
        shutil.rmtree(directory)
        return found
