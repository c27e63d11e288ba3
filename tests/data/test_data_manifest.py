"""The manifest: one canonical form, one fingerprint, and anything else is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared_data import Prepared

from elastic_pt.data.manifest import Manifest, read_manifest
from elastic_pt.errors import DataError
from elastic_pt.store.open import open_store


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
        (change("schema", value=2), "schema = 2; this version reads 1"),
        (lambda tree: tree.pop("schema"), "schema = None"),
        (lambda tree: tree.pop("sources"), "sources: Field required"),
        (lambda tree: tree.pop("end_token_id"), "end_token_id: Field required"),
        (change("extra", value=1), "changed by hand or by another version"),
        (change("token_type", value="int8"), "token_type: Input should be"),
        (change("sources", value=[]), "do not sum to 1"),
        (change("sources", 0, "weight", value=0.9), "do not sum to 1"),
        (change("sources", 0, "train", value=5), "sources.0.train: Input should be"),
        (
            change("sources", 0, "train", 0, "tokens", value="x"),
            "sources.0.train.0.tokens: Input should be",
        ),
        (change("vocab_size", value=None), "vocab_size: Input should be"),
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
