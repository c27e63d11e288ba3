"""How prepared data is completed: the weights of its sources, what was left out, its tokenizer and, last, its manifest.

Runs in the process of `prepare` and `convert`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from tokenizers import Tokenizer

from elastic_pt.data.left_out import LEFT_OUT_KEY, SourceLosses, count_by_reason
from elastic_pt.data.manifest import MANIFEST_KEY, SCHEMA, Manifest, Source, TokenType
from elastic_pt.data.order import PERIOD_MAX, whole_weights
from elastic_pt.data.shard_writer import HASH_CHARACTERS
from elastic_pt.data.tokenizer import end_token, tokenizer_bytes, vocabulary_size
from elastic_pt.errors import AccessDenied, AlreadyExists, DataError, NotFound
from elastic_pt.store.port import NoAtomicCreate, Store


def require_empty(out: Store) -> None:
    """Refuse a place that already holds prepared data."""
    if out.size(MANIFEST_KEY) is not None:
        raise _occupied(out)


def require_writable(out: Store) -> None:
    """Refuse a place that cannot be written, before the work begins."""
    try:
        out.write(LEFT_OUT_KEY, b"")
    except (NotFound, AccessDenied) as error:
        raise DataError(f"{error}; expected a place that can be written") from error


def token_type(tokenizer: Tokenizer) -> TokenType:
    """The smallest type that holds every id."""
    return "uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32"


def publish(
    out: Store,
    tokenizer: Tokenizer,
    sources: Sequence[Source],
    losses: Sequence[SourceLosses],
    *,
    held_out: float,
    block_tokens: int,
) -> Manifest:
    """Write the last files of sources whose shards are written, with their weights; returns the manifest.

    `losses` has for each source what the user asked for and what was left out. Raises `DataError` if `out` holds prepared data by now.
    """
    lines = [line + "\n" for each in losses for line in each.lines()]
    out.write(LEFT_OUT_KEY, "".join(lines).encode("ascii"))
    tokenizer_data = tokenizer_bytes(tokenizer)
    tokenizer_sha256 = hashlib.sha256(tokenizer_data).hexdigest()
    tokenizer_key = f"tokenizer-{tokenizer_sha256[:HASH_CHARACTERS]}.json"
    out.write(tokenizer_key, tokenizer_data)
    end, end_id = end_token(tokenizer)
    weights = shares(
        [each.source.spec.weight for each in losses], [each.tokens("train") for each in sources]
    )
    manifest = Manifest(
        vocab_size=vocabulary_size(tokenizer),
        token_type=token_type(tokenizer),
        end_token=end,
        end_token_id=end_id,
        tokenizer_key=tokenizer_key,
        tokenizer_sha256=tokenizer_sha256,
        held_out_share=float(held_out),
        sources=tuple(
            replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True)
        ),
        skipped=count_by_reason(losses),
        schema=SCHEMA,
        block_tokens=block_tokens,
    )
    _write_manifest(out, manifest)
    return manifest


def shares(wanted: Sequence[float | None], tokens: Sequence[int]) -> list[float]:
    """Weights that sum to 1: the wanted ones, and shares by tokens for sources without one.

    If all sources have a weight, the weights are relative. If only some have one, these are shares of the
    whole, and the others divide the rest by their tokens. Raises `DataError` if there is no rest.
    """
    given = sum(weight for weight in wanted if weight is not None)
    open_tokens = sum(count for weight, count in zip(wanted, tokens, strict=True) if weight is None)
    if open_tokens and given >= 1:
        raise DataError(
            f"weights {[weight for weight in wanted if weight is not None]} leave no share for the sources "
            "without one; expected weights that sum to less than 1, or a weight for every source"
        )
    raw = [
        weight if weight is not None else (1 - given) * count / open_tokens
        for weight, count in zip(wanted, tokens, strict=True)
    ]
    # A very small source still needs a weight that a mixture can represent.
    total = sum(raw)
    whole = whole_weights(
        [
            share if weight is not None else max(share, 2 * total / PERIOD_MAX)
            for share, weight in zip(raw, wanted, strict=True)
        ]
    )
    return [rows / sum(whole) for rows in whole]


def _write_manifest(out: Store, manifest: Manifest) -> None:
    try:
        out.create(MANIFEST_KEY, manifest.to_json())
    except AlreadyExists as error:
        raise _occupied(out) from error
    except NoAtomicCreate:
        # No harm if two writers race: the files of both are complete and never change, and the later manifest stays.
        require_empty(out)
        out.write(MANIFEST_KEY, manifest.to_json())


def _occupied(out: Store) -> DataError:
    return DataError(f"{out.url}: already holds prepared data; expected an empty directory")
