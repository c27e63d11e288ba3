"""`checkpoints`: the fields of each checkpoint, and how a full or a partial check finds a wrong byte."""

import re
from pathlib import Path
from typing import Any

import pytest
from command_line import Result, assert_one_line_mistake, elastic_pt

from elastic_pt.checkpoint.commit import directory_of
from elastic_pt.checkpoint.layout import shard_key
from elastic_pt.cli import reading
from elastic_pt.cli.reading import checkpoint_line, verified_entries
from elastic_pt.report.checkpoints import read_checkpoints
from elastic_pt.report.status import open_run
from elastic_pt.runlog.records import Quarantine
from tests.checkpoint.committing import WAIT_S, World
from tests.checkpoint.world import flip


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A run with commits of steps 10 (permanent), 12, 14 and 16. It keeps the last two and the permanent one."""
    world = World(tmp_path, keep=2, keep_every_steps=10)
    for step in (10, 12, 14, 16):
        world.commit(step)
    world.committer.close(WAIT_S)
    return world


def checkpoints(world: World, *options: object) -> Result:
    """The command on that run."""
    return elastic_pt("checkpoints", world.store.url, *options)


def test_each_checkpoint_has_age_size_tier_and_permanence(world: World) -> None:
    """Each checkpoint that is kept has its age, its bytes in the bucket, its tier, and whether it is permanent."""
    entries = checkpoints(world, "--json").json
    assert [entry["step"] for entry in entries] == [16, 14, 10]
    assert [entry["permanent"] for entry in entries] == [False, False, True]
    assert all(entry["tiers"] == ["bucket"] for entry in entries)
    ages_s = [entry["age_s"] for entry in entries]
    assert sorted(ages_s) == ages_s
    assert all(0 <= age_s < 600 for age_s in ages_s)
    for entry in entries:
        keys = world.store.keys(f"{entry['directory']}/")
        sizes = [world.store.size(key) or 0 for key in keys if "notice" not in key]
        assert entry["bytes"] == sum(sizes)
    lines = checkpoints(world).out.splitlines()
    assert ["permanent" in line for line in lines] == [False, False, True]
    assert all(re.search(r" \d+ s ago  [\d.]+ MB  bucket  ", line) for line in lines)


def test_a_planted_wrong_byte_is_found(world: World) -> None:
    """--verify and --subset 100% always find it; a smaller subset finds it with some seeds, and reports its share and seed."""
    key = shard_key(directory_of(world.generation, 10), 0)
    flip(world.store, key, (world.store.size(key) or 0) // 2, 3)
    for options in ([], ["--subset", "100%"]):
        result = checkpoints(world, "--verify", "--json", *options)
        assert result.exit_code == 4
        good, better, bad = result.json
        assert (good["problems"], better["problems"]) == ([], [])
        assert key in bad["problems"][0]
        assert (bad["verified_share"], bad["seed"]) == (1, None)
    codes = set()
    for seed in range(40):
        result = checkpoints(world, "--verify", "--json", "--subset", "10%", "--seed", seed)
        entry = result.json[-1]
        assert (result.exit_code == 4) == bool(entry["problems"])
        assert 0.1 <= entry["verified_share"] < 0.6
        assert entry["seed"] == seed
        codes.add(result.exit_code)
    assert codes == {0, 4}


def test_the_output_for_people_has_the_share_and_the_seed(world: World) -> None:
    """The line of a checkpoint ends with the share that was read; the last line has the seed that repeats the check."""
    result = checkpoints(world, "--verify", "--subset", "2.5%")
    assert result.exit_code == 0
    *lines, seed = result.out.splitlines()
    assert len(lines) == 3
    assert all(re.search(r"  verified [\d.]+%$", line) for line in lines)
    assert re.fullmatch(r"repeat the choice of blocks with --seed \d+", seed)
    assert checkpoints(world, "--verify").out.splitlines()[-1].endswith("verified 100%")


def test_a_checkpoint_that_a_commit_removes_during_the_check_is_no_alarm(tmp_path: Path) -> None:
    """A check of a running run may read expired files: a checkpoint that is no longer kept is left out, not reported as damaged."""
    world = World(tmp_path, keep=2)
    for step in (1, 2):
        world.commit(step)
    run = open_run(world.store.url)
    reports = read_checkpoints(run)
    world.commit(3)
    world.committer.close(WAIT_S)
    assert not world.there(1)
    entries = [{"directory": each.checkpoint.directory} for each in reports]
    found = verified_entries(run, reports, entries, 1.0, 0)
    assert [each["directory"] for each in found] == [directory_of(world.generation, 2)]
    assert found[0]["problems"] == []


def test_checkpoints_that_are_all_removed_during_the_check_are_told_or_checked_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that commits faster than the check reads has checkpoints: the newer ones are verified, else it says why not."""
    real, calls = reading.verified_entries, []

    def removed(*facts: Any) -> list[dict[str, Any]]:
        """What a check finds if the run has removed everything meanwhile; the first `len(calls)` times."""
        calls.pop()
        return [] if calls else real(*facts)

    monkeypatch.setattr(reading, "verified_entries", removed)
    calls += [0] * 2
    assert len(checkpoints(world, "--verify").out.splitlines()) == 3
    calls += [0] * 9
    text = checkpoints(world, "--verify").out
    assert text == "newer commits have removed all 3 checkpoints during the check\n"
    assert len(calls) == 6


def test_quarantined_damage_is_reported_without_a_new_alarm(world: World) -> None:
    """A quarantined permanent checkpoint stays in the list; a daily job must still see new damage."""
    permanent, newest = (directory_of(world.generation, step) for step in (10, 16))
    flip(world.store, shard_key(permanent, 0), 2000, 3)
    assert checkpoints(world, "--verify").exit_code == 4
    world.log.append(lambda _: Quarantine(permanent, "a wrong byte"), generation=1)
    result = checkpoints(world, "--verify", "--json")
    assert result.exit_code == 0
    assert result.json[-1]["problems"]
    assert result.json[-1]["quarantine"] == "a wrong byte"
    flip(world.store, shard_key(newest, 0), 2000, 3)
    assert checkpoints(world, "--verify").exit_code == 4


def test_a_checkpoint_without_a_manifest_is_listed_with_unknown_size(world: World) -> None:
    """A deleted directory stays in the list, because the log still names it."""
    world.store.delete(f"{directory_of(world.generation, 10)}/manifest.json")
    entries = checkpoints(world, "--json").json
    assert [entry["bytes"] is None for entry in entries] == [False, False, True]
    assert "size unknown" in checkpoints(world).out.splitlines()[-1]
    assert checkpoints(world, "--verify").exit_code == 4


@pytest.mark.parametrize("subset", ["10", "0%", "101%", "-5%", "ten%", "", "1e1%"])
def test_an_invalid_subset_is_refused(world: World, subset: str) -> None:
    """The error is one line with the value and what is expected."""
    result = checkpoints(world, "--verify", "--subset", subset)
    assert_one_line_mistake(result, f"--subset {subset!r}", "expected more than 0%")


@pytest.mark.parametrize("option", [("--subset", "10%"), ("--seed", 3)])
def test_a_subset_without_verify_is_refused(world: World, option: tuple[object, ...]) -> None:
    """Without --verify, --subset and --seed would have no effect."""
    assert_one_line_mistake(checkpoints(world, *option), "expected --verify too")


@pytest.mark.parametrize(
    ("age_s", "size", "text"),
    [
        (0.4, 999, "0 s ago  999 B"),
        (119, 12_345, "119 s ago  12.3 kB"),
        (3600, 10**9, "60 min ago  1 GB"),
        (7200, 1_230_000_000_000, "2 h ago  1.23 TB"),
        (30 * 86_400, None, "30 days ago  size unknown"),
    ],
)
def test_ages_and_sizes_are_readable(age_s: float, size: int | None, text: str) -> None:
    """Units fit the value."""
    entry = {
        "step": 5,
        "loss": None,
        "age_s": age_s,
        "bytes": size,
        "tiers": ["bucket"],
        "permanent": False,
        "directory": "ckpt/x",
        "quarantine": None,
    }
    assert checkpoint_line(entry) == f"step 5  {text}  bucket  ckpt/x"
