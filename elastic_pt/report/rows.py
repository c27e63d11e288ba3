"""The rows of a run as text: one row token by token, or the documents in all rows of a step."""

from collections.abc import Iterator
from dataclasses import dataclass

from elastic_pt.data.stored_documents import EXCERPT_TOKENS, excerpt, pieces, row_parts
from elastic_pt.errors import ConfigError
from elastic_pt.report.reads import Reads


@dataclass(frozen=True)
class Piece:
    """The text of a token, or of the tokens that have parts of one character."""

    ids: list[int]
    text: str


@dataclass(frozen=True)
class ShownRow:
    """A row, token by token."""

    source: str
    row: int
    tokens: tuple[int, int]
    """Its first token's place in the stream, and the place after its last token."""
    files: tuple[str, ...]
    """The shards that have it."""
    pieces: tuple[Piece, ...]


def show_row(reads: Reads, text: str) -> ShownRow:
    """The row that `SOURCE:ROW` names."""
    name, _, number = text.rpartition(":")
    names = [source.name for source in reads.manifest.sources]
    if name not in names or not (number.isascii() and number.isdigit()):
        raise ConfigError(f"--show {text}: expected SOURCE:ROW with a source of {', '.join(names)}")
    source, row = names.index(name), int(number)
    rows = reads.plan.rows_per_source[source]
    if row >= rows:
        raise ConfigError(
            f"--show {text}: source {name} has {rows} rows of {reads.plan.sequence_length} tokens; "
            f"expected a row from 0 to {rows - 1}"
        )
    tokens = reads.tokens_of(row)
    (ids,) = reads.tokens.windows([(source, tokens)])
    files = tuple(placed.shard.key for placed in reads.tokens.shards_of(source, tokens))
    found = tuple(Piece(*each) for each in pieces(ids.tolist(), reads.decode))
    return ShownRow(name, row, (tokens.start, tokens.stop), files, found)


@dataclass(frozen=True)
class DocumentPart:
    """A document, or the part of one that a row has."""

    begins: bool
    """Whether it begins in the row."""
    text: str
    """Its first words."""


@dataclass(frozen=True)
class ReadRow:
    """A row that a step reads."""

    slot: int
    source: str
    row: int
    documents: tuple[DocumentPart, ...]


def read_step(reads: Reads, step: int) -> Iterator[ReadRow]:
    """The rows of a step (counted from 1), slot after slot."""
    plan, micro_batch = reads.plan, reads.config.train.micro_batch
    rows = plan.slot_rows(step - 1, range(plan.global_batch // micro_batch), micro_batch)
    end_id = reads.manifest.end_token_id
    # With the token before each row, which may end a document.
    wanted = [(source, reads.tokens_of(row)) for source, row in rows]
    wanted = [(source, range(max(0, each.start - 1), each.stop)) for source, each in wanted]
    read = reads.tokens.windows(wanted)
    for place, ((source, row), ids) in enumerate(zip(rows, read, strict=True)):
        begins = row == 0 or int(ids[0]) == end_id
        parts = list(row_parts(ids[row > 0 :], end_id, begins=begins))
        texts = reads.decode([part.ids[:EXCERPT_TOKENS].tolist() for part in parts])
        yield ReadRow(
            place // micro_batch,
            reads.manifest.sources[source].name,
            row,
            tuple(
                DocumentPart(
                    part.begins,
                    excerpt(
                        text, is_cut=len(part.ids) > EXCERPT_TOKENS or int(part.ids[-1]) != end_id
                    ),
                )
                for part, text in zip(parts, texts, strict=True)
            ),
        )
