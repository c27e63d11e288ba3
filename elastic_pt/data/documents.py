"""Read documents from files, one at a time, in one fixed order.

| suffix                        | documents                                                         |
| ----------------------------- | ----------------------------------------------------------------- |
| .txt .md .py                  | the file; a large one in pieces of at most 64 KiB, cut after a paragraph or line |
| .jsonl (.jsonl.gz, .jsonl.zst)| each line: the string in the field `text`                         |
| .parquet                      | each row: the string in the column `text`                         |

A text that cannot be a document (invalid UTF-8, a broken line, an empty text) gives a `Skip` with its reason.
A file that cannot be used as a whole raises `DataError`.

Time is linear in the uncompressed bytes, for any content. One document is in memory at a time, of at most 16 MiB.
A longer one is skipped; it is held in memory only if it is a row of a table.
"""

import codecs
import gzip
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from elastic_pt.data.sources import (
    JSON_SUFFIXES,
    TEXT_SUFFIXES,
    Skip,
    SourceFile,
    SourceFiles,
    one_line,
)
from elastic_pt.errors import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE_BYTES = 64 * 1024
"""Longest document from a plain-text file. A large file gives several documents, of which some can be held out."""
DOCUMENT_BYTES_MAX = 16 * 2**20
"""Longest line of a JSON-lines file and longest text of a Parquet row. At worst, parsing JSON takes many times that
memory, and it cannot be interrupted."""
PARQUET_BATCH_ROWS = 256
PARQUET_BATCH_BYTES = 64 * 2**20
"""Limit of a batch, counting each row as if it were as large as all texts of its row group together."""
READ_BYTES = 2**20


@dataclass(frozen=True)
class Document:
    """A text that can be tokenized: not empty, and valid Unicode."""

    url: str
    """The file that holds it."""
    text: str


def read_documents(source: SourceFiles) -> Iterator[Document | Skip]:
    """All documents of a source, one in memory at a time, always in the same order."""
    characters, limit = 0, source.spec.limit_characters
    for file in source.files:
        for found in _read_file(file):
            if isinstance(found, Document) and limit is not None:
                characters += len(found.text)
                if characters > limit:
                    return
            yield found


def _read_file(file: SourceFile) -> Iterator[Document | Skip]:
    try:
        with file.file_system.open(file.path, "rb") as stream:
            if file.suffix in TEXT_SUFFIXES:
                yield from (_document(piece, file) for piece in _pieces(_buffered(stream)))
            elif file.suffix in JSON_SUFFIXES:
                with _decompressed(stream, file.suffix) as plain:
                    yield from _json_documents(_lines(_buffered(plain)), file)
            else:
                yield from _parquet_documents(stream, file)
    except DataError:
        raise
    except Exception as error:  # pyarrow, zstd and the SDKs below fsspec share no base class
        raise DataError(
            f"{file.url}: cannot be read to its end: {one_line(error)}; expected a whole {file.suffix} file"
        ) from error


def _buffered(stream: Any) -> IO[bytes]:
    """A stream that returns the requested size (an fsspec one may return less) and reads lines without copying."""
    return io.BufferedReader(stream, READ_BYTES)


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    """Cut a text within each 64 KiB: after the last blank line, else the last line end, else the last character."""
    rest = stream.read(PIECE_BYTES).removeprefix(codecs.BOM_UTF8)
    if not rest:
        yield b""
    while rest:
        rest += stream.read(PIECE_BYTES + 1 - len(rest))
        if len(rest) <= PIECE_BYTES:
            yield rest
            return
        end = rest.rfind(b"\n\n", 0, PIECE_BYTES) + 2
        if end < 2:
            end = rest.rfind(b"\n", 0, PIECE_BYTES) + 1
        if end < 1:
            end = PIECE_BYTES
            while end > PIECE_BYTES - 4 and rest[end] & 0b1100_0000 == 0b1000_0000:
                end -= 1
        yield rest[:end]
        rest = rest[end:]


def _document(data: bytes, file: SourceFile) -> Document | Skip:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Skip(file.url, "invalid_utf8")
    return _text_document(text, file)


def _decompressed(stream: IO[bytes], suffix: str) -> Any:
    if suffix.endswith(".gz"):
        return gzip.GzipFile(fileobj=stream)
    if suffix.endswith(".zst"):
        return zstd.ZstdFile(stream)
    return stream


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines with their line ends; None for a line longer than `DOCUMENT_BYTES_MAX`, which is never held as a whole."""
    while line := stream.readline(DOCUMENT_BYTES_MAX + 1):
        if len(line) <= DOCUMENT_BYTES_MAX:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(READ_BYTES)
        yield None


def _json_documents(lines: Iterator[bytes | None], file: SourceFile) -> Iterator[Document | Skip]:
    """One document per line; blank lines are ignored."""
    texts, fields = 0, set[str]()
    for line in lines:
        if line is None:
            yield Skip(file.url, "too_long")
            continue
        if line.isspace():
            continue
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            yield Skip(file.url, "invalid_utf8")
        except (ValueError, RecursionError):
            yield Skip(file.url, "broken_json")
        else:
            if isinstance(value, dict) and "text" not in value:
                fields.update(list(value)[: 20 - len(fields)])
                yield Skip(file.url, "no_text")
            elif not isinstance(value, dict):
                yield Skip(file.url, "not_an_object")
            else:
                texts += 1
                yield _text_document(value["text"], file)
    if fields and not texts:
        found = ", ".join(sorted(fields)) or "none"
        raise DataError(
            f"{file.url}: no line has a field text (found: {found}); expected a string there"
        )


def _parquet_documents(stream: IO[bytes], file: SourceFile) -> Iterator[Document | Skip]:
    # With a buffer size, a column is read page by page instead of a whole row group at once.
    table = pyarrow.parquet.ParquetFile(stream, buffer_size=READ_BYTES, pre_buffer=False)
    if "text" not in table.schema_arrow.names:
        found = ", ".join(table.schema_arrow.names[:20]) or "none"
        raise DataError(f"{file.url}: no column text (found: {found}); expected strings there")
    holds_text = _is_text(table.schema_arrow.field("text").type)
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        if not holds_text:
            yield from (Skip(file.url, "text_is_no_string") for _ in range(group.num_rows))
            continue
        rows = _batch_rows(group)
        for batch in table.iter_batches(batch_size=rows, row_groups=[number], columns=["text"]):
            for value in batch.column(0):
                yield _row_document(value, file)


def _is_text(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _batch_rows(group: pyarrow.parquet.RowGroupMetaData) -> int:
    """Rows per batch. One row may be as large as the whole row group; with a dictionary, all rows may be."""
    columns = (group.column(number) for number in range(group.num_columns))
    in_text: int = sum(
        each.total_uncompressed_size for each in columns if each.path_in_schema == "text"
    )
    return max(1, min(PARQUET_BATCH_ROWS, PARQUET_BATCH_BYTES // max(1, in_text)))


def _row_document(value: pyarrow.Scalar, file: SourceFile) -> Document | Skip:
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return Skip(file.url, "invalid_utf8")
    return _text_document(text, file)


def _text_document(value: object, file: SourceFile) -> Document | Skip:
    if not isinstance(value, str):
        return Skip(file.url, "text_is_no_string")
    if not value or value.isspace():
        return Skip(file.url, "empty")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:  # a lone surrogate, which JSON can contain
        return Skip(file.url, "invalid_utf8")
    return Document(file.url, value) if size <= DOCUMENT_BYTES_MAX else Skip(file.url, "too_long")
