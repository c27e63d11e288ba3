"""Find the files of the user's sources, in one fixed order.

A source is a name and some paths. A path is a file, a folder (read recursively) or an fsspec URL of
either. Files of a folder are in the order of their names, independent of the order of the listing.

    PATH, NAME=PATH@WEIGHT ─► SourceSpec ─► list_files ─► SourceFiles ─► documents.read_documents

This module reads only names and sizes. A file of a folder that cannot be read at all (another suffix, a
pipe) is listed with the reason. Memory grows only with the names.
"""

import math
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec

from elastic_pt.errors import DataError

DEFAULT_SOURCE_NAME = "corpus"
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
    """Suffixes of the files of a folder that are read."""
    exclude_folders: tuple[str, ...] = ()
    """Names of folders that are skipped, at any depth."""
    limit_characters: int | None = None
    """Stop before the document that would go beyond this many characters."""


@dataclass(frozen=True)
class Skip:
    """One document that is left out, or a whole file."""

    url: str
    reason: str


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, on its file system."""

    path: str
    """As the file system lists it: an S3 key is not a path, so `//` and `.` in it are kept."""
    url: str
    """The file's name in errors."""
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
    """URLs in `left_out` that are hidden (a name with a leading dot) or empty. Leaving them out loses no text."""


def parse_source(text: str) -> SourceSpec:
    """Read one command-line source: `PATH`, `NAME=PATH` or `NAME=PATH@WEIGHT`.

    A name has only letters, digits, `_` and `-`, so the `=` in a URL or in `./lang=en` does not end a name. Only a
    named source can have a weight: a number after the last `@`. So `s3://a@b/c=1` is a path.
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
    """The files of a source. Opens none of them. Raises `DataError` if a path is missing or has no readable file."""
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
            elif spec.suffixes == SUFFIXES:  # otherwise the user wants only some files
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
    """Why a file cannot be read, judged by its name and size; empty if it can."""
    if suffix is None:
        return "unknown_suffix"
    if listed.name.startswith("._"):  # macOS writes these on foreign file systems
        return "resource_fork"
    is_plain = suffix in TEXT_SUFFIXES or suffix == ".jsonl"
    return "empty_file" if listed.is_empty and not is_plain else ""


@dataclass(frozen=True)
class _Listed:
    """One file in a listing."""

    path: str
    parts: tuple[str, ...]
    """The parts of the path below the listed folder; the last one is the file's name."""
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
    """The URL of a source's file or folder, without a trailing slash. `DataError` if no file system serves it."""
    try:
        file_system, root = fsspec.core.url_to_fs(path)
        url: str = file_system.unstrip_protocol(root.rstrip("/"))
    except Exception as error:  # fsspec passes on the exceptions of each SDK
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
                f"source {path}: both an object and a folder; expected {path}/ for the folder, "
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
    return DataError(f"source {path}: {one_line(error)}; expected a file, folder or URL")


def _is_object(file_system: Any, root: str) -> bool:
    """True if an S3 key is an object that is not empty, even if other keys have it as prefix."""
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
    # On S3 a key may be both an object and the folder of other keys. Such an object cannot be opened.
    folders = {inside[:end] for inside in insides.values() for end in _slashes(inside)}
    below: list[_Listed] = []
    for listed, info in found.items():
        inside = insides[listed]
        is_empty = info.get("size") == 0 and info["type"] == "file"
        # An empty object for a folder, as S3 consoles and other tools write it.
        if not inside or (inside.endswith("/") and info.get("size") == 0):
            continue
        is_file = info["type"] == "file"
        if info["type"] == "other":  # may be a link: the listing lacks its target's type
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
    """True if s3fs would parse a part of the key as the version of an object."""
    if not hasattr(file_system, "call_s3"):
        return False
    bucket, key, _ = file_system.split_path(listed)
    return f"{bucket}/{key}" != listed


def _find(file_system: Any, root: str) -> dict[str, dict[str, Any]]:
    """All files below a folder. For a folder that cannot be listed, raises the file system's error."""
    if file_system.async_impl:  # one flat listing: it fails as a whole or not at all
        listing: dict[str, dict[str, Any]] = file_system.find(root, detail=True)
        return listing
    # Not fsspec's own walk: it silently skips a folder that it cannot list.
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


def one_line(error: BaseException) -> str:
    """The first line of a foreign error, or its type if it has no text."""
    return (str(error) or type(error).__name__).splitlines()[0][:160]
