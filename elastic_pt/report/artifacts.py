"""Uses of a run's checkpoints on one machine: a digest, an evaluation, generated text, an export.

    run ─► choose_checkpoint ─► manifest ─┬─► digest_of
                                          └─► open_trained (+ data.url: vocabulary, tokenizer, held-out text)
                                                   ├─► evaluate      held-out loss
                                                   ├─► text_model ─► continue_text
                                                   └─► export

Every byte of a checkpoint is verified before the checkpoint is used. The model is unsharded, in float32.
Runs in the command line's process.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer

from elastic_pt.checkpoint import digest as checkpoint_digest
from elastic_pt.checkpoint.layout import FullManifest
from elastic_pt.checkpoint.restore import load_rows
from elastic_pt.checkpoint.verify import Verified, newest_usable, verify_share
from elastic_pt.config import Config
from elastic_pt.data.cache import ShardCache, cache_directory
from elastic_pt.data.held_out import HeldOutBatch, held_out_rows, mean_loss, read_held_out
from elastic_pt.data.manifest import Manifest as DataManifest
from elastic_pt.data.manifest import read_manifest as read_data_manifest
from elastic_pt.data.shards import TokenReader
from elastic_pt.data.tokenizer import end_token, load_tokenizer, load_tokenizer_file
from elastic_pt.errors import CheckpointError, ConfigError, DataError, NotFound, StoreError
from elastic_pt.model import export as model_export
from elastic_pt.model import generate as model_generate
from elastic_pt.model.loss import IGNORED, LossSums
from elastic_pt.model.transformer import Transformer, build_on_meta
from elastic_pt.report.checkpoints import read_checkpoints
from elastic_pt.report.status import STORE_TIMEOUT_S, Run
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

_BATCH_TOKENS: Final = 8192


@dataclass(frozen=True)
class Chosen:
    """A verified checkpoint, and why newer ones were passed over."""

    manifest: FullManifest
    passed_over: tuple[tuple[int, str], ...]
    """Step and reason."""


def choose_checkpoint(run: Run, step: int | None) -> Chosen:
    """The newest committed checkpoint that verifies, or the one of `step`.

    Raises `ConfigError` for a step that is not kept, and `CheckpointError` if none is usable.
    """
    reports = read_checkpoints(run)
    passed_over = [
        (each.checkpoint.step, f"quarantined: {each.quarantine}")
        for each in reports
        if each.quarantine
    ]
    usable = [each.checkpoint for each in reports if not each.quarantine]
    if step is not None:
        usable = [each for each in usable if each.step == step]
        reasons = [reason for at, reason in passed_over if at == step]
        if not usable and reasons:
            raise CheckpointError(f"step {step}: {reasons[0]}")
        if not usable:
            kept = ", ".join(str(each.checkpoint.step) for each in reports) or "none yet"
            raise ConfigError(
                f"--step {step}: no committed checkpoint of this step is kept; expected one of: {kept}"
            )
        passed_over = []
    run_id = run.log.view.run_id
    found = newest_usable(run.store, usable, run_id)
    passed_over += [(each.step, reason) for each, reason in found.passed_over]
    newer = sorted((each for each in passed_over if each[0] > found.manifest.step), reverse=True)
    return Chosen(found.manifest, tuple(newer))


def verified(run: Run, checkpoint: Checkpoint, share: float, seed: int) -> Verified:
    """All problems of a checkpoint. Reads every byte of it, or a random `share` of its bytes."""
    return verify_share(run.store, checkpoint, run.log.view.run_id, share=share, seed=seed)


def digest_of(run: Run, chosen: Chosen) -> str:
    """SHA-256 over weights and optimizer state, as `checkpoint.digest` defines it."""
    return checkpoint_digest.digest(run.store, chosen.manifest)


@dataclass(frozen=True)
class Trained:
    """A usable checkpoint together with the data it was trained on."""

    store: Store
    config: Config
    chosen: Chosen
    data_store: Store
    data: DataManifest

    def model(self) -> Transformer:
        """The whole model on this machine's accelerator, or on its CPU."""
        model = build_on_meta(self.config.model, self.data.vocab_size).to_empty(device="cpu")
        targets = {f"model/{name}": each.detach() for name, each in model.named_parameters()}
        wanted = {name: (0, each.shape[0]) for name, each in targets.items()}
        load_rows(self.store, self.chosen.manifest, wanted, targets)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return model.to(device).eval()

    def text_model(self) -> "TextModel":
        """The model with its tokenizer."""
        tokenizer = load_tokenizer(self.data_store, self.data)
        return TextModel(
            self.model(), tokenizer, self.data.end_token_id, self.config.data.sequence_length
        )


def open_trained(run: Run, step: int | None, data_url: str | None) -> Trained:
    """Choose a checkpoint and find its data at `data_url`, by default where the run read it.

    Raises `ConfigError` if the data is missing or has another tokenizer than the checkpoint, and `StoreError` if its
    store cannot be reached.
    """
    if run.config is None:
        raise ConfigError(
            f"{run.store.url}: has no config.toml, so its model is unknown; "
            "expected a run of `elastic-pt run`"
        )
    chosen = choose_checkpoint(run, step)
    url = data_url or run.config.data.url
    data_store = open_store(url, timeout_s=STORE_TIMEOUT_S, patient=False)
    try:
        data = read_data_manifest(data_store)
    except (DataError, StoreError) as error:
        # Missing data is a user's mistake; an unreachable store may still hold it.
        kind = ConfigError if isinstance(error, (DataError, NotFound)) else StoreError
        raise kind(
            f"data.url = {url!r}: vocabulary and tokenizer cannot be read ({error}); "
            "expected --data URL with the location of the same prepared data"
        ) from error
    if data.tokenizer_sha256 != chosen.manifest.state.tokenizer_sha256:
        raise ConfigError(
            f"data.url = {url!r}: has another tokenizer than the checkpoint was trained with; "
            "expected the data that this run was started with"
        )
    return Trained(run.store, run.config, chosen, data_store, data)


@dataclass(frozen=True)
class Evaluation:
    """The results on the held-out documents."""

    step: int
    loss: float
    """Mean cross-entropy in nats per token."""
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    """UTF-8 bytes of the held-out documents; of a part of the rows, in proportion to their tokens."""
    loss_by_source: dict[str, float]


def evaluate(
    trained: Trained, rows: int = 0, on_rows: Callable[[int, int], None] = lambda done, of: None
) -> Evaluation:
    """Measure the model on `rows` held-out rows of the training length, or on all of them for 0.

    They are the rows that a run with this `evaluation.rows` measures. Calls `on_rows(done, of)` after each batch.
    Raises `DataError` if nothing was held out.
    """
    data = trained.data
    if data.tokens("held_out") == 0:
        raise DataError(
            f"{trained.data_store.url}: nothing was held out; "
            "expected data that was prepared with --held-out above 0"
        )
    model = trained.model()
    section = trained.config.data
    cache = ShardCache(cache_directory(section.cache), section.cache_bytes)
    reader = TokenReader(data, trained.data_store, cache=cache)
    length = trained.config.data.sequence_length
    batch = max(1, _BATCH_TOKENS // length)
    chosen = held_out_rows(data, length, rows)
    nats: list[float] = []
    while len(nats) < len(chosen):
        some = chosen[len(nats) : len(nats) + batch]
        part = read_held_out(data, reader, some, (len(some), length), ignored=IGNORED)
        nats += _nats_of_rows(model, part)
        on_rows(len(nats), len(chosen))
    found = mean_loss(chosen, nats, [source.name for source in data.sources])
    tokens = sum(row.end - row.start for row in chosen)
    bytes_per_token = data.held_out_bytes / data.tokens("held_out")
    return Evaluation(
        step=trained.chosen.manifest.step,
        loss=found.loss,
        perplexity=math.exp(min(found.loss, 700.0)),
        bits_per_byte=found.loss / math.log(2) / bytes_per_token,
        tokens=tokens,
        bytes=round(tokens * bytes_per_token),
        loss_by_source={name: loss for name, (_, loss) in found.by_source.items()},
    )


@torch.inference_mode()
def _nats_of_rows(model: Transformer, part: HeldOutBatch) -> list[float]:
    """Cross-entropy of each row in nats, summed over the targets that are not `IGNORED`."""
    device = model.output_weight.device
    sums = model(part.inputs_BT.to(device), part.targets_BT.to(device))
    assert isinstance(sums, LossSums)
    nats: list[float] = sums.of_rows(part.targets_BT.shape[0]).tolist()
    return nats


@dataclass(frozen=True)
class TextModel:
    """A model with its tokenizer."""

    model: Transformer
    tokenizer: Tokenizer
    end_token_id: int
    context_length: int


def open_exported(directory: Path) -> TextModel:
    """The model in a directory that `export` wrote. Raises `ConfigError` if it cannot be read."""
    model = model_export.load_exported(directory)
    tokenizer = load_tokenizer_file(directory / "tokenizer.json")
    _, end_id = end_token(tokenizer, origin=str(directory / "tokenizer.json"))
    length = json.loads((directory / "config.json").read_text())["max_position_embeddings"]
    return TextModel(model, tokenizer, end_id, int(length))


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled."""

    max_tokens: int
    temperature: float
    top_k: int
    seed: int


def continue_text(text_model: TextModel, prompt: str, sampling: Sampling) -> str:
    """The model's continuation of `prompt`; an empty prompt is the start of a document."""
    token_ids = text_model.tokenizer.encode(prompt, add_special_tokens=False).ids
    new = model_generate.generate(
        text_model.model,
        token_ids or [text_model.end_token_id],
        max_new_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop_token=text_model.end_token_id,
        context_length=text_model.context_length,
    )
    text: str = text_model.tokenizer.decode(new)
    return text


def export(trained: Trained, out: Path) -> None:
    """Write the model and its tokenizer as a Hugging Face directory. Raises `ConfigError` if `out` is not new or empty."""
    # This checks the tokenizer's hash before its bytes are copied.
    load_tokenizer(trained.data_store, trained.data)
    model_export.export(
        checkpoint_digest.iterate_weights(trained.store, trained.chosen.manifest),
        trained.config.model,
        trained.data.vocab_size,
        trained.data_store.read(trained.data.tokenizer_key),
        out,
        context_length=trained.config.data.sequence_length,
        end_of_text=trained.data.end_token,
    )
