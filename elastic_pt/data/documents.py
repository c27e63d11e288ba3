"""Readers: from what a user names to a stream of documents, one at a time, in one fixed order.

A source is a name and some paths. A path is a file, a folder (read recursively) or an fsspec URL of
either. Files of a folder come in the order of their names, whatever the listing says.

| suffix                        | documents                                                         |
| ----------------------------- | ----------------------------------------------------------------- |
| .txt .md .py                  | the file; a large one in pieces of at most 64 KiB, cut where a paragraph or line ends |
| .jsonl (.jsonl.gz, .jsonl.zst)| each line: the string in the field `text`                         |
| .parquet                      | each row: the string in the column `text`                         |

`list_files` looks at the names alone: a file of a folder that cannot be read at all (another suffix, a
pipe) is named there with its reason. `read_documents` reads what was listed: what cannot be a document
(invalid UTF-8, a broken line, an empty text) comes out as a `Skip` with its reason. What makes a whole
file unusable is a `DataError`.

Time is linear in the bytes, uncompressed, whatever they hold. Memory is that of the names of the files and of one
document, which has at most 16 MiB; a longer one is skipped, and held only if it is the row of a table.
"""

import codecs
import gzip
import io
import json
import math
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any

import fsspec
import pyarrow
import pyarrow.parquet

from elastic_pt.errors import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DEFAULT_SOURCE_NAME = "corpus"
PIECE_BYTES = 64 * 1024
"""Longest document taken from a plain-text file, so that one large file can be split and held out from."""
DOCUMENT_BYTES_MAX = 16 * 2**20
"""Longest line of a JSON-lines file and longest text of a Parquet row. Parsing JSON takes many times as much memory at
worst, and nothing can interrupt it."""
PARQUET_BATCH_ROWS = 256
PARQUET_BATCH_BYTES = 64 * 2**20
"""What the rows of one batch may take if each were as large as all of its row group's texts together."""
READ_BYTES = 2**20

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

    url: str
    """The file it comes from."""
    text: str


@dataclass(frozen=True)
class Skip:
    """One document that is left out, or a whole file."""

    url: str
    reason: str


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, on its file system."""

    path: str
    """As the file system lists it: an S3 key is no path, so `//` and `.` in it stay."""
    url: str
    """What errors call it."""
    suffix: str
    file_system: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class SourceFiles:
    """The files of one source, in the order in which they are read."""

    spec: SourceSpec
    files: tuple[SourceFile, ...]
    left_out: tuple[Skip, ...]
    """Files that cannot hold a document of the source."""
    incidental: frozenset[str]
    """URLs in `left_out` that are hidden (a name with a leading dot) or empty, so that no text is lost."""


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
            raise DataError(f"source {text!r}: weight {weighted[2]}; expected a positive number")
    if not path.strip():
        raise DataError(f"source {text!r}: no path; expected PATH, NAME=PATH or NAME=PATH@WEIGHT")
    return SourceSpec(name=name, paths=(path,), weight=weight)


def merge_sources(specs: Sequence[SourceSpec]) -> tuple[SourceSpec, ...]:
    """Join sources of the same name, in order of first mention. `DataError` if they contradict each other."""
    if not specs:
        raise DataError("sources = []: expected at least one file, folder or URL")
    merged: dict[str, SourceSpec] = {}
    for spec in specs:
        if not re.fullmatch(_NAME, spec.name):
            raise DataError(f"source name {spec.name!r}: expected letters, digits, _ and -")
        known = merged.setdefault(spec.name, spec)
        if known is spec:
            continue
        weights = {weight for weight in (known.weight, spec.weight) if weight is not None}
        if len(weights) > 1:
            raise DataError(f"source {spec.name}: weights {sorted(weights)}; expected one weight")
        joined = replace(known, paths=known.paths + spec.paths, weight=next(iter(weights), None))
        if replace(spec, paths=joined.paths, weight=joined.weight) != joined:
            raise DataError(
                f"source {spec.name}: given twice with different filters; expected one set"
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


def list_files(spec: SourceSpec) -> SourceFiles:
    """The files of a source by their names alone. `DataError` if a path is missing or holds none."""
    files: list[SourceFile] = []
    left_out: list[Skip] = []
    incidental: set[str] = set()
    for path in spec.paths:
        found = _found_files(path)
        known = len(files)
        for listed in found:
            if set(listed.parts[:-1]) & set(spec.exclude_folders):
                continue
            suffix = _suffix(listed.name, spec.suffixes)
            reason = listed.trouble or _unreadable(listed, suffix)
            if suffix is not None and not reason:
                files.append(SourceFile(listed.path, listed.url, suffix, listed.file_system))
            elif spec.suffixes == SUFFIXES:  # else the source asks for some files of the folder
                left_out.append(Skip(listed.url, reason))
                if listed.is_empty or any(part.startswith(".") for part in listed.parts):
                    incidental.add(listed.url)
        if len(files) == known:
            raise DataError(
                f"source {path}: no file with a suffix of {' '.join(spec.suffixes)} among {len(found)} files; "
                "expected at least one"
            )
    return SourceFiles(spec, tuple(files), tuple(left_out), frozenset(incidental))


def _unreadable(listed: "_Listed", suffix: str | None) -> str:
    """Why a file cannot be read, by its name and size."""
    if suffix is None:
        return "unknown_suffix"
    if listed.name.startswith("._"):  # what macOS writes beside a file on a foreign file system
        return "resource_fork"
    is_plain = suffix in TEXT_SUFFIXES or suffix == ".jsonl"
    return "empty_file" if listed.is_empty and not is_plain else ""


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


@dataclass(frozen=True)
class _Listed:
    """What a file system says of one name."""

    path: str
    parts: tuple[str, ...]
    """Names below the folder that was asked for, the file's own last."""
    trouble: str
    """Why it cannot be opened; empty if it can."""
    is_empty: bool
    file_system: Any

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def url(self) -> str:
        url: str = self.file_system.unstrip_protocol(self.path)
        return url


def location(path: str) -> str:
    """The URL of a source's file or folder, without a trailing slash. `DataError` if nobody serves it."""
    try:
        file_system, root = fsspec.core.url_to_fs(path)
        url: str = file_system.unstrip_protocol(root.rstrip("/"))
    except Exception as error:  # a file system of fsspec raises whatever its SDK does
        raise _no_source(path, error) from error
    return url


def _found_files(path: str) -> list[_Listed]:
    """The file itself, or the files below a folder in the order of their names."""
    try:
        file_system, root = fsspec.core.url_to_fs(path)
        is_folder = file_system.isdir(root)
        exists = is_folder or file_system.exists(root)
        if is_folder and not path.endswith("/") and _is_object(file_system, root):
            raise DataError(
                f"source {path}: an object, and a folder of others; expected {path}/ for these, "
                "or another name for the object"
            )
        if is_folder:
            return _below(file_system, root)
        is_file = exists and file_system.isfile(root)
    except DataError:
        raise
    except Exception as error:
        raise _no_source(path, error) from error
    if not exists:
        raise DataError(f"source {path}: does not exist; expected a file, folder or URL")
    if not is_file:
        raise DataError(
            f"source {path}: a pipe or device; expected a file, since it is read several times"
        )
    name = root.rpartition("/")[2]
    if _suffix(name, SUFFIXES) is None:
        raise DataError(f"source {path}: unknown suffix; expected one of {' '.join(SUFFIXES)}")
    return [_Listed(root, (name,), "", False, file_system)]


def _no_source(path: str, error: Exception) -> DataError:
    return DataError(f"source {path}: {_one_line(error)}; expected a file, folder or URL")


def _is_object(file_system: Any, root: str) -> bool:
    """Whether an S3 key is an object with bytes, whatever has it for a prefix."""
    if not hasattr(file_system, "call_s3") or "/" not in root:
        return False
    bucket, _, key = root.partition("/")
    try:
        return bool(file_system.call_s3("head_object", Bucket=bucket, Key=key)["ContentLength"])
    except (FileNotFoundError, PermissionError):
        return False


def _below(file_system: Any, root: str) -> list[_Listed]:
    """The files below a folder in the order of their names."""
    found = _find(file_system, root)
    insides = {listed: listed.removeprefix(root.rstrip("/")).removeprefix("/") for listed in found}
    # On S3 a key may be an object and, for others, a folder: then it cannot be opened.
    folders = {inside[:end] for inside in insides.values() for end in _slashes(inside)}
    below: list[_Listed] = []
    for listed, info in found.items():
        inside = insides[listed]
        is_empty = info.get("size") == 0 and info["type"] == "file"
        # The key of a folder, an empty object that S3 consoles and other tools write.
        if not inside or (inside.endswith("/") and info.get("size") == 0):
            continue
        is_file = info["type"] == "file"
        if info["type"] == "other":  # the listing does not say what a link leads to
            is_file = file_system.isfile(listed)
        trouble = "" if is_file else "not_a_file"
        if inside in folders or inside.endswith("/") or _is_taken_apart(file_system, listed):
            trouble = "unreadable_key"
        below.append(_Listed(listed, tuple(inside.split("/")), trouble, is_empty, file_system))
    # As tuples of names, so that a/b comes before a-b on every file system.
    return sorted(below, key=lambda each: each.parts)


def _slashes(inside: str) -> Iterator[int]:
    return (number for number, character in enumerate(inside) if character == "/")


def _is_taken_apart(file_system: Any, listed: str) -> bool:
    """Whether s3fs takes a part of the key for the version of an object."""
    if not hasattr(file_system, "call_s3"):
        return False
    bucket, key, _ = file_system.split_path(listed)
    return f"{bucket}/{key}" != listed


def _find(file_system: Any, root: str) -> dict[str, dict[str, Any]]:
    """What is below a folder. Raises what the file system raises for a folder that it cannot list."""
    if file_system.async_impl:  # one flat listing, which has no part that could fail alone
        listing: dict[str, dict[str, Any]] = file_system.find(root, detail=True)
        return listing
    # The library's own walk passes over a folder that it cannot list.
    found: dict[str, dict[str, Any]] = {}
    folders = [root]
    while folders:
        folder = folders.pop()
        for info in file_system.ls(folder, detail=True):
            if info["type"] != "directory":
                found[info["name"]] = info
            elif info["name"].rstrip("/") != folder.rstrip("/"):
                folders.append(info["name"])
    return found


def _suffix(name: str, suffixes: tuple[str, ...]) -> str | None:
    return next((suffix for suffix in suffixes if name.lower().endswith(suffix)), None)


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
            f"{file.url}: cannot be read to its end: {_one_line(error)}; expected a whole {file.suffix} file"
        ) from error


def _buffered(stream: Any) -> IO[bytes]:
    """A stream that reads as much as it is asked for, which those of fsspec need not, and lines without copying blocks."""
    return io.BufferedReader(stream, READ_BYTES)


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
    """Lines with their ends; None for one of more than `DOCUMENT_BYTES_MAX`, which is never held whole."""
    while line := stream.readline(DOCUMENT_BYTES_MAX + 1):
        if len(line) <= DOCUMENT_BYTES_MAX:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(READ_BYTES)
        yield None


def _json_documents(lines: Iterator[bytes | None], file: SourceFile) -> Iterator[Document | Skip]:
    """One document per line; blank lines count for nothing."""
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
    """Rows of one batch: any one of them may be as large as the group, and all of them if it is in a dictionary."""
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
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return Skip(file.url, "invalid_utf8")
    return Document(file.url, value) if size <= DOCUMENT_BYTES_MAX else Skip(file.url, "too_long")


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]
