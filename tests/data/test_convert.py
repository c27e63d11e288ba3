"""Converters: the files of Megatron and nanoGPT keep their ids, and bad files are refused in one line.

The files in `converted/` were written by the original libraries; its README has the script.
"""

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prepared_data import cache_at
from tokenizers import Tokenizer

from elastic_pt.data import convert as convert_module
from elastic_pt.data import foreign
from elastic_pt.data.convert import Converted, convert
from elastic_pt.data.left_out import LEFT_OUT_KEY
from elastic_pt.data.manifest import Split, read_manifest
from elastic_pt.data.shards import TokenReader
from elastic_pt.data.sources import parse_source
from elastic_pt.data.tokenizer import load_tokenizer
from elastic_pt.errors import DataError
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

FILES = Path(__file__).parent / "converted"
TOKENIZER = FILES / "tokenizer.json"
TEXTS = [
    "One sentence. Another sentence.",
    "Ünïcode: 中文, and an emoji 🙂.",
    "A last document, without end token in `plain`.",
]
INDEX_HEAD_BYTES = 34
END = 0
"""The id of the tokenizer's end token."""


@pytest.fixture
def out(tmp_path: Path) -> Store:
    """An empty place."""
    return open_store(str(tmp_path / "out"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy of the files that a test may damage."""
    return Path(shutil.copytree(FILES, tmp_path / "files"))


def run(out: Store, *sources: object, held_out: float = 0.0, tokens: int = 7) -> Converted:
    """Convert the sources, with small shards and blocks."""
    return convert(
        [parse_source(str(source)) for source in sources],
        out,
        tokenizer_file=TOKENIZER,
        held_out=held_out,
        shard_tokens=tokens,
        block_tokens=3,
    )


def documents_of(out: Store, split: Split = "train", source: int = 0) -> list[tuple[int, ...]]:
    """The ids of the documents that a reader of the prepared data sees, without their end tokens."""
    manifest = read_manifest(out)
    reader = TokenReader(manifest, out, cache=cache_at())
    ids = reader.stream(source, split, 0, manifest.sources[source].tokens(split)).numpy()
    *documents, rest = np.split(ids, np.flatnonzero(ids == manifest.end_token_id) + 1)
    assert not len(rest), "the stream ends with an end token"
    return [tuple(each[:-1].tolist()) for each in documents]


def texts_of(out: Store, split: Split = "train", source: int = 0) -> list[str]:
    """The documents as text."""
    tokenizer = load_tokenizer(out, read_manifest(out))
    return [
        tokenizer.decode(each, skip_special_tokens=False)
        for each in documents_of(out, split, source)
    ]


@pytest.mark.parametrize(
    ("path", "end_tokens_added"),
    [("sentences", 0), ("plain", 3), ("plain.bin", 3), ("sentences.idx", 0)],
)
def test_megatron_documents_keep_their_ids(out: Store, path: str, end_tokens_added: int) -> None:
    """Documents of one or several sequences, with or without an end token, in uint16 or int32, give the same data."""
    done = run(out, FILES / path)
    assert texts_of(out) == TEXTS
    assert done.end_tokens_added == end_tokens_added
    assert done.manifest.skipped == {"empty": 1}
    assert b'"reason": "empty", "documents": 1}' in out.read(LEFT_OUT_KEY)
    assert done.manifest.sources[0].documents == 3
    assert (done.manifest.vocab_size, done.manifest.end_token) == (300, "<|endoftext|>")


def test_equal_tokens_give_equal_shards(tmp_path: Path) -> None:
    """The type of the ids and the sequences of a document leave no trace in the prepared data."""
    streams = []
    for name in ("sentences", "plain"):
        manifest = run(open_store(str(tmp_path / name)), FILES / name).manifest
        streams.append(manifest.sources)
    assert streams[0] == streams[1]


def test_nanogpt_folder_has_its_own_split(out: Store) -> None:
    """`val.bin` is held out, whatever `--held-out` says, and its text is counted in bytes."""
    manifest = run(out, FILES / "nanogpt", held_out=0.9).manifest
    assert texts_of(out) == TEXTS[:2]
    assert texts_of(out, "held_out") == TEXTS[2:]
    source = manifest.sources[0]
    assert (source.documents, source.held_out_documents) == (2, 1)
    assert source.held_out_bytes == len(TEXTS[2].encode())


def test_sources_are_joined_and_weighted(out: Store) -> None:
    """Paths of one name are one source in their order, and a source may come from either library."""
    manifest = run(
        out, f"a={FILES}/plain@0.75", f"a={FILES}/nanogpt/val.bin", f"b={FILES}/nanogpt"
    ).manifest
    assert [(each.name, each.weight) for each in manifest.sources] == [("a", 0.75), ("b", 0.25)]
    assert texts_of(out) == [*TEXTS, TEXTS[2]]
    assert texts_of(out, source=1) == TEXTS[:2]


def test_split_depends_on_a_document_alone(tmp_path: Path) -> None:
    """Equal documents are on the same side, in any file; about the share is held out."""
    rng = np.random.default_rng(1)
    end = Tokenizer.from_file(str(TOKENIZER)).token_to_id("<|endoftext|>")
    documents = [[*rng.integers(3, 300, rng.integers(1, 9)).tolist(), end] for _ in range(400)]
    splits = []
    for name, order in (("a", documents), ("b", documents[::-1] + documents)):
        np.concatenate(order).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
        out = open_store(str(tmp_path / name))
        run(out, tmp_path / f"{name}.bin", held_out=0.25, tokens=1000)
        splits.append((set(documents_of(out, "train")), set(documents_of(out, "held_out"))))
    assert splits[0] == splits[1]
    train, held_out = splits[0]
    assert not train & held_out
    assert 0.15 < len(held_out) / len(train | held_out) < 0.35


def write_megatron(prefix: Path, documents: list[list[int]]) -> None:
    """Write an indexed data set of uint16 ids, one sequence per document."""
    lengths = np.array([len(each) for each in documents], "<i4")
    starts = np.cumsum([0, *lengths[:-1]]) * 2
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(documents), len(documents) + 1)
    ends = np.arange(len(documents) + 1, dtype="<i8")
    index = head + lengths.tobytes() + starts.astype("<i8").tobytes() + ends.tobytes()
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(np.concatenate(documents).astype("<u2").tobytes())


def test_split_does_not_depend_on_end_tokens(tmp_path: Path) -> None:
    """A document is on the same side in a file with end tokens and in one without."""
    rng = np.random.default_rng(2)
    documents = [rng.integers(3, 300, rng.integers(1, 9)).tolist() for _ in range(50)]
    splits = []
    for name, tail in (("with", [END]), ("without", [])):
        write_megatron(tmp_path / name, [[*each, *tail] for each in documents])
        out = open_store(str(tmp_path / f"{name}-out"))
        run(out, tmp_path / name, held_out=0.4, tokens=100)
        splits.append((documents_of(out, "train"), documents_of(out, "held_out")))
    assert splits[0] == splits[1]
    assert all(splits[0])


def test_end_tokens_within_a_megatron_document_end_it(tmp_path: Path, out: Store) -> None:
    """No prepared document has an end token but its last, and none is empty: the parts are documents of their own."""
    write_megatron(tmp_path / "x", [[END, 5, 6], [END, 7, 8, END, 9], [END, END], [5, END]])
    done = run(out, tmp_path / "x")
    assert documents_of(out) == [(5, 6), (7, 8), (9,), (5,)]
    assert done.manifest.sources[0].documents == 4
    assert done.manifest.skipped == {"empty": 4}
    assert done.end_tokens_added == 2


def test_held_out_documents_without_text_are_left_out(tmp_path: Path, out: Store) -> None:
    """Bits per byte need bytes: a document of special tokens alone is not held out, also if it has several pieces."""
    tokenizer = json.loads(TOKENIZER.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": "<s>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "in").mkdir()
    for name, text in (("train", [5, 6, END, 300, END]), ("val", [300, END, *[300] * 2**21, END])):
        np.array(text, "<u2").tofile(tmp_path / "in" / f"{name}.bin")
    done = convert(
        [parse_source(str(tmp_path / "in"))], out, tokenizer_file=tmp_path / "tokenizer.json"
    )
    assert read_manifest(out) == done.manifest
    (source,) = done.manifest.sources
    assert (source.documents, source.held_out_documents, source.tokens("held_out")) == (2, 0, 0)
    assert done.manifest.skipped == {"empty": 2}


def test_memory_does_not_grow_with_the_sequences_of_a_document(tmp_path: Path) -> None:
    """One document may have all sequences of a file; its index is read in parts."""
    count = 2**20
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, count, 2)
    index += np.ones(count, "<i4").tobytes() + np.arange(0, 2 * count, 2, dtype="<i8").tobytes()
    (tmp_path / "x.idx").write_bytes(index + np.array([0, count], "<i8").tobytes())
    (tmp_path / "x.bin").write_bytes(np.full(count, 5, "<u2").tobytes())
    tracemalloc.start()
    try:
        lengths = [len(each.ids) for each in foreign.Megatron(tmp_path / "x", END).pieces()]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lengths == [count]
    assert peak_bytes < 16e6


def test_every_file_is_checked_before_anything_is_written(
    tmp_path: Path, files: Path, out: Store
) -> None:
    """A later file with a wrong size is told at once, not after the hours of the earlier ones."""
    cut("plain.bin", 4)(files)
    with pytest.raises(DataError, match=r"plain.bin: 208 bytes; expected 212"):
        run(out, f"a={files}/sentences", f"b={files}/plain")
    assert not (tmp_path / "out").exists()


def test_shards_of_no_token_are_refused(out: Store) -> None:
    """A size with which no shard would ever be complete raises instead of an endless loop."""
    with pytest.raises(DataError, match="shard_tokens = 0: expected a positive number"):
        run(out, FILES / "plain", tokens=0)


def test_uint16_file_does_not_fit_a_large_vocabulary() -> None:
    """Ids of 2 bytes cannot be those of a tokenizer with more than 65,536 tokens."""
    file = foreign.NanoGpt(FILES / "nanogpt" / "val.bin", END, 70_000)
    with pytest.raises(DataError, match=r"val.bin: ids of 2 bytes, but the tokenizer has 70000"):
        file.check()


@pytest.mark.parametrize("name", ["sentences", "plain", "nanogpt"])
def test_pieces_do_not_change_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Documents longer than a piece, and indexes longer than what is in memory, give the same data."""
    whole = run(open_store(str(tmp_path / "whole")), FILES / name).manifest
    monkeypatch.setattr(foreign, "PIECE_TOKENS", 4)
    monkeypatch.setattr(convert_module, "PIECE_TOKENS", 4)
    monkeypatch.setattr(foreign, "_INDEX_ENTRIES", 1)
    pieces = run(open_store(str(tmp_path / "pieces")), FILES / name).manifest
    assert [each.train for each in pieces.sources] == [each.train for each in whole.sources]
    assert [each.documents for each in pieces.sources] == [each.documents for each in whole.sources]


def edit(name: str, offset: int, data: bytes) -> Callable[[Path], None]:
    """Replaces some bytes of a file."""

    def apply(files: Path) -> None:
        with (files / name).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return apply


def cut(name: str, size: int) -> Callable[[Path], None]:
    """Removes `size` bytes at the end of a file."""
    return lambda files: (files / name).write_bytes((files / name).read_bytes()[:-size])  # type: ignore[return-value]


def append(name: str, data: bytes) -> Callable[[Path], None]:
    """Adds bytes to a file."""
    return lambda files: (files / name).write_bytes((files / name).read_bytes() + data)  # type: ignore[return-value]


LENGTHS, ENDS = INDEX_HEAD_BYTES, INDEX_HEAD_BYTES + 12 * 4


@pytest.mark.parametrize(
    ("source", "damage", "told"),
    [
        ("plain", cut("plain.bin", 4), r"plain.bin: 208 bytes; expected 212, as .*plain.idx"),
        ("plain", append("plain.bin", b"\0" * 4), r"plain.bin: 216 bytes; expected 212"),
        ("plain", cut("plain.idx", 1), r"plain.idx: 121 bytes; expected 122 for 4 sequences"),
        ("plain", cut("plain.idx", 100), r"plain.idx: no index of Megatron; expected a file"),
        ("plain", append("plain.idx", b"\0" * 4), r"plain.idx: an index with modes"),
        ("plain", edit("plain.idx", 0, b"TNTIDX\0\0"), r"plain.idx: no index of Megatron"),
        ("plain", edit("plain.idx", 9, b"\2"), r"plain.idx: version 2; expected version 1"),
        ("plain", edit("plain.idx", 17, b"\7"), r"plain.idx: dtype code 7; expected an integer"),
        ("plain", edit("plain.idx", ENDS + 8, b"\5"), r"plain.idx: ends of documents 0 to 4"),
        ("plain", edit("plain.idx", ENDS + 32, b"\3"), r"have 3 sequences; expected all 4"),
        ("plain", edit("plain.idx", LENGTHS, b"\1"), r"plain.idx: sequences 0 to 4 have gaps"),
        (
            "plain",
            edit("plain.bin", 8, struct.pack("<i", 300)),
            r"plain.bin: token 2 has id 300; expected ids from 0 to 299",
        ),
        (
            "plain",
            edit("plain.bin", 208, struct.pack("<i", -1)),
            r"plain.bin: token 52 has id -1; expected",
        ),
        ("nanogpt", cut("nanogpt/val.bin", 1), r"val.bin: 45 bytes; expected uint16 ids"),
        ("nanogpt", lambda files: (files / "nanogpt/train.bin").write_bytes(b""), r": 0 bytes"),
        (
            "nanogpt",
            edit("nanogpt/train.bin", 0, struct.pack("<i", 20240520)),
            r"train.bin: has the header of llm.c; expected ids only",
        ),
        (
            "nanogpt",
            edit("nanogpt/val.bin", 2, struct.pack("<H", 50256)),
            r"val.bin: token 1 has id 50256; expected",
        ),
        (
            "plain.bin",
            lambda files: (files / "plain.idx").unlink(),
            r"plain.bin: every second id is 0 or 1, as in a file of int32 ids; expected uint16 ids",
        ),
        (
            "nanogpt",
            edit("nanogpt/val.bin", 44, b"\5"),
            r"val.bin: no end token \(id 0\); expected ids of this tokenizer",
        ),
        ("nanogpt", lambda files: (files / "nanogpt/train.bin").unlink(), r"without train.bin"),
        ("plain", lambda files: (files / "plain.bin").unlink(), r"plain.bin does not exist"),
        ("nothing", lambda files: None, r"source .*nothing: no .*nothing.idx; expected PREFIX"),
    ],
)
def test_bad_file_is_refused_by_name(
    files: Path, out: Store, source: str, damage: Callable[[Path], object], told: str
) -> None:
    """A truncated file, another version or type, or an id above the vocabulary: one line, and no manifest."""
    damage(files)
    with pytest.raises(DataError, match=told) as caught:
        run(out, files / source)
    assert "\n" not in str(caught.value)
    assert out.size("manifest.json") is None


def test_unusable_arguments_are_refused(out: Store) -> None:
    """A bucket as source, a source without documents to train on, and a place that holds data are refused."""
    with pytest.raises(DataError, match="s3://bucket/x: a URL; expected local files"):
        run(out, "s3://bucket/x")
    with pytest.raises(DataError, match=r"--held-out 1.0: expected a share"):
        run(out, FILES / "plain", held_out=1.0)
    with pytest.raises(DataError, match=r"no document left to train on \(held out: 3\)"):
        run(out, FILES / "plain", held_out=0.999999)
    run(out, FILES / "plain")
    with pytest.raises(DataError, match="already holds prepared data"):
        run(out, FILES / "plain")
