"""Permanent checkpoints with the real committer: which are committed, named, removed, listed, and used after damage."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_pt.agent.checkpointing import choose_resume
from elastic_pt.checkpoint.commit import directory_of
from elastic_pt.checkpoint.verify import verify
from elastic_pt.report.checkpoints import read_checkpoints
from elastic_pt.report.status import open_run
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Commit, Kind
from elastic_pt.store.open import open_store
from tests.checkpoint.committing import WAIT_S, World

FAR_S = 60.0


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A run with `keep` = 1 and permanent checkpoints at multiples of 10; in a directory, or on the server of a parameter."""
    server = getattr(request, "param", "")
    url = request.getfixturevalue(f"{server}_url") if server else f"file://{tmp_path}"
    url = f"{url}/run"
    world = World(tmp_path, keep=1, keep_every_steps=10, store=open_store(url, timeout_s=FAR_S))
    yield world
    world.committer.close(WAIT_S)


@pytest.mark.parametrize(
    "world",
    [
        "",
        pytest.param("moto", marks=pytest.mark.moto),
        pytest.param("ceph", marks=pytest.mark.ceph),
    ],
    indirect=True,
)
def test_permanent_checkpoints_stay_and_no_commit_names_all_of_them(world: World) -> None:
    """The first commit at or after each multiple stays with all its files; of the others only the newest two stay."""
    for step in (4, 8, 12, 16, 20, 24, 28):
        world.commit(step)
    world.committer.close(WAIT_S)
    assert [step for step in range(30) if world.there(step)] == [12, 20, 24, 28]
    commit = world.log.view.commit
    assert commit is not None
    assert [(each.step, each.permanent) for each in commit.checkpoints] == [
        (28, False),
        (24, False),
    ]

    run = open_run(world.store.url)
    reports = read_checkpoints(run)
    assert [each.checkpoint.step for each in reports] == [28, 24, 20, 12]
    assert [each.checkpoint.permanent for each in reports] == [False, False, True, True]
    for report in reports:
        assert isinstance(report.committed.body, Commit)
        assert report.committed.body.newest == report.checkpoint
        assert verify(run.store, report.checkpoint, run.log.view.run_id) == []


def test_a_reader_opens_the_log_without_reading_the_chain(world: World) -> None:
    """Opening a run makes no request for permanent checkpoints; listing them makes one request each, once."""
    for step in (10, 20, 30, 32, 34):
        world.commit(step)
    late = RunLog(world.store, writer="late")
    world.store.requests.clear()
    view = late.refresh()
    opening = world.store.requests["read log"]
    assert [each.step for each in view.checkpoints] == [34, 32]
    for wanted in (3, 3):
        assert [each.step for each, _ in late.permanent(view)] == [30, 20, 10]
        assert world.store.requests["read log"] == opening + wanted


def test_a_run_falls_back_to_a_permanent_checkpoint(world: World) -> None:
    """When all newer checkpoints are damaged, a start resumes from the newest permanent one that is whole."""
    for step in (10, 20, 22, 24):
        world.commit(step)
    world.committer.close(WAIT_S)
    for step in (24, 22, 20):
        world.store.delete(f"{directory_of(world.generation, step)}/manifest.json")
    log = RunLog(world.store, writer="z")
    resume = choose_resume(world.store, log, log.refresh(), "another life")
    assert resume is not None
    assert (resume.step, resume.permanent) == (10, True)
    quarantined = {directory_of(world.generation, step) for step in (20, 22, 24)}
    assert log.refresh().quarantined == quarantined


def test_after_a_fall_back_the_same_multiple_is_permanent_again(world: World) -> None:
    """A run that fell back to a step before a damaged permanent checkpoint commits another one at the same multiple."""
    for step in (10, 20):
        world.commit(step)
    world.step_back()
    assert next(world.log.usable(world.log.view), None) is None
    world.succeed()
    for step in (6, 12, 18, 20):
        world.commit(step)
    permanent = [(each.step, each.generation) for each, _ in world.log.permanent(world.log.view)]
    assert permanent == [(20, 2), (12, 2), (20, 1), (10, 1)]
    assert [each.step for each in world.log.usable(world.log.view)] == [20, 18, 12]


def test_an_earlier_version_refuses_the_schema_of_permanent_commits(world: World) -> None:
    """A COMMIT before the first permanent checkpoint has schema 1; that one and all later ones have schema 2."""
    for step in (4, 8, 12, 16):
        world.commit(step)
    commits = [each for each in world.log.records() if each.kind is Kind.COMMIT]
    assert [each.schema for each in commits] == [1, 1, 2, 2]
    assert all(each.schema == 1 for each in world.log.records() if each.kind is not Kind.COMMIT)
