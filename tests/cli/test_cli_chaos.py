"""`elastic-pt chaos`: what it lists, what it refuses in one line, and how it ends. The runs are made up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_one_line_mistake, elastic_pt

from elastic_pt.chaos import run as run_module
from elastic_pt.chaos.kinds import Need
from elastic_pt.chaos.machine import Machine
from elastic_pt.chaos.play import Happening
from elastic_pt.chaos.result import Result
from elastic_pt.chaos.scenario import Scenario
from tests.chaos import results

MINE = 'hypothesis = "x"\nstore = "directory"\n[[faults]]\nkind = "kill_node"\nat = { step = 3 }\n'


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[tuple[str, int]]]:
    """Runs that are over at once, with a verdict; returns the names and seeds that were played."""

    def answer(passed: bool) -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []

        def play(
            workbench: object, scenario: Scenario, seed: int, out: Path, **rest: Any
        ) -> Result:
            out.mkdir(parents=True)
            seen.append((scenario.name, seed))
            rest["tell"](Happening(0.1, "stop", "step 48: completed"))
            found = results.result(out, passed=passed)
            return Result(found.played, found.verdicts, found.costs, found.goodput, rest["replay"])

        monkeypatch.setattr(run_module, "run_scenario", play)
        return seen

    return answer


def test_list_has_at_least_35_scenarios_with_their_keys() -> None:
    """A program reads what there is."""
    found = elastic_pt("chaos", "list", "--json").json
    assert len({each["name"] for each in found}) >= 35
    assert all(each["hypothesis"] and each["faults"] is not None for each in found)
    assert sum(each["quick"] for each in found) >= 15


def test_list_says_what_cannot_be_played_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root, the reason is below the name."""
    monkeypatch.setattr(
        Machine,
        "lacks",
        lambda self, needs: "no network (which need root)" * (Need.NETWORK in needs),
    )
    out = elastic_pt("chaos", "list").out
    assert "not here: no network (which need root)" in out


def test_a_failed_run_ends_with_1_and_its_replay_command(
    played: Callable[[bool], list[tuple[str, int]]], tmp_path: Path
) -> None:
    """The last line plays it again."""
    (tmp_path / "mine.toml").write_text(MINE)
    seen = played(False)
    result = elastic_pt(
        "chaos", "run", tmp_path / "mine.toml", "--seed", 7, "--out", tmp_path / "o"
    )
    assert result.exit_code == 1
    assert seen == [("mine", 7)]
    assert result.out.splitlines()[-1].endswith(f"chaos run {tmp_path / 'mine.toml'} --seed 7")
    assert (tmp_path / "o" / "index.html").exists()
    assert (tmp_path / "o" / "mine-7" / "report.html").exists()


def test_a_run_that_breaks_hides_no_other(
    played: Callable[[bool], list[tuple[str, int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told with its command and its traceback; the others are played, and the command fails."""
    seen = played(True)
    play = run_module.run_scenario

    def breaks_once(workbench: Any, scenario: Any, *rest: Any, **more: Any) -> Any:
        if scenario.name == "first":
            raise IndexError("list index out of range")
        return play(workbench, scenario, *rest, **more)

    monkeypatch.setattr(run_module, "run_scenario", breaks_once)
    for name in ("first", "second"):
        (tmp_path / f"{name}.toml").write_text(MINE)
    both = (tmp_path / "first.toml", tmp_path / "second.toml")
    result = elastic_pt("chaos", "run", *both, "--out", tmp_path / "o", "--json")
    assert result.exit_code == 1
    assert [name for name, _ in seen] == ["second"]
    (broken,) = result.json["broken"]
    assert broken.endswith(f"chaos run {both[0]} --seed 1")
    assert "IndexError" in (tmp_path / "o" / "first-1" / "error.txt").read_text()


def test_what_cannot_be_played_is_left_out_and_never_passed(
    played: Callable[[bool], list[tuple[str, int]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is named in the JSON; if nothing is left, the command fails."""
    seen = played(True)
    monkeypatch.setattr(Machine, "lacks", lambda self, needs: "no bucket" if needs else "")
    (tmp_path / "mine.toml").write_text(MINE)
    (tmp_path / "other.toml").write_text(MINE.replace("directory", "bucket"))
    both = (tmp_path / "mine.toml", tmp_path / "other.toml")
    result = elastic_pt("chaos", "run", *both, "--out", tmp_path / "o", "--json")
    assert result.exit_code == 0
    assert set(result.json) == {"passed", "runs", "broken", "left_out", "report"}
    assert result.json["left_out"] == [{"name": "other", "why": "no bucket"}]
    assert [name for name, _ in seen] == ["mine"]
    alone = elastic_pt("chaos", "run", both[1], "--out", tmp_path / "p")
    assert_one_line_mistake(alone, "nothing can be played here", "other: no bucket")


def test_a_campaign_lists_failing_seeds_with_their_command(
    played: Callable[[bool], list[tuple[str, int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is played from its own seed, which `replay` takes."""
    seen = played(False)
    monkeypatch.setattr(Machine, "lacks", lambda self, needs: "")
    result = elastic_pt(
        "chaos", "campaign", "--minutes", 0.005, "--seed", 3, "--out", tmp_path / "o"
    )
    assert result.exit_code == 1
    assert seen
    assert result.out.splitlines()[-1].endswith(f"chaos replay {seen[-1][1]}")
    again = elastic_pt("chaos", "replay", seen[0][1], "--out", tmp_path / "p")
    assert again.exit_code == 1
    assert seen[-1] == seen[0]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("run",), ("NAME|FILE", "expected")),
        (("run", "--all", "--quick"), ("--all --quick", "expected one")),
        (("run", "killed-lader"), ("'killed-lader'", "killed-leader")),
        (("run", "killed-leader", "--seed", -1), ("--seed",)),
        (("replay", 5000), ("SEED 5000", "expected")),
        (("campaign", "--minutes", "x"), ("--minutes x",)),
        (("campaign", "--minutes", 1, "--mean-seconds-between-faults", 0), ("--mean-seconds", "0")),
    ],
)
def test_a_mistake_is_one_line(words: tuple[object, ...], parts: tuple[str, ...]) -> None:
    """It names the option or argument, its value, and what was expected."""
    assert_one_line_mistake(elastic_pt("chaos", *words), *parts, "expected")


def test_two_scenarios_of_one_name_are_refused(tmp_path: Path) -> None:
    """The second one would find the results of the first in its place."""
    (tmp_path / "killed-leader.toml").write_text(MINE)
    result = elastic_pt("chaos", "run", "killed-leader", tmp_path / "killed-leader.toml")
    assert_one_line_mistake(result, "killed-leader", "expected one")


def test_a_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    """No earlier run is overwritten."""
    (tmp_path / "kept").touch()
    result = elastic_pt("chaos", "run", "killed-leader", "--out", tmp_path)
    assert_one_line_mistake(result, f"--out {tmp_path}", "expected a new or empty directory")
