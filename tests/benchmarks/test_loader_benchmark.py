"""`benchmarks/loader.py`, whole, with a small corpus: every line runs, and the JSON is complete. Speeds are not judged."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.loader import CASES, PEERS, REMOTE, VALUES
from benchmarks.loader_servers import MadeUp
from elastic_pt.data.manifest import HASH_BYTES, Manifest, Stream, blocks_key, page_shards
from elastic_pt.data.shard_writer import BLOCK_TOKENS
from tests.services.fixtures import MOTO_SERVER, left_out

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240.0


def test_made_up_data_of_any_size_verifies() -> None:
    """The hashes of pages, indexes and blocks hold, and no two shards share their index, which names them in a cache."""
    made_up = MadeUp(2 * 10**9)
    found = made_up.object("manifest.json")
    assert found is not None
    assert isinstance(found[1], bytes)
    stream = Manifest.from_json(found[1]).sources[0].train
    assert isinstance(stream, Stream)
    shards = []
    for page in stream.pages:
        content = made_up.object(page.key)
        assert content is not None
        assert isinstance(content[1], bytes)
        shards += page_shards(content[1], page, origin=page.key)
    assert len({each.sha256 for each in shards}) == len(shards) == 60
    content = made_up.object(blocks_key(shards[-1].key))
    assert content is not None
    index = content[1]
    assert isinstance(index, bytes)
    assert hashlib.sha256(index).hexdigest() == shards[-1].sha256
    size, number = made_up.object(shards[-1].key) or (0, b"")
    assert isinstance(number, int)
    assert size == 2 * shards[-1].tokens
    block_bytes = 2 * BLOCK_TOKENS
    two = b"".join(made_up.parts(number, 5 * block_bytes, 7 * block_bytes))
    for place in (0, 1):
        digest = hashlib.sha256(two[place * block_bytes : (place + 1) * block_bytes]).digest()
        assert digest == index[(5 + place) * HASH_BYTES : (6 + place) * HASH_BYTES]


@pytest.mark.moto
def test_readers_are_measured_side_by_side(tmp_path: Path) -> None:
    """Each reader has all values in each case, or null where it does not read, or an error; each target is judged."""
    if not MOTO_SERVER.exists():
        left_out("the loader's benchmark, which needs the moto S3 server")
    output = tmp_path / "loader.json"
    command = [sys.executable, "benchmarks/loader.py", "--quick", "--json", str(output)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(output.read_text())
    for case in CASES:
        values = report["ours"][case]
        assert set(VALUES) <= set(values), values
        assert values["tokens_per_s"] > 0
        assert values["seek_ms"] > 0
        assert values["fetch_ms"] > 0
    for case in REMOTE:
        assert report["ours"][case]["read_amplification"] > 1
        assert (
            0 < report["ours"][case]["cache_bytes_peak"] <= report["ours"][case]["cache_bytes_max"]
        )
        assert report["plain_range_reads"][case]["bytes_per_s"] > 0
        assert report["ratios"][f"{case}_to_plain_range_reads"] > 0
    for peer in PEERS:
        local = report[peer]["local"]
        assert "error" in report[peer] or set(VALUES) <= set(local)
        if peer != "mosaic":
            assert report[peer]["s3_0ms"] is report[peer]["s3_30ms"] is None
    assert set(report["read_amplification_by_nodes"]) == {"1", "4", "16"}
    assert 0 < report["tb_manifest_bytes"] <= 10**6
    assert len(report["targets"]) == 4 + 2 * len(CASES) + 2 * len(REMOTE) + 4
