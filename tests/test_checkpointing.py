"""Where a new generation goes on: what is taken on trust, and what is looked at."""

from pathlib import Path

import pytest

from elastic_pt.checkpointing import choose_resume
from elastic_pt.elastic.log import RunLog
from elastic_pt.elastic.records import Checkpoint, Commit
from elastic_pt.errors import CheckpointError
from elastic_pt.store.open import open_store
from tests.elastic.bucket import WatchedStore
from tests.elastic.world import generation, member

COMMITTED = Checkpoint(7, 1, "ckpt/0000000007-g1-abcd", 1, "0" * 64, 1.0)


@pytest.fixture
def bucket(tmp_path: Path) -> WatchedStore:
    """A run whose only checkpoint, committed by generation 1 of node a, has lost its files since."""
    bucket = WatchedStore(open_store(f"file://{tmp_path}"))
    log = RunLog(bucket, writer="a")
    log.append(lambda _: generation("a"), generation=0)
    log.append(lambda _: Commit((COMMITTED,), "history/x"), generation=1)
    return bucket


def test_a_member_takes_what_its_own_generation_committed(bucket: WatchedStore) -> None:
    """A recovery asks the bucket nothing about files that were all looked at when they were committed, moments ago."""
    log = RunLog(bucket, writer="a")
    view = log.refresh()
    bucket.requests.clear()
    assert choose_resume(bucket, log, view, member("a").incarnation) == COMMITTED
    assert bucket.requests.total() == 0


def test_new_nodes_look_at_every_file_first(bucket: WatchedStore) -> None:
    """Who takes a run up, perhaps days later, puts on record which checkpoints have become unusable."""
    log = RunLog(bucket, writer="z")
    with pytest.raises(CheckpointError, match="none of the committed checkpoints is usable"):
        choose_resume(bucket, log, log.refresh(), member("z").incarnation)
    assert log.refresh().quarantined == {COMMITTED.directory}
