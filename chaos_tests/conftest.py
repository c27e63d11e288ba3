"""The prepared corpus, the undisturbed run that all scenarios of a session are compared with, and networks."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from chaos_tests.scenario import CHECKPOINT_STEPS, Scenario, make_config, scenario
from elastic_pt.chaos.directory import run_digest
from elastic_pt.data.prepare import prepare
from elastic_pt.data.sources import standard_library_source
from elastic_pt.fleet.network import Network, missing_for_networks
from elastic_pt.store.open import open_store
from tests.services.fixtures import left_out

CORPUS_CHARACTERS = 300_000
VOCABULARY = 320

StartScenario = Callable[..., Scenario]
MakeNetwork = Callable[..., Network]


@dataclass(frozen=True)
class Interrupted:
    """A run of three nodes that were all lost at once, with at least two commits."""

    directory: Path
    step: int
    """What it had done when it was lost."""


@pytest.fixture(scope="session")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few hundred kilobytes of the standard library, tokenized."""
    url = f"file://{tmp_path_factory.mktemp('data')}"
    prepare(
        [standard_library_source(CORPUS_CHARACTERS)],
        open_store(url),
        vocab_size=VOCABULARY,
        held_out=0.05,
    )
    return url


@pytest.fixture(scope="session")
def reference_digest(data_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of an undisturbed run on one node."""
    directory = tmp_path_factory.mktemp("reference")
    config = make_config(f"file://{directory / 'run'}", data_url, 1)
    with scenario(config, directory) as undisturbed:
        undisturbed.fleet.start("alone")
        undisturbed.finish()
        return run_digest(undisturbed.store, undisturbed.view())


@pytest.fixture(scope="session")
def interrupted(data_url: str, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """A run whose three nodes were all lost at the same moment."""
    directory = tmp_path_factory.mktemp("interrupted")
    config = make_config(f"file://{directory / 'run'}", data_url, 3)
    with scenario(config, directory) as lost:
        for number in range(3):
            lost.fleet.start(f"node-{number}")
        lost.until_step(3 * CHECKPOINT_STEPS + 1, nodes=3)
        lost.until("two checkpoints", lambda: len(lost.view().checkpoints) >= 2)
        step = lost.step()
        lost.fleet.close()
        assert lost.view().stop is None
    return Interrupted(directory / "run", step)


@pytest.fixture
def start(data_url: str, tmp_path: Path) -> Iterator[StartScenario]:
    """Opens the test's scenario: `start(*overrides, run_url=..., nodes=N)`."""
    with ExitStack() as stack:

        def open_scenario(*overrides: str, run_url: str | None = None, nodes: int = 0) -> Scenario:
            url = run_url or f"file://{tmp_path / 'run'}"
            config = make_config(url, data_url, max(1, nodes), *overrides)
            opened = stack.enter_context(scenario(config, tmp_path / "nodes"))
            for number in range(nodes):
                opened.fleet.start(f"node-{number}")
            return opened

        yield open_scenario


@pytest.fixture
def make_network() -> Iterator[MakeNetwork]:
    """Makes the test's network: `make_network(3, versions=(6,))` for three nodes with IPv6 addresses only."""
    missing = missing_for_networks()
    if missing:
        left_out(f"tests on networks of their own, {missing}")
    with ExitStack() as stack:

        def make(count: int, *, versions: tuple[int, ...] = (4,)) -> Network:
            names = [f"node-{number}" for number in range(count)]
            return stack.enter_context(Network(names, versions=versions))

        yield make
