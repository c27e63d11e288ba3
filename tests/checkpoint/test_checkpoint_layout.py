"""Records refuse wrong values. Their bytes do not decode after any change."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_pt.checkpoint.layout import (
    FullManifest,
    Part,
    ShardFile,
    Tensor,
    TensorSlice,
    TrainingState,
    checkpoint_directory,
    parse_directory,
    rows_per_block,
    shard_key,
)
from elastic_pt.checkpoint.nodes import (
    NodeNotice,
    NodeRecord,
    NodeRefusal,
    NodeShare,
    RootManifest,
    fingerprint_of,
    node_key,
)
from elastic_pt.checkpoint.record import Document, StoredDocument, decode, sealed
from elastic_pt.errors import CheckpointError, ConfigError
from tests.checkpoint.world import RUN_ID, training_state

DIRECTORY = "ckpt/0000000040-g1-0a1b2c3d"


def piece(first_row: int = 0, end_row: int = 4, **changes: Any) -> TensorSlice:
    """Rows of a (10, 3) float32 tensor, two rows per block."""
    blocks = -(-(end_row - first_row) // 2)
    values = {
        "name": "model/layers.0.weight",
        "dtype": "F32",
        "global_shape": (10, 3),
        "first_row": first_row,
        "end_row": end_row,
        "offset": 256,
        "block_rows": 2,
        "block_crc32": tuple(range(blocks)),
    }
    return TensorSlice(**(values | changes))


def shard(rank: int, *pieces: TensorSlice) -> ShardFile:
    """A shard file of 4096 bytes."""
    return ShardFile(shard_key(DIRECTORY, rank), 4096, "a" * 64, pieces)


def manifest(*files: ShardFile, **changes: Any) -> FullManifest:
    """A manifest of the files."""
    values = {
        "run_id": RUN_ID,
        "directory": DIRECTORY,
        "files": files,
        "state": training_state(40),
    }
    return FullManifest(**(values | changes))


def whole() -> FullManifest:
    """A valid manifest of three ranks."""
    return manifest(shard(0, piece(0, 4)), shard(1, piece(4, 8)), shard(2, piece(8, 10)))


TENSORS = (Tensor("model/a", "BF16", (2,)), Tensor("model/layers.0.weight", "F32", (10, 3)))


def share(first_rank: int, sizes: tuple[int, ...], rows: tuple[int, ...]) -> NodeShare:
    """A node's entry in the manifest."""
    return NodeShare(node_key(DIRECTORY, first_rank), 900, "b" * 64, sizes, rows)


def root(*nodes: NodeShare, **changes: Any) -> RootManifest:
    """A manifest: by default of a node with two workers and a node with one."""
    values = {
        "run_id": RUN_ID,
        "directory": DIRECTORY,
        "tensors": TENSORS,
        "nodes": nodes or (share(0, (99, 99), (0, 2, 0, 8)), share(2, (99,), (0, 0, 8, 10))),
        "state": training_state(40),
    }
    return RootManifest(**(values | changes))


def documents() -> dict[str, StoredDocument]:
    """One document of each kind."""
    files = (shard(1, piece(0, 4)), shard(2, piece(4, 8)))
    state = training_state(40)
    table = fingerprint_of(TENSORS)
    return {
        "manifest of schema 1": whole(),
        "part": Part(RUN_ID, DIRECTORY, 1, shard(1, piece(4, 8)), state),
        "manifest": root(),
        "record": NodeRecord(RUN_ID, DIRECTORY, 1, files),
        "notice": NodeNotice(
            RUN_ID, DIRECTORY, 0, share(0, (99,), (0, 2, 0, 8)), state, table, TENSORS
        ),
        "refusal": NodeRefusal(RUN_ID, DIRECTORY, 2, "no room"),
    }


EARLIER = json.loads(Path(__file__).with_name("earlier_documents.json").read_text())
"""Documents that the version before schema 3 wrote."""


def bytes_of(kind: str) -> bytes:
    """The stored bytes of a document; of schema 1 as the earlier version wrote it."""
    document = documents()[kind]
    return document.to_bytes() if isinstance(document, Document) else EARLIER[kind].encode()


@pytest.mark.parametrize("kind", documents())
def test_documents_come_back_from_their_bytes(kind: str) -> None:
    """A document is equal after encoding and decoding."""
    document = documents()[kind]
    assert type(document).from_bytes(bytes_of(kind)) == document
    assert (whole().step, whole().generation) == (40, 1)


@pytest.mark.parametrize("kind", EARLIER)
def test_documents_of_the_version_before_are_read(kind: str) -> None:
    """The fields of states up to schema 2 are dropped. All other values are unchanged."""
    document = documents()[kind.removesuffix(" of another node")]
    read = type(document).from_bytes(EARLIER[kind].encode())
    if kind == "notice of another node":
        assert isinstance(read, NodeNotice)
        assert read.state == training_state(40, optimizer_step=38, skipped_in_a_row=2)
    elif kind == "refusal":
        assert read == replace(document, why='no room: Größe "5"')
    else:
        assert read == document


@pytest.mark.parametrize("kind", ["record", "refusal"])
def test_documents_without_a_state_keep_their_bytes(kind: str) -> None:
    """Only documents with a state have a new schema. The bytes of other documents do not change."""
    data = EARLIER[kind].encode()
    assert type(documents()[kind]).from_bytes(data).to_bytes() == data


@pytest.mark.parametrize("schema", [2, 3])
def test_each_schema_has_its_own_fields(schema: int) -> None:
    """A state of schema 3 with a field of schema 2 is refused, and a state of schema 2 without it."""
    content = json.loads(root().to_bytes() if schema == 3 else EARLIER["manifest"])
    for key in ("schema", "kind", "sha256"):
        del content[key]
    assert RootManifest.from_bytes(sealed(RootManifest.what, schema, content)) == root()
    if schema == 3:
        content["state"]["seed"] = 7
    else:
        del content["state"]["seed"]
    reason = {2: "missing field 'seed'", 3: r"unknown field 'state\.seed'"}[schema]
    with pytest.raises(CheckpointError, match=reason):
        RootManifest.from_bytes(sealed(RootManifest.what, schema, content))


def test_every_schema_of_a_manifest_is_read() -> None:
    """The object `manifest.json` holds its schema. An unknown schema is refused."""
    assert decode(EARLIER["manifest of schema 1"].encode(), RootManifest, FullManifest) == whole()
    assert decode(EARLIER["manifest"].encode(), RootManifest, FullManifest) == root()
    assert decode(root().to_bytes(), RootManifest, FullManifest) == root()
    newer = json.dumps(json.loads(root().to_bytes()) | {"schema": 4}).encode()
    with pytest.raises(CheckpointError, match=r"found schema 4 .* expected schema 3 or 2 or 1"):
        decode(newer, RootManifest, FullManifest)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([share(0, (9,), (0, 2, 0, 8))], "rows 8 to 10 are missing"),
        ([share(0, (9,), (0, 2, 1, 10))], "rows 0 to 1 are missing"),
        ([share(0, (9,), (0, 0, 0, 10))], "model/a: rows 0 to 2 are missing"),
        ([share(0, (9,), (0, 2, 0, 11))], "rows 10 to 11 are there twice"),
        (
            [share(0, (9,), (0, 2, 0, 8)), share(1, (9,), (0, 0, 7, 10))],
            "rows 7 to 8 are there twice",
        ),
        ([share(0, (9,), (0, 2, 0, 10)), share(1, (9,), (0, 0, 5, 5))], "there twice"),
        ([share(0, (9,), (0, 2, 0, 10, 0, 1))], "rows of 3 tensors, expected 2"),
        ([share(0, (9,), (0, 2, 0))], "rows of 1.5 tensors, expected 2"),
        ([share(0, (9, 9), (0, 2, 0, 8)), share(1, (9,), (0, 0, 8, 10))], "the node of rank 2"),
        ([share(1, (9,), (0, 2, 0, 10))], "the node of rank 0"),
    ],
)
def test_the_rows_of_nodes_must_tile_every_tensor(nodes: list[NodeShare], reason: str) -> None:
    """A manifest is refused if the rows of its nodes have a gap or an overlap, or if its ranks do."""
    with pytest.raises(CheckpointError, match=reason):
        root(*nodes)


def test_a_manifest_has_nodes_and_tensors() -> None:
    """A manifest without nodes, without tensors, or with unsorted tensors is refused."""
    for changes in ({"nodes": ()}, {"tensors": ()}, {"tensors": TENSORS[::-1]}):
        with pytest.raises(CheckpointError):
            root(**changes)
    with pytest.raises(CheckpointError, match="state of step 41"):
        root(state=training_state(41))


def test_a_node_record_joins_the_rows_of_its_workers() -> None:
    """The rows of a node's workers are joined. A gap, another shape, and an unknown tensor are refused."""
    record = documents()["record"]
    assert isinstance(record, NodeRecord)
    assert record.rows_of(TENSORS) == (0, 0, 0, 8)
    with pytest.raises(CheckpointError, match="no tensor of"):
        record.rows_of(TENSORS[:1])
    with pytest.raises(CheckpointError, match="expected F32"):
        record.rows_of((TENSORS[0], replace(TENSORS[1], global_shape=(10, 4))))
    torn = replace(record, files=(shard(1, piece(0, 4)), shard(2, piece(6, 10))))
    with pytest.raises(CheckpointError, match="rows 4 to 6 are missing"):
        torn.rows_of(TENSORS)
    for files in ((), record.files[::-1], record.files[1:]):
        with pytest.raises(CheckpointError, match=r"expected those of ranks 1, \.\.\."):
            replace(record, files=files)


def test_only_the_first_notice_lists_all_tensors() -> None:
    """The first notice lists all tensors; every notice has the SHA-256 of that list."""
    notice = documents()["notice"]
    assert isinstance(notice, NodeNotice)
    assert notice.ranks == range(1)
    for changes in (
        {"tensors": ()},
        {"tensors_sha256": "0" * 64},
        {"first_rank": 2, "share": share(2, (99,), (0, 0, 8, 10))},
        {"first_rank": 2, "tensors": ()},
    ):
        with pytest.raises(CheckpointError):
            replace(notice, **changes)
    replace(notice, first_rank=2, share=share(2, (99,), (0, 0, 8, 10)), tensors=())


@pytest.mark.parametrize("kind", documents())
def test_every_flipped_bit_of_a_document_is_detected(kind: str) -> None:
    """A document with one flipped bit, or truncated anywhere, does not decode."""
    document, data = documents()[kind], bytes_of(kind)
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with pytest.raises(CheckpointError):
                type(document).from_bytes(bytes(changed))
        with pytest.raises(CheckpointError):
            type(document).from_bytes(data[:position])


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([(0, 4), (5, 10)], "rows 4 to 5 are missing"),
        ([(0, 4), (3, 10)], "rows 3 to 4 are there twice"),
        ([(0, 4), (4, 9)], "rows 9 to 10 are missing"),
        ([(1, 4), (4, 10)], "rows 0 to 1 are missing"),
        ([(0, 10), (0, 10)], "rows 0 to 10 are there twice"),
    ],
)
def test_slices_must_tile_every_tensor(files: list[tuple[int, int]], reason: str) -> None:
    """A manifest is refused if its slices have a gap or an overlap."""
    with pytest.raises(CheckpointError, match=reason):
        manifest(*(shard(rank, piece(*rows)) for rank, rows in enumerate(files)))


def test_slices_of_a_tensor_must_have_one_dtype_and_shape() -> None:
    """Pieces with different dtypes or shapes are refused."""
    with pytest.raises(CheckpointError, match="another dtype or shape"):
        manifest(shard(0, piece(0, 4)), shard(1, piece(4, 10, dtype="BF16")))
    with pytest.raises(CheckpointError, match="another dtype or shape"):
        manifest(shard(0, piece(0, 4)), shard(1, piece(4, 10, global_shape=(10, 4))))


@pytest.mark.parametrize(
    "changes",
    [
        {"files": ()},
        {"files": (shard(0),)},
        {"files": (shard(1, piece(0, 10)),)},
        {"directory": "ckpt/0000000041-g1-0a1b2c3d"},
        {"directory": "ckpt/0000000040-g2-0a1b2c3d"},
        {"directory": "ckpt/../../etc"},
        {"state": training_state(41)},
        {"run_id": ""},
        {"run_id": "a\nb"},
    ],
)
def test_a_manifest_is_bound_to_its_place(changes: dict[str, Any]) -> None:
    """A manifest is refused if its files, directory, step and state do not belong together."""
    with pytest.raises(CheckpointError):
        dataclasses.replace(whole(), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "model/../x"},
        {"name": "weights/x"},
        {"name": "model/"},
        {"name": "model/x\n"},
        {"name": 5},
        {"dtype": "I8"},
        {"global_shape": ()},
        {"global_shape": (10, 0)},
        {"global_shape": [10, 3]},
        {"global_shape": (10.0, 3)},
        {"first_row": -1},
        {"first_row": True},
        {"first_row": 4},
        {"end_row": 11},
        {"offset": 7},
        {"offset": 1 << 60},
        {"block_rows": 0},
        {"block_rows": 1},
        {"block_crc32": (1,)},
        {"block_crc32": (1, -1)},
        {"block_crc32": (1, 1 << 32)},
        {"global_shape": (10, 1 << 20)},
    ],
)
def test_absurd_slices_are_refused(changes: dict[str, Any]) -> None:
    """A slice with an impossible name, shape, range or CRC list is an error in one line."""
    with pytest.raises(CheckpointError) as caught:
        piece(**changes)
    assert "\n" not in str(caught.value)


def test_bytes_of_a_file_are_used_once() -> None:
    """Slices that overlap in the file, end after it, or occur twice are refused."""
    with pytest.raises(CheckpointError, match="overlap"):
        shard(0, piece(0, 4), piece(0, 4, name="model/b", offset=300))
    with pytest.raises(CheckpointError, match="outside"):
        shard(0, piece(0, 4, offset=4096 - 47))
    with pytest.raises(CheckpointError, match="twice"):
        shard(0, piece(0, 4), piece(4, 8, offset=400))
    for key in ("/etc/passwd", "ckpt/../x", "a//b", "ckpt/x y", "ckpt/x/"):
        with pytest.raises(CheckpointError):
            ShardFile(key, 4096, "a" * 64, ())


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": 40.0},
        {"step": 10**10},
        {"optimizer_step": 41},
        {"optimizer_step": -1},
        {"skipped_in_a_row": 1},
        {"tokenizer_sha256": "e" * 63},
        {"data_fingerprint": None},
    ],
)
def test_absurd_training_states_are_refused(changes: dict[str, Any]) -> None:
    """A training state with a value out of bounds is an error that names the field."""
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        training_state(**{"step": 40, **changes})


def test_json_has_exactly_the_known_fields() -> None:
    """A missing field, an unknown field, and a value that is not an object are refused by name."""
    values = training_state(40).to_json()
    assert TrainingState.from_json(json.dumps(values)) == training_state(40)
    without = {key: values[key] for key in values if key != "optimizer_step"}
    with pytest.raises(CheckpointError, match="missing field 'optimizer_step'"):
        TrainingState.from_json(json.dumps(without))
    with pytest.raises(CheckpointError, match="unknown field 'world_size'"):
        TrainingState.from_json(json.dumps(values | {"world_size": 3}))
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        TrainingState.from_json("[1]")
    with pytest.raises(CheckpointError, match="block_crc32 = 3, expected a JSON array"):
        TensorSlice.from_json(json.dumps(piece().to_json() | {"block_crc32": 3}))
    for number in ("40.0", "true", "1e2", '"40"', "NaN"):
        text = json.dumps(values).replace(": 40", f": {number}", 1)
        with pytest.raises(CheckpointError):
            TrainingState.from_json(text)


@pytest.mark.parametrize("change", [{"schema": 2}, {"kind": "checkpoint part"}, {"extra": 1}])
def test_documents_of_another_schema_are_refused(change: dict[str, Any]) -> None:
    """A manifest of an unknown schema or kind, or with an unknown field, is refused."""
    content = json.loads(EARLIER["manifest of schema 1"]) | change
    schema, kind = content.pop("schema"), content.pop("kind")
    del content["sha256"]
    with pytest.raises(CheckpointError):
        FullManifest.from_bytes(sealed(kind, schema, content))


def test_a_document_of_a_later_version_is_a_config_error() -> None:
    """A newer schema is a `ConfigError`, so that the agent does not quarantine a good checkpoint."""
    content = json.loads(root().to_bytes())
    del content["schema"], content["sha256"]
    kind = content.pop("kind")
    with pytest.raises(
        ConfigError, match=r"schema 4 .* is of a later version .*, or schema 3 at most"
    ):
        RootManifest.from_bytes(sealed(kind, 4, content))


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"schema":1}'])
def test_bytes_that_are_no_document_are_refused(data: bytes) -> None:
    """Any bytes under a manifest's key decode or raise `CheckpointError`."""
    with pytest.raises(CheckpointError):
        FullManifest.from_bytes(data)


@settings(deadline=None)
@given(st.integers(0, 9_999_999_999), st.integers(0, 9_999_999_999))
def test_directory_names_say_step_and_generation(step: int, generation: int) -> None:
    """A directory's name is made from step, generation and nonce, and parses to them."""
    name = parse_directory(checkpoint_directory(step, generation, "9f3c"))
    assert (name.step, name.generation, name.nonce) == (step, generation, "9f3c")


@settings(deadline=None)
@given(st.integers(1, 1 << 26), st.integers(1, 1 << 30))
def test_blocks_are_bounded(row_bytes: int, rows: int) -> None:
    """A block has at most 1 MiB, unless it is a single row, and at least one row."""
    block_rows = rows_per_block(row_bytes, rows)
    assert 1 <= block_rows <= rows
    assert block_rows == 1 or block_rows * row_bytes <= 1 << 20
