"""Prepare: the same texts give the same shards, without duplicates and without silent losses."""

import errno
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_data import Prepared, cache_at, in_schema_1, words

from elastic_pt.data.manifest import Manifest, read_manifest
from elastic_pt.data.prepare import Progress, prepare
from elastic_pt.data.shards import TokenReader
from elastic_pt.data.sources import SourceSpec
from elastic_pt.data.tokenizer import load_tokenizer
from elastic_pt.errors import AlreadyExists, DataError
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store


def write_lines(path: Path, texts: list[str]) -> SourceSpec:
    """A JSON-lines file of documents, as the source `s`."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceSpec("s", (str(path),))


def documents_of(manifest: Manifest, store: Store, split: str, source: int = 0) -> list[str]:
    """The texts of a split, decoded from its shards."""
    assert split in ("train", "held_out")
    total = manifest.sources[source].tokens(split)
    ids = TokenReader(manifest, store, cache=cache_at()).stream(source, split, 0, total).tolist()
    tokenizer = load_tokenizer(store, manifest)
    texts: list[str] = []
    start = 0
    for place, token in enumerate(ids):
        if token == manifest.end_token_id:
            texts.append(tokenizer.decode(ids[start:place], skip_special_tokens=False))
            start = place + 1
    assert start == total, "the stream ends with an end token"
    return texts


def test_shards_hold_the_documents_in_order(tmp_path: Path) -> None:
    """Every document is in one split, byte for byte, followed by the end token."""
    texts = [words(i, 60) for i in range(40)] + ["\x00 <|endoftext|> \r\n\U0001f600 ﬁ"]
    store = open_store(str(tmp_path / "out"))
    spec = write_lines(tmp_path / "x.jsonl", texts)
    manifest = prepare([spec], store, vocab_size=300, held_out=0.25, shard_tokens=500)
    train = documents_of(manifest, store, "train")
    held_out = documents_of(manifest, store, "held_out")
    assert sorted(train + held_out) == sorted(texts)
    assert train == [text for text in texts if text in train]
    source = manifest.sources[0]
    assert (source.documents, source.held_out_documents) == (len(train), len(held_out))
    assert source.held_out_bytes == sum(len(text.encode()) for text in held_out)
    assert read_manifest(store) == manifest
    assert manifest.skipped == {}


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """The manifest, and with it every hash, depends on the texts and arguments alone, not on paths."""
    fingerprints = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        names = [f"{i}.txt" for i in range(20)]
        for name in names if place == "one" else reversed(names):
            (tmp_path / place / name).write_text(words(int(name[:-4])))
        store = open_store(str(tmp_path / f"out-{place}"))
        spec = SourceSpec("s", (str(tmp_path / place),))
        fingerprints.append(prepare([spec], store, vocab_size=400).fingerprint)
    assert fingerprints[0] == fingerprints[1]


def test_bytes_equal_those_of_the_first_version(tmp_path: Path) -> None:
    """With both text formats, several pieces, sources and shards, the bytes are those that version 0.1 wrote.

    Its manifest listed shards with their own hashes; it can be made from those of today.
    """
    (tmp_path / "a" / "b").mkdir(parents=True)
    for number in range(30):
        text = "\n\n".join(words(seed, 300) for seed in range(number * 50, number * 50 + 50))
        (tmp_path / "a" / ("b" if number % 2 else "") / f"{number}.txt").write_text(text)
    lines = write_lines(tmp_path / "x.jsonl", [words(number) for number in range(400)])
    sources = [
        SourceSpec("first", (str(tmp_path / "a"),), weight=0.75),
        SourceSpec("second", lines.paths),
    ]
    store = open_store(str(tmp_path / "out"))
    manifest = prepare(sources, store, vocab_size=500, held_out=0.1, shard_tokens=10000)
    of_version_0_1 = in_schema_1(Prepared(manifest, store, tmp_path / "out"))
    assert of_version_0_1.manifest.fingerprint == (
        "ee27c82e6f46b070526ab1f49f8d7c25871689c07a1d6c7bc082a952e0bd1553"
    )
    assert manifest.fingerprint == (
        "5a6ea993a906ad4a7e78afa738ad5e3255bbb4f06beeb0911e5bab0e1268ca8b"
    )


def test_equal_documents_are_kept_once_across_files_and_sources(tmp_path: Path) -> None:
    """The first of equal documents is kept; the others, in any file or source, are counted as duplicates."""
    first = write_lines(tmp_path / "a.jsonl", [words(1), words(2), words(1)])
    second = write_lines(tmp_path / "b.jsonl", [words(2), words(3), words(3) + " "])
    store = open_store(str(tmp_path / "out"))
    specs = [SourceSpec("a", first.paths), SourceSpec("b", second.paths)]
    manifest = prepare(specs, store, vocab_size=300, held_out=0)
    assert documents_of(manifest, store, "train", 0) == [words(1), words(2)]
    assert documents_of(manifest, store, "train", 1) == [words(3), words(3) + " "]
    assert manifest.skipped == {"duplicate": 2}
    assert read_manifest(store) == manifest


@given(st.sets(st.integers(0, 10**6), min_size=40, max_size=60), st.randoms(use_true_random=False))
@settings(max_examples=8, deadline=None)
def test_added_documents_do_not_change_the_split_of_others(
    tmp_path_factory: pytest.TempPathFactory, seeds: set[int], rng: object
) -> None:
    """The hash of a document alone decides its split; other documents and their order do not matter."""
    folder = tmp_path_factory.mktemp("split")
    texts = [words(seed, 30) for seed in sorted(seeds)]
    splits = []
    for number, chosen in enumerate((texts[:20], sorted(texts, key=lambda text: text[::-1]))):
        store = open_store(str(folder / str(number)))
        spec = write_lines(folder / f"{number}.jsonl", chosen)
        manifest = prepare([spec], store, vocab_size=260, held_out=0.5)
        splits.append(
            {split: set(documents_of(manifest, store, split)) for split in ("train", "held_out")}
        )
    for split in ("train", "held_out"):
        assert splits[0][split] == splits[1][split] & set(texts[:20])


def test_the_held_out_share_is_met_on_average(tmp_path: Path) -> None:
    """With a held-out share of a tenth, about a tenth of 2000 documents is held out."""
    spec = write_lines(tmp_path / "x.jsonl", [words(i, 5) + str(i) for i in range(2000)])
    manifest = prepare([spec], open_store(str(tmp_path / "out")), vocab_size=300, held_out=0.1)
    assert manifest.sources[0].held_out_documents == pytest.approx(200, abs=50)


@pytest.mark.parametrize(("count", "held_out"), [(2, 1e-9), (2, 0.999999), (5, 1e-9)])
def test_a_very_small_corpus_still_has_both_splits(
    tmp_path: Path, count: int, held_out: float
) -> None:
    """With two documents or more, each split has at least one."""
    spec = write_lines(tmp_path / "x.jsonl", [words(i) for i in range(count)])
    source = prepare(
        [spec], open_store(str(tmp_path / "out")), vocab_size=260, held_out=held_out
    ).sources[0]
    assert source.documents >= 1
    assert source.held_out_documents >= 1


def test_single_document_is_not_held_out(tmp_path: Path) -> None:
    """A single document is never held out, for any hash and share."""
    spec = write_lines(tmp_path / "x.jsonl", [words(0)])
    for number, held_out in enumerate((0.999999, 0.01, 0.0)):
        store = open_store(str(tmp_path / str(number)))
        source = prepare([spec], store, vocab_size=260, held_out=held_out).sources[0]
        assert (source.documents, source.held_out_documents) == (1, 0)


def test_weights_default_to_the_share_of_tokens(tmp_path: Path) -> None:
    """Without weights, a source of three times the tokens has three times the rows."""
    a = write_lines(tmp_path / "a.jsonl", [words(i) for i in range(30)])
    b = write_lines(tmp_path / "b.jsonl", [words(i) for i in range(100, 110)])
    specs = [SourceSpec("a", a.paths), SourceSpec("b", b.paths)]
    manifest = prepare(specs, open_store(str(tmp_path / "out")), vocab_size=300, held_out=0)
    tokens = [source.tokens("train") for source in manifest.sources]
    assert manifest.weights == pytest.approx([count / sum(tokens) for count in tokens], abs=2e-6)


@pytest.mark.parametrize(
    ("given_weights", "expected"),
    [
        ([3.0, 1.0, 4.0], [0.375, 0.125, 0.5]),
        ([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),
        ([0.5, None, 0.25], [0.5, 0.25, 0.25]),
        ([1e-6, 0.5, None], [1e-6, 0.5, 0.499999]),
    ],
)
def test_given_weights_are_kept(
    tmp_path: Path, given_weights: list[float | None], expected: list[float]
) -> None:
    """If all sources have weights, they are relative. If only some do, they are shares, and the others divide the rest."""
    specs = []
    for number, weight in enumerate(given_weights):
        paths = write_lines(tmp_path / f"{number}.jsonl", [words(number)]).paths
        specs.append(SourceSpec(f"s{number}", paths, weight))
    store = open_store(str(tmp_path / "out"))
    manifest = prepare(specs, store, vocab_size=260, held_out=0)
    assert manifest.weights == pytest.approx(expected, abs=1e-12)


def test_weights_without_a_rest_for_other_sources_are_refused(tmp_path: Path) -> None:
    """A source without a weight needs a rest to take its share from."""
    a = write_lines(tmp_path / "a.jsonl", [words(1)])
    b = write_lines(tmp_path / "b.jsonl", [words(2)])
    specs = [SourceSpec("a", a.paths, 1.0), SourceSpec("b", b.paths)]
    with pytest.raises(DataError, match="leave no share"):
        prepare(specs, open_store(str(tmp_path / "out")), vocab_size=260)


def test_skips_are_counted_in_the_manifest(tmp_path: Path) -> None:
    """The manifest counts each document that is left out, by its reason."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(words(1))
    (tmp_path / "in" / "b.txt").write_text(words(1))
    (tmp_path / "in" / "c.txt").write_bytes(b"\xff")
    (tmp_path / "in" / "d.png").write_bytes(b"")
    (tmp_path / "in" / "e.jsonl").write_text('{"text": 1}\n{"text": \n{"text": ""}\n')
    store = open_store(str(tmp_path / "out"))
    spec = SourceSpec("s", (str(tmp_path / "in"),))
    manifest = prepare([spec], store, vocab_size=260, allow_left_out=0.5)
    assert (
        read_manifest(store).skipped
        == manifest.skipped
        == {
            "broken_json": 1,
            "duplicate": 1,
            "empty": 1,
            "invalid_utf8": 1,
            "text_is_no_string": 1,
            "unknown_suffix": 1,
        }
    )


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "no document left to train on .*left out of all sources: none"),
        ([""], "no document left to train on .*left out of all sources: 1 empty"),
    ],
)
def test_an_empty_corpus_is_refused(tmp_path: Path, lines: list[str], told: str) -> None:
    """Without a document to train on, the error says why documents were left out."""
    spec = write_lines(tmp_path / "x.jsonl", lines)
    with pytest.raises(DataError, match=told):
        prepare([spec], open_store(str(tmp_path / "out")), vocab_size=260)


def test_source_of_duplicates_only_is_refused(tmp_path: Path) -> None:
    """A source without a document of its own cannot have a share of the mixture."""
    a = write_lines(tmp_path / "a.jsonl", [words(1)])
    specs = [SourceSpec("a", a.paths), SourceSpec("b", a.paths)]
    with pytest.raises(DataError, match=r"source b .*no document left .*1 duplicate"):
        prepare(specs, open_store(str(tmp_path / "out")), vocab_size=260)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"vocab_size": 100_000}, r"--vocab-size 100000: too large .* yields \d+ tokens"),
        ({"vocab_size": 256}, "--vocab-size 256: expected a number from 257"),
        ({"held_out": 1.0}, "--held-out 1.0: expected a share"),
        ({"held_out": -0.1}, "--held-out -0.1: expected a share"),
        ({"held_out": float("nan")}, "--held-out nan: expected a share"),
        ({"shard_tokens": 0}, "shard_tokens = 0: expected a positive number"),
        ({"tokenizer_file": Path("/nowhere.json")}, "tokenizer /nowhere.json: No such file"),
    ],
)
def test_impossible_arguments_are_refused(
    tmp_path: Path, arguments: dict[str, object], told: str
) -> None:
    """A mistake in an argument names it, its value and what is expected, and writes no manifest."""
    spec = write_lines(tmp_path / "x.jsonl", [words(i) for i in range(5)])
    store = open_store(str(tmp_path / "out"))
    with pytest.raises(DataError, match=told):
        prepare([spec], store, **{"vocab_size": 300, **arguments})  # type: ignore[arg-type]
    assert store.size("manifest.json") is None


def test_prepared_data_is_never_overwritten(tmp_path: Path, prepared: Prepared) -> None:
    """A second prepare to the same place stops before it reads a document."""
    before = sorted(prepared.store.keys(""))
    with pytest.raises(DataError, match="already holds prepared data"):
        prepare([SourceSpec("s", ("/nowhere",))], prepared.store)
    assert sorted(prepared.store.keys("")) == before


class _RacedStore:
    """A store on which another `prepare` finishes just before ours."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.url, self.read, self.write, self.size = inner.url, inner.read, inner.write, inner.size
        self.keys, self.delete = inner.keys, inner.delete

    def create(self, key: str, data: bytes) -> None:
        self._inner.create(key, b"{}")
        raise AlreadyExists(key)


def test_loser_of_the_race_for_the_manifest_gets_an_error(tmp_path: Path) -> None:
    """If two `prepare` write to one place at once, one succeeds and the other raises."""
    spec = write_lines(tmp_path / "x.jsonl", [words(1)])
    with pytest.raises(DataError, match="already holds prepared data"):
        prepare([spec], _RacedStore(open_store(str(tmp_path / "out"))), vocab_size=260)


def test_a_file_system_without_hard_links_holds_prepared_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared data does not need an atomic create; a second prepare is still refused."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    spec = write_lines(tmp_path / "x.jsonl", [words(1)])
    store = open_store(str(tmp_path / "out"))
    manifest = prepare([spec], store, vocab_size=260)
    assert read_manifest(store) == manifest
    with pytest.raises(DataError, match="already holds prepared data"):
        prepare([spec], store, vocab_size=260)


@pytest.mark.parametrize(
    ("weights", "told"),
    [((1.0, None), "leave no share"), ((1e-12, 1.0), "weight")],
)
def test_weights_and_output_are_checked_before_the_corpus_is_read(
    tmp_path: Path, weights: tuple[float | None, ...], told: str
) -> None:
    """A mistake that is known at the start must not cost days of reading."""
    missing = [SourceSpec(f"s{n}", ("/nowhere",), weight) for n, weight in enumerate(weights)]
    with pytest.raises(DataError, match=told):
        prepare(missing, open_store(str(tmp_path / "out")))


@pytest.mark.parametrize("place", ["/proc/prepared", "/dev/null"])
def test_unwritable_output_is_an_error_before_the_corpus_is_read(
    tmp_path: Path, place: str
) -> None:
    """The first object is written before the first document is read."""
    (tmp_path / "x.jsonl").write_text("no line of it is read")
    with pytest.raises(DataError, match=r"left-out.*expected a place that can be written"):
        prepare([SourceSpec("s", (str(tmp_path / "x.jsonl"),))], open_store(f"file://{place}"))


def test_output_within_a_source_is_refused(tmp_path: Path) -> None:
    """The next `prepare` of the same folder would read what this one wrote, also through a link."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(words(1))
    (tmp_path / "link").symlink_to("in")
    spec = SourceSpec("s", (str(tmp_path / "in"),))
    for out in ("in/out", "in", "link/out"):
        with pytest.raises(DataError, match="lies within the source"):
            prepare([spec], open_store(str(tmp_path / out)), vocab_size=260)
    assert prepare([spec], open_store(str(tmp_path / "in-2")), vocab_size=260).vocab_size == 260
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.txt"]


def test_corpus_that_changes_during_prepare_is_refused(tmp_path: Path) -> None:
    """If the encoded texts are not the scanned ones, no manifest is written."""
    path = tmp_path / "x.jsonl"
    for number, change in enumerate(
        ([words(1), words(3)], [words(1)], [words(1), words(2), words(3)])
    ):
        spec = write_lines(path, [words(1), words(2)])
        store = open_store(str(tmp_path / str(number)))

        def after_scan(progress: Progress, change: list[str] = change) -> None:
            if progress.stage == "scan":
                write_lines(path, change)

        with pytest.raises(DataError, match="source s: changed while it was prepared"):
            prepare([spec], store, vocab_size=260, progress=after_scan)
        assert store.size("manifest.json") is None


def test_given_tokenizer_is_used_unchanged(tmp_path: Path, prepared: Prepared) -> None:
    """With the tokenizer of earlier data, the tokenizer file and the vocabulary are the same."""
    tokenizer_file = prepared.root / prepared.manifest.tokenizer_key
    spec = write_lines(tmp_path / "x.jsonl", ["abc <|endoftext|> dé"])
    store = open_store(str(tmp_path / "out"))
    manifest = prepare([spec], store, tokenizer_file=tokenizer_file)
    assert manifest.tokenizer_sha256 == prepared.manifest.tokenizer_sha256
    assert manifest.vocab_size == prepared.manifest.vocab_size
    assert documents_of(manifest, store, "train") == ["abc <|endoftext|> dé"]


def test_progress_is_reported_for_every_stage(tmp_path: Path) -> None:
    """The progress of each stage increases, and ends with all documents done."""
    seen: list[Progress] = []
    spec = write_lines(tmp_path / "x.jsonl", [words(i, 10) for i in range(600)])
    prepare([spec], open_store(str(tmp_path / "out")), vocab_size=300, progress=seen.append)
    for stage in ("scan", "learn", "encode"):
        done = [progress.documents for progress in seen if progress.stage == stage]
        assert done == sorted(done)
        assert done[-1] == 600
        assert len(done) > 2
