"""What all chaos runs of one command share: prepared data, and the digests of undisturbed runs.

    Workbench(directory) ─► site(scenario, run) ─► Player ─► undisturbed(config)   one node, no fault, the same numerics

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
from typing import Any, Final, Self

from elastic_pt.chaos.bucket import Bucket
from elastic_pt.chaos.ceph import Ceph, missing_for_ceph
from elastic_pt.chaos.scenario import Scenario
from elastic_pt.checkpoint.digest import digest
from elastic_pt.checkpoint.history import read_history
from elastic_pt.checkpoint.index import read_manifest
from elastic_pt.config import Config
from elastic_pt.data.prepare import prepare
from elastic_pt.data.sources import standard_library_source
from elastic_pt.errors import ConfigError, UnexpectedError
from elastic_pt.fleet.local import Fleet
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Commit
from elastic_pt.store.open import open_store

_CHARACTERS: Final = 300_000
_BUCKET: Final = "elastic-pt-chaos"
_VOCABULARY: Final = 320
_REFERENCE_TIMEOUT_S: Final = 600.0
_DECIDES_THE_BITS: Final = ("run", "data", "model", "train")
_NOT: Final = {"run": {"url"}, "data": {"url", "cache", "cache_bytes", "prefetch_steps"}}


@dataclass(frozen=True)
class Site:
    """Where one run is. Its data is a copy of its own."""

    config: Config
    bucket: Bucket | None
    """The bucket that its directory and data are in; None if they are in a local directory."""


@dataclass(frozen=True)
class Undisturbed:
    """What an undisturbed run has shown."""

    digests: Mapping[int, str]
    """Of each checkpoint, by step. The last step has one."""
    lines: Mapping[int, Mapping[str, Any]]
    """Of the history, by step."""


class Workbench:
    """Keeps its files in `directory`, which may be empty or that of an earlier command. A context manager.

    An S3 server starts for the first run in a bucket. From then on the AWS variables of this process lead to it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._undisturbed: dict[str, Undisturbed] = {}
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
        return Site(scenario.run_config(f"{base}/run", data_url), bucket)

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

    def undisturbed(self, config: Config) -> Undisturbed:
        """The undisturbed run with the same numerics. Takes its time on first use."""
        deciding = config.model_dump(mode="json", include=set(_DECIDES_THE_BITS), exclude=_NOT)
        key = json.dumps(deciding, sort_keys=True)
        if key not in self._undisturbed:
            self._undisturbed[key] = self._train_alone(config)
        return self._undisturbed[key]

    def _train_alone(self, config: Config) -> Undisturbed:
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
        log = RunLog(store, writer="chaos")
        view = log.refresh()
        digests = {
            each.step: digest(store, read_manifest(store, each, view.run_id))
            for each in view.checkpoints
        }
        commits = [each.body for each in log.records() if isinstance(each.body, Commit)]
        lines = [line for each in commits for line in read_history(store, each.history)]
        shutil.rmtree(directory)
        return Undisturbed(digests, {line["step"]: line for line in lines})
