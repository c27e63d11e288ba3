"""Every scenario of the package on this machine, with one seed. `pytest -m quick` plays those that CI plays."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_pt.chaos.ceph import missing_for_ceph
from elastic_pt.chaos.kinds import Need
from elastic_pt.chaos.play import needs_of
from elastic_pt.chaos.run import run_scenario
from elastic_pt.chaos.scenario import Scenario, shipped
from elastic_pt.chaos.workbench import Workbench
from elastic_pt.fleet.network import missing_for_networks
from tests.services.fixtures import left_out

SEED = 1


@pytest.fixture(scope="session")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """Prepared data, digests of undisturbed runs, and an S3 server once a scenario needs one."""
    with Workbench(tmp_path_factory.mktemp("workbench")) as opened:
        yield opened


@pytest.fixture(scope="session")
def network() -> bool:
    """Whether nodes can have networks of their own here."""
    return not missing_for_networks()


def parameters() -> list[pytest.param]:  # type: ignore[valid-type]
    """Each scenario under its name; the quick ones have the mark that CI selects."""
    return [
        pytest.param(each, id=each.name, marks=[pytest.mark.quick] if each.quick else [])
        for each in shipped()
    ]


@pytest.mark.chaos
@pytest.mark.parametrize("scenario", parameters())
def test_scenario(scenario: Scenario, workbench: Workbench, network: bool, tmp_path: Path) -> None:
    """The run ends as the scenario says, and every oracle is content."""
    needs = needs_of(scenario)
    if Need.BUCKET in needs and (missing := missing_for_ceph()):
        left_out(f"a scenario in a bucket, {missing}")
    if needs & {Need.NETWORK, Need.DISK} and not network:
        left_out(f"a scenario on networks or disks of its own, {missing_for_networks()}")
    result = run_scenario(
        workbench,
        scenario,
        SEED,
        tmp_path / "out",
        network=network,
        replay=f"elastic-pt chaos run {scenario.name} --seed {SEED}",
    )
    failed = [f"{each.oracle}: {each.told}" for each in result.verdicts if not each.passed]
    assert result.passed, "\n".join([scenario.hypothesis, *failed, f"replay: {result.replay}"])
