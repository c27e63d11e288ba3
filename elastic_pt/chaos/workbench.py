"""What all chaos runs of one command share: prepared data, and the digests of undisturbed runs.

    Workbench(directory) ─► config_of(scenario, run) ─► reference(config)   one node, no fault, the same numerics

An undisturbed run is done once for each set of keys that decide the bits of the weights.
"""

import json
from pathlib import Path
from typing import Final

from elastic_pt.chaos.scenario import Scenario
from elastic_pt.checkpoint.digest import digest
from elastic_pt.checkpoint.index import read_manifest
from elastic_pt.config import Config, parse_config
from elastic_pt.data.prepare import prepare
from elastic_pt.data.sources import standard_library_source
from elastic_pt.errors import UnexpectedError
from elastic_pt.fleet.local import Fleet
from elastic_pt.runlog.log import RunLog
from elastic_pt.store.open import open_store

_CHARACTERS: Final = 300_000
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
[telemetry]
log_format = "json"
"""


class Workbench:
    """Keeps its files in `directory`, which may be empty or that of an earlier command."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._references: dict[str, str] = {}

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

    def config(self, scenario: Scenario, run_url: str, data_url: str) -> Config:
        """The configuration of a scenario's run: it starts once all its nodes are there."""
        text = _BASE.format(
            run_url=run_url,
            data_url=data_url,
            steps=scenario.steps,
            nodes=scenario.nodes,
            workers=scenario.workers_per_node,
            join_window_s=30.0,
        )
        return parse_config(text, source=scenario.name, overrides=scenario.overrides)

    def reference(self, config: Config) -> str:
        """The digest of the weights of the undisturbed run with the same numerics. Takes its time on first use."""
        deciding = config.model_dump(mode="json", include=set(_DECIDES_THE_BITS), exclude=_NOT)
        key = json.dumps(deciding, sort_keys=True)
        if key not in self._references:
            self._references[key] = self._undisturbed(config, len(self._references))
        return self._references[key]

    def _undisturbed(self, config: Config, number: int) -> str:
        directory = self.directory / f"reference-{number}"
        url = f"file://{(directory / 'run').absolute()}"
        alone = config.model_copy(
            update={
                "run": config.run.model_copy(update={"url": url}),
                "data": config.data.model_copy(update={"url": self.data_url()}),
                "elastic": config.elastic.model_copy(
                    update={"nodes_min": 1, "nodes_max": 1, "workers_per_node": 1}
                ),
            }
        )
        with Fleet(alone, directory) as fleet:
            fleet.start("alone")
            codes = fleet.wait(_REFERENCE_TIMEOUT_S)
            if codes != {"alone": 0}:
                raise UnexpectedError(f"the undisturbed run failed: {codes}; {fleet.tail('alone')}")
        store = open_store(url)
        view = RunLog(store, writer="chaos").refresh()
        return digest(store, read_manifest(store, view.checkpoints[0], view.run_id))
