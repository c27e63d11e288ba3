"""Readers: from what a user names to a stream of documents, one at a time, in one fixed order.

A source is a name and some paths. A path is a file, a folder (read recursively) or an fsspec URL of
either. Files of a folder come in the order of their names, whatever the listing says.

| suffix                        | documents                                                         |
| ----------------------------- | ----------------------------------------------------------------- |
| .txt .md .py                  | the file; a large one in pieces of at most 64 KiB, cut where a paragraph or line ends |
| .jsonl (.jsonl.gz, .jsonl.zst)| each line: the string in the field `text`                         |
| .parquet                      | each row: the string in the column `text`                         |

What cannot be a document (invalid UTF-8, a broken line, an empty text) comes out as a `Skip` with its
reason, so the caller counts it. What makes a whole file unusable is a `DataError`.
"""

import codecs
import gzip
import json
import math
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
import pyarrow
import pyarrow.parquet
import zstandard

from elastic_pt.errors import DataError

DEFAULT_SOURCE_NAME = "corpus"
PIECE_BYTES = 64 * 1024
"""Longest document taken from a plain-text file, so that one large file can be split and held out from."""
PARQUET_BATCH_ROWS = 256

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES

_NAME = r"[A-Za-z][A-Za-z0-9_-]*"
_NAMED = re.compile(rf"({_NAME})=(.*)", re.DOTALL)
_WEIGHTED = re.compile(r"(.*)@([+-]?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+|nan|inf))", re.DOTALL)


@dataclass(frozen=True)
class SourceSpec:
    """What a user asks for: a named part of the corpus."""

    name: str
    paths: tuple[str, ...]
    """Files, folders or fsspec URLs, read in this order."""
    weight: float | None = None
    """Wanted share of the mixture; None: the share of its tokens."""
    suffixes: tuple[str, ...] = SUFFIXES
    """Files of a folder that are read."""
    exclude_folders: tuple[str, ...] = ()
    """Folders that are passed over, by name, at any depth."""
    limit_characters: int | None = None
    """Stop before the document that would go beyond this many characters."""


@dataclass(frozen=True)
class Document:
    """A text that can be tokenized: not empty, and valid Unicode."""

    text: str


@dataclass(frozen=True)
class Skip:
    """Something that was left out, to be counted under `reason`."""

    reason: str


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, on its file system."""

    path: str
    url: str
    """What errors call it."""
    suffix: str
    file_system: Any = field(repr=False, compare=False)


def parse_source(text: str) -> SourceSpec:
    """Read one command-line source: `PATH`, `NAME=PATH` or `NAME=PATH@WEIGHT`.

    A name is letters, digits, `_` and `-`, so the `=` in a URL or in `./lang=en` starts no name. Only a
    named source has a weight, and only a number after the last `@` is one; so `s3://a@b/c=1` is a path.
    Unnamed paths all belong to the source `corpus`.
    """
    named = _NAMED.fullmatch(text)
    name, path = (named[1], named[2]) if named else (DEFAULT_SOURCE_NAME, text)
    weighted = _WEIGHTED.fullmatch(path) if named else None
    weight = None
    if weighted:
        path, weight = weighted[1], float(weighted[2])
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(
                f"source {text!r}: weight {weighted[2]}; a positive number would be right"
            )
    if not path.strip():
        raise DataError(
            f"source {text!r}: no path; PATH, NAME=PATH or NAME=PATH@WEIGHT would be right"
        )
    return SourceSpec(name=name, paths=(path,), weight=weight)


def merge_sources(specs: Sequence[SourceSpec]) -> tuple[SourceSpec, ...]:
    """Join sources of the same name, in order of first mention. `DataError` if they contradict each other."""
    if not specs:
        raise DataError("sources = []: at least one file, folder or URL would be right")
    merged: dict[str, SourceSpec] = {}
    for spec in specs:
        if not re.fullmatch(_NAME, spec.name):
            raise DataError(f"source name {spec.name!r}: letters, digits, _ and - would be right")
        known = merged.setdefault(spec.name, spec)
        if known is spec:
            continue
        weights = {weight for weight in (known.weight, spec.weight) if weight is not None}
        if len(weights) > 1:
            raise DataError(
                f"source {spec.name}: weights {sorted(weights)}; one weight would be right"
            )
        joined = replace(known, paths=known.paths + spec.paths, weight=next(iter(weights), None))
        if replace(spec, paths=joined.paths, weight=joined.weight) != joined:
            raise DataError(
                f"source {spec.name}: given twice with different filters; one would be right"
            )
        merged[spec.name] = joined
    return tuple(merged.values())


def standard_library_source(limit_characters: int | None = None) -> SourceSpec:
    """The standard library of the running interpreter: real text that every machine has."""
    return SourceSpec(
        name="stdlib",
        paths=(sysconfig.get_paths()["stdlib"],),
        suffixes=(".py",),
        exclude_folders=("test", "tests", "idle_test", "site-packages", "dist-packages"),
        limit_characters=limit_characters,
    )


def read_documents(spec: SourceSpec) -> Iterator[Document | Skip]:
    """All documents of a source, one in memory at a time, always in the same order."""
    characters = 0
    for path in spec.paths:
        for item in _list_files(path, spec):
            for found in [item] if isinstance(item, Skip) else _read_file(item):
                if isinstance(found, Document) and spec.limit_characters is not None:
                    characters += len(found.text)
                    if characters > spec.limit_characters:
                        return
                yield found


def _list_files(path: str, spec: SourceSpec) -> list[SourceFile | Skip]:
    """The file itself, or the files below a folder in the order of their names."""
    try:
        file_system, root = fsspec.core.url_to_fs(path)
        is_folder = file_system.isdir(root)
        exists = is_folder or file_system.exists(root)
    except Exception as error:  # a file system of fsspec raises whatever its SDK does
        raise DataError(
            f"source {path}: {_one_line(error)}; a file, folder or URL would be right"
        ) from error
    if not exists:
        raise DataError(f"source {path}: does not exist; a file, folder or URL would be right")
    if not is_folder:
        suffix = _suffix(root, SUFFIXES)
        if suffix is None:
            raise DataError(
                f"source {path}: unknown suffix; one of {' '.join(SUFFIXES)} would be right"
            )
        return [SourceFile(root, path, suffix, file_system)]
    folder = PurePosixPath(root)
    # As tuples of names, so that a/b comes before a-b on every file system.
    below = sorted(
        PurePosixPath(found).relative_to(folder).parts for found in file_system.find(root)
    )
    files: list[SourceFile | Skip] = []
    for parts in below:
        if set(parts[:-1]) & set(spec.exclude_folders):
            continue
        suffix = _suffix(parts[-1], spec.suffixes)
        if suffix is not None:
            name = str(folder.joinpath(*parts))
            files.append(SourceFile(name, file_system.unstrip_protocol(name), suffix, file_system))
        elif spec.suffixes == SUFFIXES:
            files.append(Skip("unknown_suffix"))
    if not any(isinstance(item, SourceFile) for item in files):
        raise DataError(
            f"source {path}: no file with a suffix of {' '.join(spec.suffixes)} in this folder"
        )
    return files


def _suffix(name: str, suffixes: tuple[str, ...]) -> str | None:
    return next((suffix for suffix in suffixes if name.lower().endswith(suffix)), None)


def _read_file(file: SourceFile) -> Iterator[Document | Skip]:
    try:
        with file.file_system.open(file.path, "rb") as stream:
            if file.suffix in TEXT_SUFFIXES:
                yield from (_document(piece) for piece in _pieces(stream))
            elif file.suffix in JSON_SUFFIXES:
                with _decompressed(stream, file.suffix) as lines:
                    yield from _json_documents(lines, file)
            else:
                yield from _parquet_documents(stream, file)
    except DataError:
        raise
    except Exception as error:  # pyarrow, zstandard and the SDKs below fsspec share no base class
        raise DataError(f"{file.url}: cannot be read to its end: {_one_line(error)}") from error


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    """Cut a text after the last blank line, else line end, else character within each 64 KiB."""
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


def _document(data: bytes) -> Document | Skip:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Skip("invalid_utf8")
    return Document(text) if text.strip() else Skip("empty")


def _decompressed(stream: IO[bytes], suffix: str) -> Any:
    if suffix.endswith(".gz"):
        return gzip.GzipFile(fileobj=stream)
    if suffix.endswith(".zst"):
        return _ZstdLines(stream)
    return stream


class _ZstdLines:
    """Lines of a zstd stream that must end with a whole frame (the library's own reader takes a torn one)."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def __enter__(self) -> "_ZstdLines":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __iter__(self) -> Iterator[bytes]:
        rest, frame = b"", zstandard.ZstdDecompressor().decompressobj()
        started = False
        while block := self._stream.read(1 << 17):
            while block:
                rest += frame.decompress(block)
                started = True
                block = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, started = zstandard.ZstdDecompressor().decompressobj(), False
            *lines, rest = rest.split(b"\n")
            yield from lines
        if started:
            raise EOFError("the last zstd frame is cut off")
        if rest:
            yield rest


def _json_documents(lines: Any, file: SourceFile) -> Iterator[Document | Skip]:
    """One document per line; blank lines count for nothing."""
    texts, fields = 0, set[str]()
    for line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            yield Skip("invalid_utf8")
        except (ValueError, RecursionError):
            yield Skip("broken_json")
        else:
            if isinstance(value, dict) and "text" not in value:
                fields.update(list(value)[: 20 - len(fields)])
                yield Skip("no_text")
            elif not isinstance(value, dict):
                yield Skip("not_an_object")
            else:
                texts += 1
                yield _text_document(value["text"])
    if fields and not texts:
        found = ", ".join(sorted(fields)) or "none"
        raise DataError(
            f"{file.url}: no line has a field text (found: {found}); a string there would be right"
        )


def _parquet_documents(stream: IO[bytes], file: SourceFile) -> Iterator[Document | Skip]:
    table = pyarrow.parquet.ParquetFile(stream)
    if "text" not in table.schema_arrow.names:
        found = ", ".join(table.schema_arrow.names[:20]) or "none"
        raise DataError(
            f"{file.url}: no column text (found: {found}); strings there would be right"
        )
    for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=["text"]):
        column = batch.column(0)
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        for value in column:
            try:
                yield _text_document(value.as_py())
            except UnicodeDecodeError:
                yield Skip("invalid_utf8")


def _text_document(value: object) -> Document | Skip:
    if not isinstance(value, str):
        return Skip("text_is_no_string")
    if not value.strip():
        return Skip("empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return Skip("invalid_utf8")
    return Document(value)


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]
