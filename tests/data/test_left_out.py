"""What prepare leaves out is listed by path, and refused beyond a share of a source's files."""

import json
from pathlib import Path

import pytest
from prepared_data import words

from elastic_pt.data.left_out import LEFT_OUT_KEY, SourceLosses, count_by_reason
from elastic_pt.data.prepare import prepare
from elastic_pt.data.sources import Skip, SourceSpec, list_files
from elastic_pt.errors import DataError
from elastic_pt.store.open import open_store


def folder_of(path: Path, names: list[str]) -> SourceSpec:
    """A source with one short text in each file."""
    path.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        (path / name).write_text(words(number))
    return SourceSpec("s", (str(path),))


def test_source_that_loses_files_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """Two unknown files of twelve are more than a tenth; the error names them and the option that allows them."""
    spec = folder_of(tmp_path / "in", [f"{n}.txt" for n in range(10)] + ["x.csv", "y.html"])
    (tmp_path / "in" / "0.txt").write_bytes(b"\xff")  # a read would count it as lost, too
    store = open_store(str(tmp_path / "out"))
    with pytest.raises(
        DataError,
        match=r"source s: 2 of 12 files are left out: .*x\.csv \(unknown_suffix\), .*y\.html .*"
        r"expected at most a share of 0\.1, or --allow-left-out 0\.17$",
    ):
        prepare([spec], store, vocab_size=260)
    with pytest.raises(DataError, match=r"3 of 12 files .*allow-left-out 0\.26"):
        prepare([spec], store, vocab_size=260, allow_left_out=0.17)
    assert store.size("manifest.json") is None
    assert prepare([spec], store, vocab_size=260, allow_left_out=0.26).skipped == {
        "invalid_utf8": 1,
        "unknown_suffix": 2,
    }


def test_repeated_path_does_not_change_the_loss(tmp_path: Path) -> None:
    """A file is counted once, even if several paths of a source lead to it."""
    spec = folder_of(tmp_path / "in", ["a.txt", "b.csv", "c.csv", ".hidden"])
    for times in (1, 20):
        losses = SourceLosses(list_files(SourceSpec("s", spec.paths * times)))
        with pytest.raises(DataError, match=r"2 of 3 files .*--allow-left-out 0\.67"):
            losses.check(0.6)
        losses.check(0.67)


def test_hidden_and_empty_files_do_not_count_as_lost(tmp_path: Path) -> None:
    """Hidden and empty files of other tools are listed, and the corpus is prepared."""
    spec = folder_of(tmp_path / "in", ["a.txt", ".gitattributes", ".DS_Store"])
    (tmp_path / "in" / "_SUCCESS").touch()
    store = open_store(str(tmp_path / "out"))
    assert prepare([spec], store, vocab_size=260).skipped == {"unknown_suffix": 3}
    assert store.read(LEFT_OUT_KEY).count(b"\n") == 3


def test_left_out_documents_and_files_are_listed_by_path(tmp_path: Path) -> None:
    """Each file has one line per reason, with its number of documents; the counts match the manifest."""
    spec = folder_of(tmp_path / "in", ["a.txt", "b.txt", "d.png"])
    (tmp_path / "in" / "b.txt").write_text(words(0))
    good = "".join(json.dumps({"text": words(n)}) + "\n" for n in range(10, 15))
    (tmp_path / "in" / "c.jsonl").write_text(good + '{"text": 1}\n{"text": \n{"text": 2}\n')
    store = open_store(str(tmp_path / "out"))
    manifest = prepare([spec], store, vocab_size=260, allow_left_out=0.25)
    lines = [json.loads(line) for line in store.read(LEFT_OUT_KEY).splitlines()]
    found = [
        (Path(line["file"]).name, line["reason"], line.get("documents"), line["source"])
        for line in lines
    ]
    assert found == [
        ("d.png", "unknown_suffix", None, "s"),
        ("b.txt", "duplicate", 1, "s"),
        ("c.jsonl", "broken_json", 1, "s"),
        ("c.jsonl", "text_is_no_string", 2, "s"),
    ]
    assert manifest.skipped == {
        "broken_json": 1,
        "duplicate": 1,
        "text_is_no_string": 2,
        "unknown_suffix": 1,
    }


@pytest.mark.parametrize(
    ("kept", "skipped", "reason", "is_lost"),
    [
        (2, 2, "broken_json", False),
        (2, 3, "broken_json", True),
        (0, 3, "empty", False),
        (3, 3, "duplicate", False),
    ],
)
def test_file_counts_as_lost_with_more_than_half_of_its_documents(
    tmp_path: Path, kept: int, skipped: int, reason: str, is_lost: bool
) -> None:
    """Empty and duplicate documents do not count as lost."""
    losses = SourceLosses(list_files(folder_of(tmp_path / "in", ["a.txt"])))
    url = losses.source.files[0].url
    for _ in range(kept):
        losses.keep(url)
    for _ in range(skipped):
        losses.skip(Skip(url, reason))
    if is_lost:
        with pytest.raises(DataError, match=rf"1 of 1 files are left out: {url} \({reason}\)"):
            losses.check(0.9)
    else:
        losses.check(0.0)
    losses.check(1.0)
    assert count_by_reason([losses]) == {reason: skipped}
