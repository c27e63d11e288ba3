"""The manifest: one canonical form, one fingerprint, and anything else is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prepared_data import Prepared

from elastic_pt.data.manifest import Manifest, Page, Shard, page_bytes, page_shards, read_manifest
from elastic_pt.data.table import ShardTable
from elastic_pt.errors import DataError, StoreError
from elastic_pt.store.open import open_store

STORED = Path(__file__).parents[1] / "stored_run" / "0.1" / "data"


def test_manifest_survives_its_json(prepared: Prepared) -> None:
    """A parsed manifest is equal, has the same fingerprint, and gives the same bytes."""
    again = Manifest.from_json(prepared.manifest.to_json())
    assert again == prepared.manifest
    assert again.fingerprint == prepared.manifest.fingerprint
    assert again.to_json() == prepared.manifest.to_json()
    assert read_manifest(prepared.store) == prepared.manifest


def change(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value somewhere in the tree."""

    def apply(tree: Any) -> None:
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (change("schema", value=3), "schema = 3; this version reads 1 and 2"),
        (change("schema", value=1), "block_tokens = 64: not a size of blocks"),
        (change("block_tokens", value=0), "block_tokens = 0: not a size of blocks"),
        (lambda tree: tree.pop("block_tokens"), "block_tokens = 0: not a size of blocks"),
        (
            change("sources", 0, "train", value=[{"key": "k", "tokens": 1, "sha256": ""}]),
            "pages and schema 2 do not agree",
        ),
        (lambda tree: tree.pop("schema"), "schema = None"),
        (lambda tree: tree.pop("sources"), "sources: Field required"),
        (lambda tree: tree.pop("end_token_id"), "end_token_id: Field required"),
        (change("extra", value=1), "changed by hand or by another version"),
        (change("token_type", value="int8"), "token_type: Input should be"),
        (change("sources", value=[]), "do not sum to 1"),
        (change("sources", 0, "weight", value=0.9), "do not sum to 1"),
        (change("sources", 0, "train", value=5), r"sources.0.train.Stream: Input should be"),
        (
            change("sources", 0, "train", "pages", 0, "tokens", value="x"),
            "sources.0.train.Stream.pages.0.tokens: Input should be",
        ),
        (change("vocab_size", value=None), "vocab_size: Input should be a valid integer, not None"),
        (change("vocab_size", value=70_000), "token_type = uint16; expected a type for vocab_size"),
        (change("end_token_id", value=300), "end_token_id = 300; expected an id below vocab_size"),
        (change("tokenizer_sha256", value="x"), "tokenizer_sha256 = 'x'; expected 64 lower-case"),
        (
            change("tokenizer_key", value="/t"),
            "tokenizer_key: not a key: '/t'; expected a relative",
        ),
        (
            change("sources", 1, "name", value="first"),
            "sources: the names .*expected each name once",
        ),
        (
            change("sources", 1, "name", value="a\x1b[2J:/.."),
            r"sources.1.name = 'a\\x1b\[2J:/..'; expected letters, digits, _ and -",
        ),
        (change("tokenizer_key", value="a\0b"), r"tokenizer_key: not a key: 'a\\x00b'; expected"),
        (change("sources", 0, "train", "tokens", value=1), r"sources.0.train.tokens = 1; expected"),
        (
            change("sources", 0, "train", "pages", 0, "sha256", value="AB"),
            r"sources.0.train.pages.0.sha256 = 'AB'; expected 64 lower-case",
        ),
        (
            change("sources", 0, "train", "pages", 0, "tokens", value=0),
            r"sources.0.train.pages.0.tokens = 0; expected a positive number",
        ),
        (
            change("sources", 1, "held_out_bytes", value=0),
            r"sources.1.held_out_bytes = 0; expected the bytes",
        ),
        (
            change("held_out_share", value=0),
            r'line 5 is \' "held_out_share": 0,\', expected \' "held_out_share": 0.0,\'',
        ),
    ],
)
def test_changed_or_foreign_manifest_is_refused(
    prepared: Prepared, damage: Callable[[dict[str, Any]], None], told: str
) -> None:
    """A manifest of another version, or one with wrong edits, is refused with its name."""
    tree = json.loads(prepared.manifest.to_json())
    damage(tree)
    with pytest.raises(DataError, match=told) as caught:
        Manifest.from_json(json.dumps(tree, sort_keys=True, indent=1).encode(), origin="here")
    assert str(caught.value).startswith("here: ")


@pytest.mark.parametrize("data", [b"", b"[]", b"5", b"\xff", b"{", b"null"])
def test_manifest_that_is_not_a_json_object_is_refused(data: bytes) -> None:
    """Anything else under the manifest's key raises `DataError`."""
    with pytest.raises(DataError, match="prepare the data again"):
        Manifest.from_json(data)


def test_directory_without_a_manifest_is_an_error(tmp_path: Path) -> None:
    """For a wrong data URL, the error says what is expected."""
    with pytest.raises(
        DataError, match="expected a directory that `elastic-pt prepare` has finished"
    ):
        read_manifest(open_store(str(tmp_path)))


def test_manifest_of_version_0_1_keeps_its_bytes() -> None:
    """Schema 1 is read and written as it was, so runs on such data keep their fingerprint."""
    data = (STORED / "manifest.json").read_bytes()
    manifest = Manifest.from_json(data)
    assert (manifest.schema, manifest.block_tokens) == (1, 0)
    assert manifest.to_json() == data


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: data.replace(b"000", b"001", 1), "corrupt, its SHA-256 is not that"),
        (lambda data: data[:-1], "corrupt, its SHA-256 is not that"),
        (None, "missing"),
    ],
)
def test_changed_page_is_refused(
    prepared: Prepared, tmp_path: Path, damage: Callable[[bytes], bytes] | None, told: str
) -> None:
    """A page that is not the one of the manifest is refused with its name, before any shard is read."""
    page = prepared.manifest.sources[0].train.pages[0]  # type: ignore[union-attr]
    shutil.copytree(prepared.root, tmp_path / "data")
    path = tmp_path / "data" / page.key
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    table = ShardTable(prepared.manifest, open_store(str(tmp_path / "data")))
    with pytest.raises(StoreError if damage is None else DataError, match=f"{page.key}: {told}"):
        table.find(0, "train", 0)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("sha256", "../../victim", r"0.sha256 = '../../victim'; expected 64 lower-case"),
        ("key", "../victim", r"0.key: not a key: '../victim'; expected a relative path"),
    ],
)
def test_page_cannot_name_files_elsewhere(name: str, value: str, told: str) -> None:
    """A shard's key and its hash name files, so a page with another kind of either is refused, though its hash is right."""
    shard = replace(Shard("shards/a.bin", 5, "0" * 64), **{name: value})
    data = page_bytes([shard])
    page = Page("pages/a.json", 5, hashlib.sha256(data).hexdigest())
    with pytest.raises(DataError, match=f"^here: not a list of shards: {told}"):
        page_shards(data, page, origin="here")


def test_manifest_in_another_spelling_is_refused_by_line(prepared: Prepared) -> None:
    """Whoever writes a manifest with another program learns which line is not canonical, and how it should read."""
    data = prepared.manifest.to_json()
    with pytest.raises(DataError, match=r"line 1 is .*, expected '\{'"):
        Manifest.from_json(json.dumps(json.loads(data), sort_keys=True).encode())
    with pytest.raises(DataError, match=r"is '', expected absent"):
        Manifest.from_json(data + b"\n")
