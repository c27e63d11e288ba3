"""Blocks of the data are damaged while the run goes on: it stops with the cause, or leaves their tokens out."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import (
    CHECKPOINT_STEPS,
    PATIENCE_S,
    Scenario,
    make_config,
    scenario,
)
from elastic_pt.chaos.directory import run_digest
from elastic_pt.cli import run_command_line
from elastic_pt.data.lanes import LANES_VERSION, lanes_of
from elastic_pt.data.manifest import Manifest, read_manifest
from elastic_pt.data.plan import DataPlan
from elastic_pt.data.prepare import prepare
from elastic_pt.data.sources import standard_library_source
from elastic_pt.data.table import ShardTable
from elastic_pt.report.status import open_run, read_status
from elastic_pt.runlog.ignored import IgnoredSpan
from elastic_pt.runlog.records import CauseKind, Generation
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

pytestmark = pytest.mark.chaos

BLOCK_TOKENS = 2**12
SKIP = "data.on_damage=skip"
DAMAGE_STEP = CHECKPOINT_STEPS + 3


@pytest.fixture(scope="module")
def blocks_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The data of the other scenarios, in small blocks."""
    url = f"file://{tmp_path_factory.mktemp('blocks')}"
    prepare(
        [standard_library_source(300_000)],
        open_store(url),
        vocab_size=320,
        held_out=0.05,
        block_tokens=BLOCK_TOKENS,
    )
    return url


@pytest.fixture(scope="module")
def begun(blocks_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was lost after its first commit."""
    directory = tmp_path_factory.mktemp("begun")
    config = make_config(f"file://{directory / 'run'}", blocks_url, 1)
    with scenario(config, directory) as lost:
        lost.fleet.start("first")
        lost.until("a checkpoint", lambda: len(lost.view().checkpoints) > 0)
        lost.fleet.close()
        assert lost.view().stop is None
    return directory / "run"


@pytest.fixture(scope="module")
def digests() -> dict[str, str]:
    """Digests of finished runs by the damage that they had."""
    return {}


@dataclass
class Data:
    """A copy of the data that a test damages."""

    url: str
    store: Store
    manifest: Manifest
    plan: DataPlan

    def block_of(self, step: int, slot: int) -> int:
        """The number of the block with the middle of the row that a slot reads in a step, counted from 0."""
        ((_, row),) = self.plan.slot_rows(step, range(slot, slot + 1), 1)
        length = self.plan.sequence_length
        return (row * length + length // 2) // BLOCK_TOKENS

    def damage(self, *blocks: int) -> None:
        """Flip a bit in each of these blocks."""
        for block in blocks:
            token = block * BLOCK_TOKENS + 1
            placed = ShardTable(self.manifest, self.store).find(0, "train", token)
            path = Path(self.url.removeprefix("file://")) / placed.shard.key
            with path.open("r+b") as file:
                file.seek(2 * (token - placed.start))
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))


@pytest.fixture
def data(blocks_url: str, tmp_path: Path) -> Data:
    """A copy of the data."""
    url = f"file://{shutil.copytree(blocks_url.removeprefix('file://'), tmp_path / 'data')}"
    store = open_store(url)
    manifest, config = read_manifest(store), make_config("file:///none", url, 1)
    plan = DataPlan(
        manifest,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        lanes=lanes_of(LANES_VERSION, 1, config.data.shuffle_window_tokens),
    )
    return Data(url, store, manifest, plan)


def ignored_in(run: Scenario) -> list[tuple[IgnoredSpan, ...]]:
    """What each generation leaves out."""
    bodies = [record.body for record in run.records()]
    return [body.ignored for body in bodies if isinstance(body, Generation)]


def causes_in(run: Scenario) -> list[CauseKind]:
    """The causes of all generations."""
    bodies = [record.body for record in run.records()]
    return [each.kind for body in bodies if isinstance(body, Generation) for each in body.causes]


def test_damage_stops_the_run_and_is_named(start: StartScenario, data: Data) -> None:
    """F45: by default a damaged block ends the run; log and status name its file, block and rows. `skip` lets it go on."""
    run = start(f"data.url={data.url}", nodes=1)
    run.until_step(DAMAGE_STEP, nodes=1)
    block = data.block_of(run.step() + 10, 0)
    data.damage(block)
    assert set(run.fleet.wait(PATIENCE_S).values()) == {7}
    stop, status = run.view().stop, read_status(open_run(run.config.run.url))
    assert stop is not None
    key = ShardTable(data.manifest, data.store).find(0, "train", block * BLOCK_TOKENS).shard.key
    for text in (stop.reason, status.reason):
        assert "the same failure" in text
        assert key in text
        assert f"(block {block} of " in text
        assert (
            f"in rows {data.manifest.sources[0].name}:{block * BLOCK_TOKENS // 64 - 1} to " in text
        )
    assert not any(ignored_in(run))
    assert run_command_line(["reopen", run.config.run.url, "--why", "no copy of the block"]) == 0
    run.fleet.start("node-1", settings=[SKIP])
    assert run.fleet.wait(PATIENCE_S)["node-1"] == 0, run.log_tails()
    (left_out,) = ignored_in(run)[-1]
    assert left_out.span.file == key
    assert left_out.span.tokens == (block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
    run.check_whole(run_digest(run.store, run.view()))


@pytest.mark.parametrize(
    "world",
    [
        "one worker",
        "two workers",
        "two nodes",
        pytest.param("two nodes, one killed", marks=pytest.mark.quick),
    ],
)
def test_damage_is_left_out_at_every_world_size(
    start: StartScenario,
    begun: Path,
    data: Data,
    digests: dict[str, str],
    tmp_path: Path,
    world: str,
) -> None:
    """F45: with `skip`, damage costs a generation. The weights do not depend on the workers, nor on nodes that are lost later."""
    nodes = 2 if "nodes" in world else 1
    workers = 2 if world == "two workers" else 1
    run = start(
        f"data.url={data.url}",
        SKIP,
        f"elastic.nodes_max={nodes}",
        f"elastic.workers_per_node={workers}",
        run_url=f"file://{shutil.copytree(begun, tmp_path / 'run')}",
    )
    committed_step = run.view().committed_step
    # One that the next step needs, so that no later state can be resumed from.
    blocks = sorted({data.block_of(committed_step, slot) for slot in (0, 7)})
    data.damage(*blocks)
    for number in range(nodes):
        run.fleet.start(f"node-{number}")
    run.until_step(committed_step + 2 * CHECKPOINT_STEPS + 2, nodes)
    if "killed" in world:
        run.fleet.kill("node-1")
        run.fleet.start("node-2")
    codes = run.fleet.wait(PATIENCE_S)
    assert {code for node, code in codes.items() if node != "node-1"} == {0}, run.log_tails()
    found = ignored_in(run)
    assert {each.first_step for each in found[-1]} == {committed_step + 1}
    left_out = {
        block
        for each in found[-1]
        for block in range(*(token // BLOCK_TOKENS for token in each.span.tokens))
    }
    assert left_out == set(blocks)
    assert causes_in(run).count(CauseKind.DAMAGED) <= len(blocks)
    assert CauseKind.FAILED not in causes_in(run)
    digest = run_digest(run.store, run.view())
    assert digests.setdefault("damaged", digest) == digest
    run.check_whole(digest)
