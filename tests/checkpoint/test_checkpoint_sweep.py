"""Sweeps: the committing node removes attempts that cannot be committed any more, at an interval."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from elastic_pt.chaos.s3_faults import Answer, Hang
from elastic_pt.chaos.s3_proxy import FaultProxy
from elastic_pt.checkpoint.commit import directory_of
from elastic_pt.checkpoint.layout import checkpoint_directory, shard_key
from elastic_pt.checkpoint.retention import listed_directories
from elastic_pt.checkpoint.sweep import OVERTAKEN_AGE_S, SWEEP_INTERVAL_S, Sweeper
from elastic_pt.doctor.bucket import rules_and_clock
from elastic_pt.errors import AccessDenied
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Checkpoint, Commit
from elastic_pt.store.open import open_store
from elastic_pt.store.port import KeepsUnfinished, Store, UnfinishedUpload
from elastic_pt.store.s3 import PART_BYTES
from tests.checkpoint.committing import WAIT_S, World
from tests.membership.world import generation

DENIED = "no permission to list them"


class Swept:
    """A run whose log has generation 2 and a commit of step 50, and a sweeper with a settable clock."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.log = RunLog(store, writer="a")
        self.log.append(lambda _: generation("a"), generation=0)
        self.replace()
        self.view = self.commit(50)
        self.now_s = 1000.0
        self.sweeper = Sweeper(store, self.log, now=lambda: self.now_s)

    def replace(self) -> None:
        """The next generation starts."""
        number = self.log.view.generation_number
        found = replace(generation("a"), number=number + 1)
        self.log.append(lambda _: found, generation=number)

    def commit(self, step: int) -> RunView:
        """A commit of the current generation; its files do not matter here."""
        number = self.log.view.generation_number
        name = checkpoint_directory(step, number, "abcd")
        newest = Checkpoint(step, number, name, 1, "0" * 64, None)
        self.store.write(shard_key(name, 0), b"whole")
        self.view = self.log.append(lambda _: Commit((newest,), "history/x"), generation=number)
        return self.view

    def attempt(self, step: int, number: int) -> str:
        """An upload without a commit."""
        name = checkpoint_directory(step, number, "beef")
        self.store.write(shard_key(name, 0), b"half")
        return name

    def sweep(self, *, last: bool = False) -> list[str]:
        """Sweep, and return the directories that are left."""
        self.sweeper.sweep(self.view, last=last)
        return listed_directories(self.store)


@pytest.fixture
def swept(tmp_path: Path) -> Swept:
    """Such a run in a directory."""
    return Swept(open_store(f"file://{tmp_path}/run"))


def test_only_attempts_of_replaced_generations_are_removed_at_once(swept: Swept) -> None:
    """Attempts of generation 1 up to step 50 are removed at once; later steps, generation 2 and newer ones stay."""
    gone = [swept.attempt(40, 1), swept.attempt(50, 1)]
    stay = [swept.attempt(60, 1), swept.attempt(40, 2), swept.attempt(60, 2), swept.attempt(40, 3)]
    found = swept.sweep()
    assert set(stay) <= set(found)
    assert not set(gone) & set(found)


def test_an_overtaken_attempt_of_the_current_generation_is_removed_after_an_hour(
    swept: Swept,
) -> None:
    """The hour counts from the first sweep that saw the attempt as overtaken, for each attempt separately."""
    early = swept.attempt(40, 2)
    assert early in swept.sweep()
    swept.now_s += OVERTAKEN_AGE_S - 1
    late = swept.attempt(45, 2)
    assert {early, late} <= set(swept.sweep())
    swept.now_s += SWEEP_INTERVAL_S
    found = swept.sweep()
    assert early not in found
    assert late in found


def test_sweeps_have_an_interval_and_the_last_commit_always_sweeps(swept: Swept) -> None:
    """Commits within the interval list nothing; the run's last commit sweeps at any time."""
    swept.sweep()
    torn = swept.attempt(40, 1)
    swept.now_s += SWEEP_INTERVAL_S - 1
    assert torn in swept.sweep()
    swept.now_s += 1
    assert torn not in swept.sweep()
    torn = swept.attempt(40, 1)
    assert torn in swept.sweep()
    assert torn not in swept.sweep(last=True)


def test_a_node_whose_generation_was_replaced_removes_nothing(swept: Swept) -> None:
    """When the log has a newer generation, only the committing node of that generation sweeps."""
    torn = swept.attempt(40, 1)
    swept.replace()
    assert torn in swept.sweep()
    swept.commit(55)
    assert torn not in swept.sweep(last=True)


def test_the_removals_of_one_sweep_are_limited(
    swept: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several sweeps remove a large number of torn attempts."""
    monkeypatch.setattr("elastic_pt.checkpoint.sweep._DIRECTORIES_MAX", 2)
    for step in range(5):
        swept.attempt(step, 1)
    assert [len(swept.sweep(last=True)) - 1 for _ in range(3)] == [3, 1, 0]


def test_the_committer_sweeps_and_keeps_permanent_checkpoints(tmp_path: Path) -> None:
    """With the real committer: a commit removes the upload of an old generation and keeps its permanent checkpoint."""
    world = World(tmp_path, keep=1, keep_every_steps=10)
    for step in (10, 12):
        world.commit(step)
    world.upload(14)
    torn = directory_of(world.generation, 14)
    permanent = directory_of(world.generation, 10)
    world.committer.close(WAIT_S)
    world = World(tmp_path, keep=1, keep_every_steps=10, generation_number=2)
    for step in (16, 18, 19):
        world.commit(step)
    world.committer.close(WAIT_S)
    found = listed_directories(world.store)
    assert torn not in found
    assert permanent in found
    assert len(found) == 3
    assert world.untidied == []


UPLOAD = """
import sys
from elastic_pt.store.open import open_store
open_store(sys.argv[1]).write(sys.argv[2], bytes(int(sys.argv[3])))
"""


@pytest.fixture(
    params=[
        pytest.param("moto", marks=pytest.mark.moto),
        pytest.param("ceph", marks=pytest.mark.ceph),
    ]
)
def bucket(request: pytest.FixtureRequest) -> str:
    """A run's URL on an S3 server."""
    return str(request.getfixturevalue(f"{request.param}_url")) + "/run"


def test_parts_that_a_killed_writer_left_are_swept(bucket: str) -> None:
    """SIGKILL between two parts leaves parts that no listing shows; a sweep of the next generation removes them."""
    swept = Swept(open_store(bucket))
    assert isinstance(swept.store, KeepsUnfinished)
    directory = checkpoint_directory(40, 1, "beef")
    key = shard_key(directory, 0)
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        # Two of three parts succeed; the third gets no answer.
        proxy.strike(Hang(), methods=["PUT"], after=2)
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint}
        command = [sys.executable, "-c", UPLOAD, bucket, key, str(2 * PART_BYTES + 1)]
        writer = subprocess.Popen(command, env=environment)
        try:
            wait_until(lambda: proxy.requests["PUT"] >= 3)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait(WAIT_S)
    assert swept.store.keys(directory) == []
    assert [each.key for each in swept.store.unfinished("ckpt/")] == [key]
    swept.sweep()
    assert swept.store.unfinished("") == []


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; fail after `WAIT_S`."""
    give_up_at_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up_at_s
        threading.Event().wait(0.01)


def begin_upload(bucket: str, key: str) -> None:
    """Start a multipart upload and do not finish it."""
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    name, _, root = bucket.removeprefix("s3://").partition("/")
    filesystem.call_s3("create_multipart_upload", Bucket=name, Key=f"{root}/{key}")


@pytest.mark.ceph
def test_unfinished_uploads_are_listed_page_by_page_with_their_age(
    ceph_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each upload is listed once, over several pages, with its age on the server's clock; other prefixes are not listed."""
    bucket = f"{ceph_url}/run"
    keys = [f"ckpt/x/{number}" for number in range(5)]
    for key in [*keys, "history/x"]:
        begin_upload(bucket, key)
    begin_upload(f"{ceph_url}/other", "ckpt/x/0")
    monkeypatch.setattr("elastic_pt.store.s3.UNFINISHED_PER_PAGE", 2)
    store = open_store(bucket)
    assert isinstance(store, KeepsUnfinished)
    found = store.unfinished("ckpt/")
    assert sorted(each.key for each in found) == keys
    assert all(-2 <= each.age_s < 600 for each in found)
    monkeypatch.setattr("elastic_pt.store.s3.UNFINISHED_PAGES_MAX", 2)
    assert len(store.unfinished("ckpt/")) == 4
    store.abandon(found[0])
    store.abandon(found[0])
    assert len(store.unfinished("history/")) == 1


class Forbidding:
    """A store that refuses to list unfinished uploads."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def unfinished(self, prefix: str) -> list[UnfinishedUpload]:
        """See `KeepsUnfinished`."""
        raise AccessDenied(DENIED)

    def abandon(self, upload: UnfinishedUpload) -> None:
        """See `KeepsUnfinished`."""
        raise AssertionError

    def expires_unfinished(self, prefix: str) -> bool:
        """See `KeepsUnfinished`."""
        raise AssertionError


def test_a_missing_permission_to_list_uploads_does_not_fail_the_sweep(tmp_path: Path) -> None:
    """Attempts are still removed. Only the bucket's lifecycle rule then removes the parts of uploads."""
    swept = Swept(Forbidding(open_store(f"file://{tmp_path}/run")))  # type: ignore[arg-type]
    assert isinstance(swept.store, KeepsUnfinished)
    torn = swept.attempt(40, 1)
    assert torn not in swept.sweep()


RULE = {
    "ID": "parts",
    "Status": "Enabled",
    "Filter": {"Prefix": ""},
    "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 2},
}


@pytest.mark.parametrize(
    ("changes", "expires"),
    [
        ({}, True),
        ({"Filter": {"Prefix": "run/"}}, True),
        ({"Filter": {"Prefix": "other/"}}, False),
        ({"Status": "Disabled"}, False),
        (None, False),
    ],
    ids=["the whole bucket", "the run", "another prefix", "disabled", "no rules"],
)
def test_a_start_warns_without_a_rule_for_unfinished_uploads(
    bucket: str, changes: dict[str, Any] | None, expires: bool
) -> None:
    """F34: an agent warns at its start if no rule of the bucket removes unfinished uploads of the run's checkpoints."""
    if changes is not None:
        filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
        filesystem.call_s3(
            "put_bucket_lifecycle_configuration",
            Bucket=bucket.removeprefix("s3://").partition("/")[0],
            LifecycleConfiguration={"Rules": [RULE | changes]},
        )
    assert [(each.name, each.ok) for each in rules_and_clock(open_store(bucket))] == [
        ("lifecycle_rule", expires),
        ("clock", True),
    ]


@pytest.mark.moto
@pytest.mark.parametrize(
    ("status", "warned"),
    [(403, ["cannot be read: access denied"]), (501, [])],
    ids=["not permitted", "not known to the server"],
)
def test_unreadable_rules_do_not_stop_a_start(
    moto_url: str, monkeypatch: pytest.MonkeyPatch, status: int, warned: list[str]
) -> None:
    """F34: if the rules may not be read, the agent says so and starts; it does not if the server knows no rules."""
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.strike(Answer(status, "Refused"), methods=["GET"])
        store = open_store(f"{moto_url}/run", timeout_s=5.0)
        assert [each.found for each in rules_and_clock(store) if not each.ok] == warned
    assert proxy.requests["GET"] >= 1
