"""What a run reads: its prepared data, and the plan by which it reads them.

    prepared data ─────────────────────────────► manifest ─┐
    run ─► config.toml, identity.json ─► plan, data.url ───┼─► Reads ─► mixture, rows, search, damage
        └► log, agents ─► present step ────────────────────┘

Without a run, the plan is that of a new run with the given configuration. Steps are those of the history, counted from 1: step n is
the one after which n steps are done.

Only reads, and imports no torch. Runs in the command line's process.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from elastic_pt.config import Config, load_config, parse_config
from elastic_pt.data.lanes import LANES_VERSION, lanes_of
from elastic_pt.data.manifest import MANIFEST_KEY, Manifest, Split, read_manifest
from elastic_pt.data.plan import DataPlan
from elastic_pt.data.readings import rows_holding
from elastic_pt.data.stored import StoredTokens
from elastic_pt.data.tokenizer import library_errors, load_tokenizer
from elastic_pt.errors import ConfigError, NoRun
from elastic_pt.report.status import STORE_TIMEOUT_S, Run, open_run, read_status
from elastic_pt.runlog.identity import order_version, read_identity
from elastic_pt.runlog.ignored import IgnoredSpan
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

_FINGERPRINT: Final = "data.url (fingerprint)"


@dataclass(frozen=True)
class Reads:
    """Prepared data, and how a run reads them."""

    store: Store
    manifest: Manifest
    config: Config
    order_version: int = LANES_VERSION
    run_url: str | None = None
    """None if there is no run."""
    step: int = 0
    """Steps that the run has done."""
    ignored: tuple[IgnoredSpan, ...] = ()
    """What the run leaves out."""

    @cached_property
    def plan(self) -> DataPlan:
        """Raises `DataError` if a source has no whole row."""
        config = self.config
        return DataPlan(
            self.manifest,
            sequence_length=config.data.sequence_length,
            seed=config.run.seed,
            global_batch=config.train.global_batch,
            lanes=lanes_of(
                self.order_version, config.train.micro_batch, config.data.shuffle_window_tokens
            ),
        )

    @cached_property
    def tokens(self) -> StoredTokens:
        """The tokens themselves."""
        return StoredTokens(self.manifest, self.store)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, its hash verified."""
        return load_tokenizer(self.store, self.manifest)

    def decode(self, ids: list[list[int]]) -> list[str]:
        """The texts of some sequences of token ids."""
        with library_errors(f"{self.store.url}/{self.manifest.tokenizer_key}"):
            found: list[str] = self.tokenizer.decode_batch(ids, skip_special_tokens=False)
        return found

    def tokens_of(self, row: int) -> range:
        """The place of a row in its stream."""
        start = row * self.config.data.sequence_length
        return range(start, start + self.config.data.sequence_length + 1)

    def rows_holding(self, source: int, split: Split, tokens: range) -> range:
        """The rows of the plan that have some of these tokens; none of a held-out stream."""
        length = self.config.data.sequence_length
        rows = self.manifest.sources[source].rows(length) if split == "train" else 0
        return rows_holding(tokens, length, rows)


def open_reads(url: str, overrides: list[str], data_url: str | None) -> Reads:
    """What the run at an absolute URL reads, or a new run of the prepared data there with some keys of its configuration.

    `data_url` is where the run's data is now. Raises `ConfigError` if there is neither a run nor prepared data, and for
    data that is not the run's.
    """
    store = open_store(url, timeout_s=STORE_TIMEOUT_S, patient=False)
    if store.size(MANIFEST_KEY) is not None:
        if data_url is not None:
            raise ConfigError(
                f"--data {data_url}: {url} is prepared data; expected a run for --data"
            )
        keys = ["run.url=file:///none", f"data.url={url}", *overrides]
        config = parse_config("", source="--set", overrides=keys)
        if config.data.url != url:
            raise ConfigError(
                f"--set data.url={config.data.url}: {url} is prepared data; expected no --set data.url"
            )
        return _reads_of_new_run(config, None)
    try:
        run = open_run(url)
    except NoRun as error:
        raise ConfigError(
            f"{url}: neither prepared data ({MANIFEST_KEY}) nor a run (config.toml); expected one of them"
        ) from error
    return _reads_of_run(run, overrides, data_url)


def _reads_of_run(run: Run, overrides: list[str], data_url: str | None) -> Reads:
    url = run.store.url
    if overrides:
        raise ConfigError(
            f"--set {overrides[0]}: {url} is a run, which keeps its configuration; expected no --set"
        )
    if run.config is None:
        raise ConfigError(
            f"{url}: has no config.toml, so its plan is unknown; expected a run of `elastic-pt run`"
        )
    identity = read_identity(run.store)
    data = open_store(data_url or run.config.data.url, timeout_s=STORE_TIMEOUT_S, patient=False)
    manifest = read_manifest(data)
    if manifest.fingerprint != identity.get(_FINGERPRINT):
        raise ConfigError(
            f"{data.url}: fingerprint {manifest.fingerprint}: the run at {url} reads {identity.get(_FINGERPRINT)}; "
            "expected the data that it was started with"
        )
    generation = run.log.refresh().generation
    return Reads(
        data,
        manifest,
        run.config,
        order_version(url, identity),
        url,
        read_status(run).step,
        () if generation is None else generation.ignored,
    )


def reads_of_config(path: Path, overrides: list[str], data_url: str | None) -> Reads:
    """What the run of a configuration file reads. If it has begun, its own configuration counts, not the file."""
    config = load_config(path, overrides)
    try:
        run = open_run(config.run.url)
    except NoRun:
        return _reads_of_new_run(config, data_url)
    # This key only tells which run it is.
    others = [each for each in overrides if each.partition("=")[0].strip() != "run.url"]
    return _reads_of_run(run, others, data_url)


def _reads_of_new_run(config: Config, data_url: str | None) -> Reads:
    store = open_store(data_url or config.data.url, timeout_s=STORE_TIMEOUT_S, patient=False)
    return Reads(store, read_manifest(store), config)
