"""docs/data.md: its example preparer works, and its tables name what the code reads."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prepared_data import cache_at, words
from tokenizers import Tokenizer

from elastic_pt.data.manifest import Manifest, Page, Shard, Source, Stream, read_manifest
from elastic_pt.data.prepare import prepare
from elastic_pt.data.shards import TokenReader
from elastic_pt.data.sources import SourceSpec
from elastic_pt.data.stored import StoredTokens
from elastic_pt.data.tokenizer import KNOWN_END_TOKENS, load_tokenizer
from elastic_pt.store.open import open_store

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
TOKENIZER = Path(__file__).parent / "converted" / "tokenizer.json"
LINES_MAX = 70


def example() -> str:
    """The program of the page."""
    found = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def run_example(directory: Path, text: str, sizes: str = "") -> Path:
    """Run the program on a text; `sizes` replaces its sizes of shards and blocks. Returns its output."""
    program = re.sub(r"2\*\*25, 2\*\*15", sizes, example(), count=1) if sizes else example()
    (directory / "preparer.py").write_text(program)
    (directory / "text.txt").write_text(text)
    command = [sys.executable, directory / "preparer.py", directory / "text.txt", TOKENIZER]
    subprocess.run([*command, directory / "out"], check=True, timeout=60)
    return directory / "out"


def test_example_writes_what_a_run_reads(tmp_path: Path) -> None:
    """The program's data is read block by block, and decodes to its text; it has several shards."""
    lines = [f"{words(number, 20)} <|endoftext|>\n" for number in range(60)]
    out = run_example(tmp_path, "".join(lines), sizes="500, 64")
    store = open_store(str(out))
    manifest = read_manifest(store)
    tokenizer = load_tokenizer(store, manifest)
    assert not any(part.damages for part in StoredTokens(manifest, store).verify())
    reader = TokenReader(manifest, store, cache=cache_at(tmp_path / "cache"))
    (source,) = manifest.sources
    kept = {"train": [], "held_out": []}  # type: dict[str, list[str]]
    for number, line in enumerate(lines):
        kept["held_out" if number % 10 == 9 else "train"].append(line)
    for split in ("train", "held_out"):
        stream = source.stream(split)  # type: ignore[arg-type]
        assert isinstance(stream, Stream)
        ids = reader.stream(0, split, 0, stream.tokens).numpy()  # type: ignore[arg-type]
        *documents, rest = np.split(ids, np.flatnonzero(ids == manifest.end_token_id) + 1)
        assert [
            tokenizer.decode(each[:-1].tolist(), skip_special_tokens=False) for each in documents
        ] == kept[split]
        assert not len(rest)
    assert len(list((out / "shards" / "corpus").glob("train-*.bin"))) > 1
    assert source.held_out_bytes == sum(len(line.encode()) for line in kept["held_out"])
    assert (source.documents, source.held_out_documents) == (54, 6)


def test_example_writes_the_bytes_of_prepare(tmp_path: Path) -> None:
    """For the same documents and tokenizer, the program's train shards, indexes and pages are those of `prepare`."""
    lines = [f"{words(number, 20)}\n" for number in range(9)]
    out = run_example(tmp_path, "".join(lines))
    (tmp_path / "in").mkdir()
    for number, line in enumerate(lines):
        (tmp_path / "in" / f"{number}.txt").write_text(line)
    manifest = prepare(
        [SourceSpec("corpus", (str(tmp_path / "in"),))],
        open_store(str(tmp_path / "prepared")),
        tokenizer_file=TOKENIZER,
        held_out=0.0,
    )
    ours = read_manifest(open_store(str(out)))
    assert ours.sources == manifest.sources
    assert (ours.vocab_size, ours.block_tokens) == (manifest.vocab_size, manifest.block_tokens)


def test_example_is_short() -> None:
    """Whoever writes a preparer reads the whole program first."""
    assert len(example().splitlines()) <= LINES_MAX


@pytest.mark.parametrize(("name", "record"), [("manifest", Manifest), ("source", Source)])
def test_tables_name_every_field(name: str, record: type) -> None:
    """Each field of the manifest has its row, and no other has."""
    table = PAGE.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]
    fields = {field.name for field in dataclasses.fields(record)}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == fields


def test_fields_of_lists_and_end_tokens_are_named() -> None:
    """A stream, an entry of a list and the known end tokens are described."""
    for record in (Stream, Page, Shard):
        assert all(f"`{field.name}`" in PAGE for field in dataclasses.fields(record))
    assert all(f"`{token}`" in PAGE.replace("\\|", "|") for token in KNOWN_END_TOKENS)
    assert Tokenizer.from_file(str(TOKENIZER)).token_to_id(KNOWN_END_TOKENS[0]) is not None
