"""A worker tells if the cache of its machine cannot hold what the machine's slots read together."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from elastic_pt.data.lanes import Lanes
from elastic_pt.data.manifest import Manifest, Shard, Source
from elastic_pt.data.plan import DataPlan
from elastic_pt.train.worker import warn_of_small_cache
from tests.train.world import config_for


@pytest.mark.parametrize(
    ("url", "cache_bytes", "share", "expected"),
    [
        ("s3://bucket/data", 1_900_000, 1.0, 1),
        ("s3://bucket/data", 2_200_000, 1.0, 0),
        ("s3://bucket/data", 900_000, 0.5, 1),
        ("s3://bucket/data", 1_100_000, 0.5, 0),
        ("file:///data", 1_900_000, 1.0, 0),
    ],
)
def test_small_cache_is_told(
    tmp_path: Path, url: str, cache_bytes: int, share: float, expected: int
) -> None:
    """One warning with both sizes if this machine's part of the open tokens is more than the cache; none for local files."""
    config = config_for(tmp_path, f"data.url={url}", f"data.cache_bytes={cache_bytes}")
    source = Source("s", 1.0, 1, (Shard("s", 10**7, "0" * 64),), 0, 0, ())
    manifest = Manifest(300, "uint16", "", 0, "t", "0" * 64, 0.0, (source,), {})
    plan = DataPlan(manifest, 16, 0, 8, Lanes(1, 10**6))
    with capture_logs() as logs:
        warn_of_small_cache(config, plan, share)
    assert [each["event"] for each in logs] == ["data_cache_small"] * expected
    for each in logs:
        assert each["cache_bytes"] == cache_bytes
        assert each["open_bytes"] == pytest.approx(2_000_000 * share, rel=0.1)
