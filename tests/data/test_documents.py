"""Reading a corpus: every format, a fixed order, and every kind of bad input."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.local import LocalFileSystem

from elastic_pt.data import documents
from elastic_pt.data.documents import PIECE_BYTES, Document, read_documents
from elastic_pt.data.sources import (
    Skip,
    SourceSpec,
    list_files,
    merge_sources,
    parse_source,
    standard_library_source,
)
from elastic_pt.errors import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LINES = b'{"text": "one"}\n\n{"text": "two", "id": 2}\n'


def read(path: Path | str) -> list[str]:
    """The texts of all documents, and `!reason` for each skip."""
    return [
        item.text if isinstance(item, Document) else f"!{item.reason}"
        for item in read_documents(list_files(SourceSpec("s", (str(path),))))
    ]


@pytest.mark.parametrize(
    ("text", "name", "path", "weight"),
    [
        ("a.txt", "corpus", "a.txt", None),
        ("wiki=a.txt", "wiki", "a.txt", None),
        ("wiki=a.txt@0.3", "wiki", "a.txt", 0.3),
        ("wiki=a.txt@1e-6", "wiki", "a.txt", 1e-6),
        ("a.txt@0.3", "corpus", "a.txt@0.3", None),
        ("s3://user@bucket/day=1/x.txt", "corpus", "s3://user@bucket/day=1/x.txt", None),
        ("w=s3://user@bucket/day=1@2", "w", "s3://user@bucket/day=1", 2.0),
        ("w=https://host/x.jsonl?a=b@c", "w", "https://host/x.jsonl?a=b@c", None),
        ("./lang=en", "corpus", "./lang=en", None),
        ("w=dump@2024/", "w", "dump@2024/", None),
        ("w=dump@2024@1", "w", "dump@2024", 1.0),
    ],
)
def test_a_source_is_a_path_with_an_optional_name_and_weight(
    text: str, name: str, path: str, weight: float | None
) -> None:
    """A `=` or `@` that belongs to a path or URL does not give a name or a weight."""
    assert parse_source(text) == SourceSpec(name, (path,), weight)


@pytest.mark.parametrize("text", ["", "w=", "w=@0.5", "w=a@0", "w=a@-1", "w=a@nan", "w=a@inf"])
def test_source_without_a_path_or_with_an_invalid_weight_is_refused(text: str) -> None:
    """A mistake in a source raises a `DataError` that quotes it."""
    with pytest.raises(DataError, match="expected"):
        parse_source(text)


def test_sources_of_one_name_are_joined_in_order() -> None:
    """A name may be repeated; its paths are read one after the other."""
    joined = merge_sources([parse_source(text) for text in ("w=a@0.5", "b.txt", "w=c")])
    assert joined == (SourceSpec("w", ("a", "c"), 0.5), SourceSpec("corpus", ("b.txt",)))


@pytest.mark.parametrize(
    "specs",
    [
        [],
        [parse_source("w=a@0.5"), parse_source("w=b@0.6")],
        [SourceSpec("../up", ("a",))],
        [SourceSpec("w", ("a",)), SourceSpec("w", ("b",), suffixes=(".py",))],
    ],
)
def test_sources_that_contradict_each_other_are_refused(specs: list[SourceSpec]) -> None:
    """One name has one weight and one filter, and is valid as the name of a folder."""
    with pytest.raises(DataError, match="expected"):
        merge_sources(specs)


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x.py", "X.TXT"])
def test_a_text_file_is_a_document(tmp_path: Path, name: str) -> None:
    """A plain text is read unchanged, except for its byte-order mark."""
    (tmp_path / name).write_bytes(b"\xef\xbb\xbfa\r\n\xc3\xa9")
    assert read(tmp_path / name) == ["a\r\né"]


@pytest.mark.parametrize(
    "text", ["p" * 999 + "\n\n", "line\n", "é", "a" * (PIECE_BYTES - 1) + "é", "\U0001f600"]
)
def test_large_text_is_cut_without_losing_a_byte(tmp_path: Path, text: str) -> None:
    """Pieces are valid text of at most 64 KiB, and join to the whole file."""
    whole = text * (300_000 // len(text.encode()))
    (tmp_path / "x.txt").write_text(whole, newline="")
    pieces = read(tmp_path / "x.txt")
    assert "".join(pieces) == whole
    assert max(len(piece.encode()) for piece in pieces) <= PIECE_BYTES
    if "\n" in text:
        assert all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl", LINES),
        ("x.jsonl", b"\xef\xbb\xbf" + LINES.rstrip()),
        ("x.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("x.jsonl.zst", zstd.compress(LINES)),
        ("x.jsonl.zst", zstd.compress(LINES[:20]) + zstd.compress(LINES[20:])),
    ],
)
def test_each_json_line_is_a_document(tmp_path: Path, name: str, data: bytes) -> None:
    """Compression and blank lines make no difference."""
    (tmp_path / name).write_bytes(data)
    assert read(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "string_view"])
def test_each_parquet_row_is_a_document(tmp_path: Path, kind: str) -> None:
    """The column `text` of any string type is read; a null is a counted skip."""
    plain = pyarrow.array(["one", None, "", "two"])
    if kind == "dictionary":
        column = plain.dictionary_encode()
    else:
        column = plain.cast(getattr(pyarrow, kind)())
    pyarrow.parquet.write_table(
        pyarrow.table({"id": [1, 2, 3, 4], "text": column}), tmp_path / "x.parquet"
    )
    assert read(tmp_path / "x.parquet") == ["one", "!text_is_no_string", "!empty", "two"]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("x.txt", b"\xff\xfeh\x00", "!invalid_utf8"),
        ("x.txt", b"", "!empty"),
        ("x.txt", b" \n\t", "!empty"),
        ("x.jsonl", b"\xff", "!invalid_utf8"),
        ("x.jsonl", b'{"text": "cut o', "!broken_json"),
        ("x.jsonl", b"[" * 100_000, "!broken_json"),
        ("x.jsonl", b"1" * 10_000, "!broken_json"),
        ("x.jsonl", b'["text"]', "!not_an_object"),
        ("x.jsonl", b'{"text": 5}', "!text_is_no_string"),
        ("x.jsonl", b'{"text": null}', "!text_is_no_string"),
        ("x.jsonl", b'{"text": ""}', "!empty"),
        ("x.jsonl", b'{"text": "\\ud800"}', "!invalid_utf8"),
        ("x.jsonl", b'{"id": 5}', "!no_text"),
    ],
)
def test_bad_document_is_skipped_with_its_reason(
    tmp_path: Path, name: str, data: bytes, expected: str
) -> None:
    """A bad document gives a skip with its reason, and the documents around it are read."""
    good = LINES if name == "x.jsonl" else b"fine"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(data + (b"\n" + good if name == "x.jsonl" else b""))
    (tmp_path / "folder" / "y.txt").write_bytes(b"fine")
    found = read(tmp_path / "folder")
    assert found[0] == expected
    assert found[1:] == (["one", "two", "fine"] if name == "x.jsonl" else ["fine"])


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("x.bin", b"", "unknown suffix"),
        ("x.jsonl", b'{"content": "a", "id": 1}\n', "found: content, id"),
        ("x.jsonl.gz", gzip.compress(LINES * 100, mtime=0)[:-9], "cannot be read to its end"),
        ("x.jsonl.gz", LINES, "cannot be read to its end"),
        ("x.jsonl.zst", zstd.compress(LINES)[:-3], "cannot be read to its end"),
        ("x.jsonl.zst", LINES, "cannot be read to its end"),
        ("x.parquet", b"PAR1", "cannot be read to its end"),
    ],
)
def test_unusable_file_is_an_error(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    """A truncated or foreign file never counts as a shorter corpus; the error names the file."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=told) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_a_text_column_is_an_error(tmp_path: Path) -> None:
    """The error lists the columns that are there."""
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: no column text \(found: content\)"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize("path", ["/nowhere/at/all", "nowhere.txt", "s4://bucket/x.txt"])
def test_a_missing_path_is_an_error(path: str) -> None:
    """A path that does not exist, or a URL of an unknown protocol, raises `DataError`."""
    with pytest.raises(DataError, match="expected"):
        read(path)


def test_a_folder_without_text_is_an_error(tmp_path: Path) -> None:
    """A folder without a readable file is a mistake, not an empty corpus."""
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="no file with a suffix"):
        read(tmp_path)


def test_unreadable_files_of_a_folder_are_listed(tmp_path: Path) -> None:
    """Files that cannot be read are listed with the reason; a link to a file is read as that file."""
    (tmp_path / "x.png").write_bytes(b"x")
    (tmp_path / ".hidden").write_bytes(b"x")
    (tmp_path / "y.txt").write_bytes(b"y")
    (tmp_path / "z.txt").symlink_to("y.txt")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    (tmp_path / "folder.txt").symlink_to(".")
    os.mkfifo(tmp_path / "pipe.txt")
    source = list_files(SourceSpec("s", (str(tmp_path),)))
    assert {item.url.rpartition("/")[2]: item.reason for item in source.left_out} == {
        ".hidden": "unknown_suffix",
        "broken.txt": "not_a_file",
        "folder.txt": "not_a_file",
        "pipe.txt": "not_a_file",
        "x.png": "unknown_suffix",
    }
    assert {url.rpartition("/")[2] for url in source.incidental} == {".hidden"}
    assert read(tmp_path) == ["y", "y"]


def test_pipe_is_refused_as_a_source(tmp_path: Path) -> None:
    """A pipe can be read only once, so it is refused; `prepare` does not wait for it."""
    os.mkfifo(tmp_path / "x.txt")
    with pytest.raises(DataError, match="a pipe or device"):
        read(tmp_path / "x.txt")


def test_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without read permission is an error, not an empty folder."""
    (tmp_path / "below").mkdir()
    (tmp_path / "y.txt").write_bytes(b"y")
    real = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"Permission denied.*expected"):
        read(tmp_path)


def test_bucket_keys_are_not_normalized_as_paths(moto_url: str) -> None:
    """Keys of folders are not files. `//` or `.` in a key is part of it. The order is that of the names."""
    bucket = fsspec.filesystem("s3")
    root = moto_url.removeprefix("s3://")
    keys = ["c/b.txt", "c//b.txt", "c/./b.txt", "c/a/x.jsonl", "c/a-b.txt", "other/c.txt"]
    for key in keys:
        text = json.dumps({"text": key}) if key.endswith("jsonl") else key
        bucket.call_s3("put_object", Bucket=root, Key=key, Body=text.encode())
    for key in ("c/", "c/a/", "c//", "c/empty/"):
        bucket.call_s3("put_object", Bucket=root, Key=key, Body=b"")
    expected = ["c//b.txt", "c/./b.txt", "c/a/x.jsonl", "c/a-b.txt", "c/b.txt"]
    assert read(f"{moto_url}/c") == read(f"{moto_url}/c/") == expected
    assert list_files(SourceSpec("s", (f"{moto_url}/c",))).left_out == ()


def test_keys_that_cannot_be_opened_are_listed(moto_url: str) -> None:
    """A key that is also a folder, ends like one, or would be split by s3fs is listed as left out."""
    bucket = fsspec.filesystem("s3")
    root = moto_url.removeprefix("s3://")
    keys = ["c/a.txt", "c/a.txt/b.txt", "c/d.txt/", "c/e?versionId=1.txt", "c/f.txt"]
    for key in keys:
        bucket.call_s3("put_object", Bucket=root, Key=key, Body=key.encode())
    source = list_files(SourceSpec("s", (f"{moto_url}/c",)))
    assert {item.url.removeprefix(moto_url): item.reason for item in source.left_out} == {
        "/c/a.txt": "unreadable_key",
        "/c/d.txt/": "unreadable_key",
        "/c/e?versionId=1.txt": "unreadable_key",
    }
    assert read(f"{moto_url}/c") == ["c/a.txt/b.txt", "c/f.txt"]
    with pytest.raises(DataError, match="both an object and a folder"):
        read(f"{moto_url}/c/a.txt")
    assert read(f"{moto_url}/c/a.txt/") == ["c/a.txt/b.txt"]


def test_files_without_text_do_not_count_as_lost(tmp_path: Path) -> None:
    """Empty archives and tables, and the resource forks of macOS, are listed as left out, and are no error."""
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "._a.txt").write_bytes(b"\x00\x05\x16\x07")
    for name in ("x.parquet", "x.jsonl.zst", "x.jsonl.gz"):
        (tmp_path / name).touch()
    source = list_files(SourceSpec("s", (str(tmp_path),)))
    assert sorted(item.reason for item in source.left_out) == ["empty_file"] * 3 + ["resource_fork"]
    assert source.incidental == {item.url for item in source.left_out}
    assert read(tmp_path) == ["a"]


class _ShortReads(io.RawIOBase):
    """A file of which each read may return less than the requested size, as with a web server."""

    def __init__(self, data: bytes) -> None:
        self._inner = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        data = self._inner.read(min(len(into), 1000))
        into[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        return self._inner.read(min(size, 1000) if size >= 0 else 1000)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_short_read_is_not_the_end_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Every byte is read, even if each read returns less than the requested size."""
    plain = b"".join(b'{"text": "%d"}\n' % number for number in range(20_000))
    compress = {".gz": gzip.compress, ".zst": zstd.compress}.get(suffix[-4:].lstrip("l"), bytes)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(compress(plain))
    whole = read(path)
    monkeypatch.setattr(LocalFileSystem, "open", lambda *_: _ShortReads(path.read_bytes()))
    assert read(path) == whole
    assert sum(map(len, whole)) >= len(plain) if suffix == ".txt" else len(whole) == 20_000


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_line_beyond_the_limit_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """A line of the largest size is a document. A longer one is skipped, and the next line is read."""
    monkeypatch.setattr(documents, "DOCUMENT_BYTES_MAX", 20)
    monkeypatch.setattr(documents, "READ_BYTES", 7)
    longest = b'{"text": "12345678"}'
    data = longest + b"x\n" + longest[:-1] + b"}\n" + b"y" * 99 + b"\n" + longest[:-2] + b'"}'
    compress = {".gz": gzip.compress, ".zst": zstd.compress}.get(suffix[-4:].lstrip("l"), bytes)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(compress(data))
    assert read(path) == ["!too_long", "!too_long", "!too_long", "12345678"]


def test_a_long_row_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text in a table has the same limit, and the size of rows decides how many are read at once."""
    monkeypatch.setattr(documents, "DOCUMENT_BYTES_MAX", 20)
    monkeypatch.setattr(documents, "PARQUET_BATCH_BYTES", 100)
    texts = ["ab", "é" * 11, "é" * 10] * 50
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == ["ab", "!too_long", "é" * 10] * 50


@pytest.mark.parametrize("kind", ["plain", "dictionary", "skewed", "list"])
def test_table_bomb_is_read_within_limited_memory(tmp_path: Path, kind: str) -> None:
    """Many large equal rows in a small file are read one by one, within 400 MiB."""
    large = "a" * (8 * 2**20)
    small = [f"{number}" for number in range(2000)]
    texts = pyarrow.array([large]).dictionary_encode()
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 60), texts.dictionary)
    if kind == "plain":
        column = pyarrow.array([large] * 60)
    elif kind == "skewed":
        column = pyarrow.array(small + [large] * 60)
    elif kind == "list":
        column = pyarrow.array([[large]] * 60)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    program = """if True:
        import collections, pathlib, re, sys
        from elastic_pt.data.documents import Document, read_documents
        from elastic_pt.data.sources import SourceSpec, list_files
        source = list_files(SourceSpec("s", (sys.argv[1],)))
        seen = collections.Counter(
            len(item.text) if isinstance(item, Document) else item.reason for item in read_documents(source)
        )
        peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())
        print(seen[8 * 2**20], seen["text_is_no_string"], int(peak[1]) // 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    texts_read, others, peak_mib = map(int, done.stdout.split())
    assert (texts_read, others) == ((0, 60) if kind == "list" else (60, 0))
    assert peak_mib < 400


def test_compressed_bomb_is_skipped_within_limited_memory(tmp_path: Path) -> None:
    """A line of 3 GiB in a small file is skipped within 500 MiB."""
    compressor, block = zstd.ZstdCompressor(), b"a" * 2**24
    with (tmp_path / "x.jsonl.zst").open("wb") as file:
        for _ in range(192):
            file.write(compressor.compress(block))
        file.write(compressor.compress(b'\n{"text": "one"}\n'))
        file.write(compressor.flush())
    program = """if True:
        import resource, sys
        from elastic_pt.data.documents import read_documents
        from elastic_pt.data.sources import SourceSpec, list_files
        resource.setrlimit(resource.RLIMIT_DATA, (500 * 2**20, 500 * 2**20))
        print(*map(repr, read_documents(list_files(SourceSpec("s", (sys.argv[1],))))))
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "too_long" in done.stdout
    assert "text='one'" in done.stdout


class _ReversedFileSystem(LocalFileSystem):  # type: ignore[misc]
    """A local file system that lists folders in reverse order."""

    protocol = "reversed"

    def ls(self, *args: object, **kwargs: object) -> list[dict[str, object]]:
        return sorted(super().ls(*args, **kwargs), key=lambda each: each["name"], reverse=True)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("reversed://")))


def test_the_order_of_files_does_not_depend_on_the_listing(tmp_path: Path) -> None:
    """A folder is read in the order of names, folder by folder, also if the file system lists in another order."""
    fsspec.register_implementation("reversed", _ReversedFileSystem, clobber=True)
    for name in ("b.txt", "a/z.txt", "a-b.txt", "a/b/c.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = ["a/b/c.txt", "a/z.txt", "a-b.txt", "a.txt", "b.txt"]
    assert read(tmp_path) == expected
    assert read(f"reversed://{tmp_path}") == expected


def test_a_url_is_read_like_a_path() -> None:
    """Any URL that fsspec can open can hold a corpus."""
    with fsspec.open("memory://test-documents/x.jsonl", "wb") as file:
        file.write(json.dumps({"text": "from memory"}).encode())
    assert read("memory://test-documents") == ["from memory"]
    assert read("memory://test-documents/x.jsonl") == ["from memory"]


def test_standard_library_is_a_corpus() -> None:
    """Every machine has it. The limit gives the same documents each time and is never exceeded."""
    spec = standard_library_source(limit_characters=300_000)
    items = list(read_documents(list_files(spec)))
    texts = [item.text for item in items if isinstance(item, Document)]
    assert 200_000 < sum(map(len, texts)) <= 300_000
    assert items == list(read_documents(list_files(spec)))
    assert not any(isinstance(item, Skip) and item.reason != "empty" for item in items)
