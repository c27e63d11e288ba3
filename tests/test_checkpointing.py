"""Where a new generation goes on: what is taken on trust, and what is looked at."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from elastic_pt.checkpointing import Checkpointing, choose_resume
from elastic_pt.elastic.log import RunLog
from elastic_pt.elastic.node import Formed, Node
from elastic_pt.elastic.records import Checkpoint, Commit
from elastic_pt.errors import CheckpointError
from elastic_pt.store.open import open_store
from elastic_pt.telemetry.catalogue import Metrics
from tests.elastic.bucket import WatchedStore
from tests.elastic.world import generation, member
from tests.train.world import config_for

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


def test_what_dead_workers_left_in_staging_is_swept(tmp_path: Path) -> None:
    """At a stop and at a start everything that no upload waits for goes; files of another kind stay."""
    staging = tmp_path / "staging"
    staging.mkdir()
    node = SimpleNamespace(member=member("a"), must_reform=lambda _: False)
    store = open_store(f"file://{tmp_path}/run")
    checkpointing = Checkpointing(
        config_for(tmp_path),
        store,
        RunLog(store, writer="a"),
        cast(Node, node),
        Metrics(),
        staging,
        formed=lambda: cast(Formed, None),
        release=lambda _: None,
    )
    for act in (checkpointing.stopped, checkpointing.starts):
        left = ("0000000007-g2-rank-0.safetensors", ".0000000008-g3-rank-1.safetensors.4711.tmp")
        for name in (*left, "agent.sock", "assignment.json"):
            (staging / name).write_bytes(b"x")
        act()
        assert {path.name for path in staging.iterdir()} == {"agent.sock", "assignment.json"}
    checkpointing.close(10)
