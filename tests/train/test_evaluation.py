"""The held-out loss during training: when it is measured, what it is, and that it changes nothing."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import torch
import torch.distributed as dist

from elastic_pt.config import Config, EvaluationSection
from elastic_pt.data.cache import ShardCache
from elastic_pt.data.held_out import HeldOutLoss
from elastic_pt.data.manifest import read_manifest
from elastic_pt.data.plan import DataPlan
from elastic_pt.data.prepare import prepare
from elastic_pt.data.shards import TokenReader
from elastic_pt.data.sources import SourceSpec
from elastic_pt.model.loss import LossSums
from elastic_pt.store.open import open_store
from elastic_pt.train.clock import StepClock
from elastic_pt.train.evaluation import Evaluation
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Control, run_step
from elastic_pt.workers.heartbeat import WorkerPhase
from tests.train.world import config_for, in_world, join, tokens_of_worker

ROWS: Final = 11
"""Not a multiple of any world's batch: the last pass has padding, and workers without a row."""


@pytest.fixture(scope="module")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two sources with some held-out text."""
    root = tmp_path_factory.mktemp("data")
    sources = []
    for source in ("code", "prose"):
        (root / source).mkdir()
        for number in range(30):
            words = random.Random(f"{source} {number}").choices("abcdef", k=400)
            (root / source / f"{number}.txt").write_text(" ".join(words))
        sources.append(SourceSpec(source, (str(root / source),), weight=0.5))
    url = f"file://{root}/prepared"
    prepare(sources, open_store(url), vocab_size=260, held_out=0.2)
    return url


def evaluation_of(config: Config) -> Evaluation:
    """An evaluation of the data of `config`."""
    store = open_store(config.data.url)
    manifest = read_manifest(store)
    plan = DataPlan(manifest, config.data.sequence_length, seed=1, global_batch=8)
    cache = ShardCache(Path(config.run.url.removeprefix("file://")) / "cache", 2**30)
    return Evaluation(config, plan, TokenReader(manifest, store, cache=cache))


@dataclass(frozen=True)
class Seen:
    """What one worker has after some steps."""

    rows_sha256: str
    """Of its rows of weights and moments."""
    losses: list[HeldOutLoss]
    moved: bool
    """Whether the memory of its state was another one after an evaluation."""
    phases: list[tuple[WorkerPhase, int]]


def train_and_evaluate(
    rank: int, world_size: int, port: int, config: Config, steps: int, every: int
) -> Seen:
    """Train from the seed; with `every`, evaluate after each `every` steps."""
    state = join(
        rank, config, world_size, port, read_manifest(open_store(config.data.url)).vocab_size
    )
    state.initialize()
    evaluation = evaluation_of(config)
    losses: list[HeldOutLoss] = []
    phases: list[tuple[WorkerPhase, int]] = []
    moved = False
    for step in range(1, steps + 1):
        state.clock.begin()
        run_step(state, tokens_of_worker(state), Control(False, False))
        state.clock.end()
        if every and step % every == 0:
            before = addresses(state)
            found = evaluation.measure(state, lambda *entered: phases.append(entered))
            losses.append(found.held_out)
            moved = moved or addresses(state) != before
    digest = hashlib.sha256()
    for _, each in state.slices():
        digest.update(each.rows.numpy().tobytes())
    dist.destroy_process_group()
    return Seen(digest.hexdigest(), losses, moved, phases)


def addresses(state: TrainState) -> list[int]:
    return [each.rows.data_ptr() for _, each in state.slices()]


@pytest.mark.distributed
def test_it_has_the_same_bits_in_any_world_and_changes_nothing(
    tmp_path: Path, data_url: str
) -> None:
    """Held-out losses do not depend on the number of workers. Weights, moments and their memory are as without evaluations,
    also where one comes before the first backward pass of a step with several rounds."""
    config = config_for(
        tmp_path, f"data.url={data_url}", "train.micro_batch=2", f"evaluation.rows={ROWS}"
    )
    with_them = {size: in_world(size, train_and_evaluate, config, 3, 1) for size in (1, 2, 3)}
    alone = with_them[1][0]
    assert len(alone.losses) == 3
    assert len({each.loss for each in alone.losses}) == 3
    for size, workers in with_them.items():
        without = in_world(size, train_and_evaluate, config, 3, 0)
        assert [each.rows_sha256 for each in workers] == [each.rows_sha256 for each in without]
        passes = -(-ROWS // (2 * size))
        for each in workers:
            assert each.losses == alone.losses
            assert not each.moved
            assert each.phases == [
                (WorkerPhase.EVALUATE, step) for step in (1, 2, 3) for _ in range(passes)
            ]
    for result in alone.losses:
        assert set(result.by_source) == {"code", "prose"}
        assert sum(rows for rows, _ in result.by_source.values()) == ROWS


def loss_by_hand(rank: int, world_size: int, port: int, config: Config) -> tuple[float, float]:
    """The held-out loss of the initial weights, and the same from one pass over all tokens of each source."""
    manifest = read_manifest(open_store(config.data.url))
    state = join(rank, config, world_size, port, manifest.vocab_size)
    state.initialize()
    state.clock.begin()
    state.clock.end()
    evaluation = evaluation_of(config)
    measured = evaluation.measure(state, lambda *_: None).held_out.loss
    nats = 0.0
    length = config.data.sequence_length
    cache = ShardCache(Path(config.run.url.removeprefix("file://")) / "cache", 2**30)
    reader = TokenReader(manifest, open_store(config.data.url), cache=cache)
    with torch.no_grad():
        for number, source in enumerate(manifest.sources):
            stream = reader.stream(number, "held_out", 0, source.tokens("held_out"))
            stream = torch.cat((torch.tensor([manifest.end_token_id]), stream))
            for start in range(0, len(stream) - 1, length):
                row = stream[None, start : start + length + 1]
                sums = state.model(row[:, :-1], row[:, 1:])
                assert isinstance(sums, LossSums)
                nats += sums.cross_entropy.item()
    dist.destroy_process_group()
    return measured, nats / manifest.tokens("held_out")


@pytest.mark.distributed
def test_it_is_the_mean_over_every_held_out_token(tmp_path: Path, data_url: str) -> None:
    """With all rows, it is plain cross-entropy per token: padding, short rows and batches have no effect."""
    config = config_for(
        tmp_path, f"data.url={data_url}", "train.micro_batch=4", "evaluation.rows=0"
    )
    ((measured, by_hand),) = in_world(1, loss_by_hand, config)
    assert measured == pytest.approx(by_hand, rel=1e-6, abs=0.0)


@pytest.mark.parametrize(
    ("every", "last", "expected"),
    [(0, 5, []), (1, 3, [1, 2, 3]), (4, 10, [4, 8, 10]), (5, 10, [5, 10]), (50, 3, [3])],
)
def test_it_is_due_by_the_step_alone(every: int, last: int, expected: list[int]) -> None:
    """Each multiple of `every_steps` and the last step; never for 0."""
    section = EvaluationSection(every_steps=every)
    assert [step for step in range(1, last + 1) if section.due(step, last)] == expected


def test_its_time_is_neither_a_phase_nor_a_stall() -> None:
    """What an evaluation communicates does not count in the step before it, and its time not as the stall after it."""
    now_s = 0.0

    def advance(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    clock = StepClock(lambda: now_s)
    clock.begin()
    advance(1.0)
    first = clock.end()
    with clock.communicating():
        advance(16.0)
    assert clock.evaluated() == 16.0
    advance(4.0)
    clock.begin()
    advance(2.0)
    second = clock.end()
    assert sum(first.phases.values()) == first.seconds == 1.0
    assert clock.last_communicate_s == 0.0
    assert (second.seconds, second.stall_s) == (2.0, 4.0)
    assert sum(second.phases.values()) == 2.0
