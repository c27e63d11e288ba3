"""The oracles are checked: each bug that is planted into the agents is found by the oracle that should find it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos_tests.planted.bugs import BUGS, Bug
from chaos_tests.planted.planting import planted
from elastic_pt.chaos.ceph import missing_for_ceph
from elastic_pt.chaos.mounts import missing_for_mounts
from elastic_pt.chaos.result import Result
from elastic_pt.chaos.run import run_scenario
from elastic_pt.chaos.scenario import read_scenario
from elastic_pt.chaos.workbench import Workbench
from tests.services.fixtures import left_out

_NEED_ROOT = ("leave_a_file_in_tmp", "leave_a_file_in_shm")
_QUICK = ("lose_moment_of_a_row", "blame_another_cause", "leave_a_shard_out")
_SCENARIOS = {each.scenario for each in BUGS.values()}
pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """Data and undisturbed runs of all tests, made without a bug."""
    with Workbench(tmp_path_factory.mktemp("workbench")) as made:
        yield made


def _run(workbench: Workbench, scenario: str, directory: Path) -> Result:
    parsed = read_scenario(scenario, "chaos_tests/planted", "planted")
    if parsed.store == "bucket" and (missing := missing_for_ceph()):
        left_out(f"planted bugs of runs in a bucket, {missing}")
    return run_scenario(workbench, parsed, 1, directory / "run", network=False)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.quick] if name in _QUICK else []) for name in BUGS],
)
def test_a_planted_bug_is_found(name: str, workbench: Workbench, tmp_path: Path) -> None:
    """The oracle of the bug fails, and says something."""
    bug: Bug = BUGS[name]
    if name in _NEED_ROOT and (missing := missing_for_mounts()):
        left_out(f"planted bugs that leave files outside a node's own directories, {missing}")
    config = read_scenario(bug.scenario, "chaos_tests/planted", "planted")
    workbench.undisturbed(config.run_config("file:///unused", workbench.data_url()))
    with planted(name):
        result = _run(workbench, bug.scenario, tmp_path)
    verdicts = {each.oracle: each for each in result.verdicts}
    told = "\n".join(f"{each.oracle}: {each.passed} {each.told}" for each in result.verdicts)
    assert not verdicts[bug.oracle].passed, told
    assert result.played.struck


@pytest.mark.parametrize("scenario", sorted(_SCENARIOS), ids=lambda text: text.split('"')[1][:40])
def test_the_same_run_without_a_bug_passes(
    scenario: str, workbench: Workbench, tmp_path: Path
) -> None:
    """No oracle fails where there is no bug."""
    result = _run(workbench, scenario, tmp_path)
    assert result.passed, [each for each in result.verdicts if not each.passed]
