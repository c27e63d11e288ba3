"""The loop's decisions, in a world of one: when it checkpoints, stops, skips and gives up."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from elastic_pt.checkpoint.copier import HostCopier
from elastic_pt.checkpoint.layout import checkpoint_directory
from elastic_pt.checkpoint.publish import publish_manifest
from elastic_pt.checkpoint.snapshot import Buffer, describe_snapshot, open_buffer
from elastic_pt.checkpoint.upload import KeptShard, publish_node, upload_shard
from elastic_pt.config import Config
from elastic_pt.data.loader import StepBatch
from elastic_pt.data.manifest import Manifest
from elastic_pt.data.plan import RowSources
from elastic_pt.model.optimizer import local_rows
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.open import open_store
from elastic_pt.train.checkpoints import Checkpoints
from elastic_pt.train.loop import train
from elastic_pt.train.snapshots import MemorySnapshots
from elastic_pt.train.state import TrainState
from elastic_pt.train.step import Control, run_step
from elastic_pt.workers.assignment import Assignment, Outcome
from tests.train.world import RUN_ID, VOCABULARY, config_for, tokens_of


class FakeAgent:
    """An agent that asks for a drain at a step and whose uploads take some steps."""

    def __init__(
        self,
        *,
        drain_at: int | None = None,
        upload_steps: int = 0,
        checkpoint_at: tuple[int, ...] = (),
    ) -> None:
        self.messages: list[tuple[str, dict[str, object]]] = []
        self._drain_at, self._upload_steps = drain_at, upload_steps
        self._checkpoint_at = checkpoint_at

    @property
    def step(self) -> int:
        """Steps reported so far."""
        return max(
            (int(str(each["step"])) for kind, each in self.messages if kind == "step"), default=0
        )

    @property
    def drain_requested(self) -> bool:
        """Whether the step has come."""
        return self._drain_at is not None and self.step >= self._drain_at

    unmirrored_step = 0

    @property
    def complete_step(self) -> int:
        """Every snapshot is complete at once."""
        return self.step

    @property
    def checkpoint_request(self) -> int:
        """How many of the steps have come at which a checkpoint is asked for, from -1 on."""
        return sum(self.step >= each for each in self._checkpoint_at) - 1

    def released(self, step: int) -> bool:
        """Whether enough steps have passed since."""
        return self.step >= step + self._upload_steps

    def send(self, kind: str, **content: object) -> None:
        """Take a message."""
        self.messages.append((kind, content))

    def saved(self) -> list[dict[str, object]]:
        """The messages of the checkpoints that were saved."""
        return [
            content
            for kind, content in self.messages
            if kind == "snapshot" and content["checkpoint"]
        ]

    def saved_steps(self) -> list[int]:
        """Their steps."""
        return [int(str(content["step"])) for content in self.saved()]


def checkpoints_in(
    config: Config, agent: FakeAgent, resume: Checkpoint | None = None
) -> Checkpoints:
    """The checkpoints of the only worker of generation 1."""
    data = SimpleNamespace(fingerprint="0" * 64, tokenizer_sha256="1" * 64)
    assignment = Assignment(RUN_ID, 1, "127.0.0.1", 1, resume)
    return Checkpoints(config, cast(Manifest, data), assignment, agent)


def train_in(
    staging: Path,
    config: Config,
    state: TrainState,
    batches: Iterator[StepBatch],
    agent: FakeAgent,
) -> Outcome:
    """Train as the only worker of generation 1, with this staging directory."""
    staging.mkdir(exist_ok=True)
    checkpoints = checkpoints_in(config, agent)
    every = config.checkpoint.snapshot_every_steps
    snapshots = MemorySnapshots(every, 1, staging, agent, state, checkpoints.describe)
    return train(config, state, batches, agent, checkpoints, snapshots)


@pytest.fixture
def world_of_one(tmp_path: Path) -> Iterator[None]:
    """A process group with this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/pg", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def start(config: Config) -> tuple[TrainState, Iterator[StepBatch]]:
    """A fresh state, and the batches from its first step on."""
    state = TrainState(config, VOCABULARY, init_device_mesh("cpu", (1,)), torch.device("cpu"))
    state.initialize()

    def batches() -> Iterator[StepBatch]:
        for step in range(config.train.steps):
            yield StepBatch(
                step,
                torch.stack([tokens_of(step, slot, config) for slot in range(config.train.slots)]),
                RowSources(("code", "prose"), np.arange(config.train.global_batch) % 3 % 2),
            )

    return state, batches()


def weights(state: TrainState) -> torch.Tensor:
    """All weights in one vector."""
    return torch.cat(
        [local_rows(each.detach()).flatten().clone() for each in state.model.parameters()]
    )


@pytest.mark.usefixtures("world_of_one")
def test_checkpoints_come_at_their_cadence_and_at_the_end(tmp_path: Path) -> None:
    """Every `every_steps` steps and after the last one a buffer is kept that holds the state of its step."""
    config = config_for(tmp_path, "train.steps=7", "checkpoint.every_steps=3")
    state, batches = start(config)
    agent = FakeAgent()
    assert train_in(tmp_path, config, state, batches, agent) is Outcome.COMPLETED
    assert agent.saved_steps() == [3, 6, 7]
    last = describe_snapshot(Buffer(1, 0, int(str(agent.saved()[-1]["buffer"]))), tmp_path)
    assert last is not None
    assert (last.state.step, last.state.optimizer_step) == (7, 7)


@pytest.mark.usefixtures("world_of_one")
def test_a_step_reports_times_and_sources(tmp_path: Path) -> None:
    """A step's message has its phases, the stall before it, and the rows and loss of each source of its data."""
    config = config_for(tmp_path, "train.steps=3", "train.micro_batch=2")
    state, batches = start(config)
    another, its_batches = start(config)
    with torch.no_grad():
        rows = [
            another.model(row[None, :-1], row[None, 1:]).cross_entropy.item() / 16
            for row in next(its_batches).tokens_VBT.flatten(0, 1)
        ]
    stall_s = 0.2

    class Slow(FakeAgent):
        """Its worker waits while it saves."""

        def send(self, kind: str, **content: object) -> None:
            super().send(kind, **content)
            if kind == "step":
                time.sleep(stall_s)

    agent = Slow()
    train_in(tmp_path, config, state, batches, agent)
    steps = [cast(dict[str, Any], content) for kind, content in agent.messages if kind == "step"]
    for step in steps:
        assert set(step["phases"]) == {"data", "compute", "communicate", "optimizer"}
        assert sum(step["phases"].values()) == pytest.approx(step["seconds"], abs=1e-5)
        assert step["straggler_wait_s"] == 0.0
        assert "data_wait_cause" not in step
        total = sum(count * loss for count, loss in step["sources"].values())
        assert total / config.train.global_batch == pytest.approx(step["loss"], rel=1e-12, abs=0.0)
    stalls = [step["checkpoint_stall_s"] for step in steps]
    assert stalls[0] == 0.0
    assert all(stall >= stall_s for stall in stalls[1:])
    json.dumps(steps, allow_nan=False)
    code, prose = [rows[i] for i in (0, 2, 3, 5, 6)], [rows[i] for i in (1, 4, 7)]
    assert steps[0]["sources"] == {
        "code": [5, pytest.approx(sum(code) / 5, rel=1e-5)],
        "prose": [3, pytest.approx(sum(prose) / 3, rel=1e-5)],
    }


@pytest.mark.usefixtures("world_of_one")
def test_the_last_state_is_saved_even_if_it_came_from_memory(tmp_path: Path) -> None:
    """A generation that resumes after the last step, from memory, has no step to do, but its state is not committed."""
    config = config_for(tmp_path, "train.steps=4")
    state, batches = start(config)
    train_in(tmp_path / "first", config, state, batches, FakeAgent())
    agent = FakeAgent()
    assert train_in(tmp_path / "second", config, state, batches, agent) is Outcome.COMPLETED
    assert agent.saved_steps() == [4]
    assert agent.step == 0


@pytest.mark.usefixtures("world_of_one")
def test_a_checkpoint_is_postponed_until_the_last_upload_ends(tmp_path: Path) -> None:
    """While the last checkpoint is still being uploaded the next one is put off; the final one is not."""
    config = config_for(tmp_path, "train.steps=9", "checkpoint.every_steps=2")
    state, batches = start(config)
    agent = FakeAgent(upload_steps=4)
    train_in(tmp_path, config, state, batches, agent)
    assert agent.saved_steps() == [2, 7, 9]


@pytest.mark.usefixtures("world_of_one")
def test_a_checkpoint_waits_until_the_newest_snapshot_is_complete_everywhere(
    tmp_path: Path,
) -> None:
    """It would overwrite a snapshot that a mirror still copies, and no newer one could be complete. The last one is not put off."""
    config = config_for(
        tmp_path, "train.steps=10", "checkpoint.every_steps=2", "checkpoint.snapshot_every_steps=1"
    )
    state, batches = start(config)

    class SlowMirrors(FakeAgent):
        """Each snapshot is complete three steps later."""

        @property
        def complete_step(self) -> int:
            return max(0, self.step - 3)

    agent = SlowMirrors()
    checkpoints = checkpoints_in(config, agent)
    snapshots = MemorySnapshots(1, 1, tmp_path, agent, state, checkpoints.describe)
    deadline_s = time.monotonic() + 20.0
    while snapshots.offer().complete_step is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    assert train(config, state, batches, agent, checkpoints, snapshots) is Outcome.COMPLETED
    assert agent.saved_steps() == [5, 9, 10]


@pytest.mark.usefixtures("world_of_one")
def test_a_checkpoint_that_is_asked_for_comes_once_and_training_goes_on(tmp_path: Path) -> None:
    """It comes after the next step, or once the last upload has ended, and says which request it meets."""
    config = config_for(tmp_path, "train.steps=12")
    state, batches = start(config)
    agent = FakeAgent(upload_steps=4, checkpoint_at=(2, 4))
    outcome = train_in(tmp_path, config, state, batches, agent)
    assert outcome is Outcome.COMPLETED
    # The second one is asked for while the first one is being uploaded.
    assert agent.saved_steps() == [3, 8, 12]
    met = [content["request"] for content in agent.saved()]
    assert met == [0, 1, 1]


@pytest.mark.usefixtures("world_of_one")
def test_a_drain_stops_after_the_step_with_a_checkpoint_of_it(tmp_path: Path) -> None:
    """When the agent wants the world to change, the worker finishes the step, saves its state and stops."""
    config = config_for(tmp_path, "train.steps=9")
    state, batches = start(config)
    agent = FakeAgent(drain_at=3, upload_steps=99)
    assert train_in(tmp_path, config, state, batches, agent) is Outcome.DRAINED
    assert agent.saved_steps() == [state.steps_done] == [4]


@pytest.mark.usefixtures("world_of_one")
def test_left_out_tokens_have_no_target_and_the_divisor_stays(tmp_path: Path) -> None:
    """The loss of a step is the sum over the other targets, divided by all tokens; the gradient is that of this loss."""
    config = config_for(tmp_path / "run", "train.z_loss=0.0", "train.clip_norm=0.0")
    state, batches = start(config)
    plain = next(batches).tokens_VBT
    plain[:, :, 4:9] = 96
    left_out = plain.clone()
    left_out[:, :, 4:9] = ~96
    inputs, targets = plain[:, 0, :-1], plain[:, 0, 1:].clone()
    targets[:, 3:8] = -100
    tokens = targets.numel()
    expected = state.model(inputs, targets).cross_entropy.item() / tokens
    everything = state.model(inputs, plain[:, 0, 1:].contiguous()).cross_entropy.item() / tokens
    result = run_step(state, left_out, Control(False, False))
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.loss < 0.8 * everything


@pytest.mark.usefixtures("world_of_one")
def test_a_non_finite_step_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose loss is not finite changes no weight and no moment, is reported, and the next step trains."""
    config = config_for(tmp_path, "train.steps=3")
    state, batches = start(config)
    seen = poison(monkeypatch, state, steps={1})
    agent = FakeAgent()
    assert train_in(tmp_path, config, state, batches, agent) is Outcome.COMPLETED
    before, poisoned, after = seen[1], seen[2], weights(state)
    assert torch.equal(before, poisoned)
    assert not torch.equal(poisoned, after)
    assert state.optimizer.step_count == 2
    skipped = [content["skipped"] for kind, content in agent.messages if kind == "step"]
    assert [bool(each) for each in skipped] == [False, True, False]
    assert torch.isfinite(after).all()


@pytest.mark.usefixtures("world_of_one")
def test_a_run_whose_loss_stays_non_finite_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After more than `max_skipped_steps` non-finite steps in a row the run ends as diverged, weights intact."""
    config = config_for(tmp_path, "train.steps=20", "train.max_skipped_steps=2")
    state, batches = start(config)
    poison(monkeypatch, state, steps=set(range(4, 20)))
    agent = FakeAgent()
    assert train_in(tmp_path, config, state, batches, agent) is Outcome.DIVERGED
    assert state.steps_done == 7
    assert torch.isfinite(weights(state)).all()


def poison(
    monkeypatch: pytest.MonkeyPatch, state: TrainState, steps: set[int]
) -> dict[int, torch.Tensor]:
    """Make the loss of some steps NaN; returns the weights as each step found them."""
    from elastic_pt.train import step as step_module

    original, seen = step_module._backward, {}

    def backward(state: TrainState, tokens_BT: torch.Tensor, weight: float) -> torch.Tensor:
        seen.setdefault(state.steps_done, weights(state))
        share = float("nan") if state.steps_done in steps else weight
        return original(state, tokens_BT, share) * share

    monkeypatch.setattr(step_module, "_backward", backward)
    return seen


class Copying(FakeAgent):
    """An agent that copies each kept buffer before it releases it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def send(self, kind: str, **content: object) -> None:
        """Take a message."""
        super().send(kind, **content)
        if kind == "snapshot" and content["checkpoint"]:
            buffer = Buffer(1, 0, int(str(content["buffer"]))).path(self._folder)
            shutil.copyfile(buffer, self._folder / f"saved-{content['step']}")


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("poisoned", [{1, 2, 4, 5, 7}, {2, 4, 5, 6}])
def test_a_restart_at_any_step_ends_as_the_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poisoned: set[int]
) -> None:
    """Whichever checkpoint a run is taken up from, it ends after the same step, in the same way, with the same weights."""
    config = config_for(
        tmp_path, "train.steps=9", "train.max_skipped_steps=2", "checkpoint.every_steps=1"
    )
    state, batches = start(config)
    poison(monkeypatch, state, steps=poisoned)
    agent = Copying(tmp_path)
    outcome = train_in(tmp_path, config, state, batches, agent)
    assert (outcome is Outcome.DIVERGED) == (4 in poisoned and 6 in poisoned)
    for step in agent.saved_steps():
        again, rest = start(config)
        take_up(config, again, tmp_path / f"saved-{step}", step)
        assert (
            train_in(
                tmp_path / f"from-{step}", config, again, islice(rest, step, None), FakeAgent()
            )
            is outcome
        )
        assert again.steps_done == state.steps_done
        assert torch.equal(weights(again), weights(state))


def take_up(config: Config, state: TrainState, shard: Path, step: int) -> None:
    """Restore a state as a worker does, from a checkpoint in a store made of one kept buffer."""
    store = open_store(config.run.url)
    directory = checkpoint_directory(step, 1, "abcd")
    uploaded = upload_shard(store, KeptShard(shard, RUN_ID, directory, 0, range(1)))
    resume = publish_manifest(store, [publish_node(store, [uploaded])])
    checkpoints_in(config, FakeAgent(), resume).load(state)


class Uploading(FakeAgent):
    """An agent that looks at each kept buffer until it has released it, some steps later."""

    def __init__(self, folder: Path, upload_steps: int) -> None:
        super().__init__(upload_steps=upload_steps)
        self._folder = folder
        self.looks = 0

    def send(self, kind: str, **content: object) -> None:
        """Take a message, and check the buffers of the checkpoints that are not released."""
        super().send(kind, **content)
        for saved in self.saved():
            step = int(str(saved["step"]))
            if not self.released(step):
                path = Buffer(1, 0, int(str(saved["buffer"]))).path(self._folder)
                with open_buffer(path) as buffer:
                    assert buffer.step() == step
                self.looks += 1


@pytest.mark.usefixtures("world_of_one")
def test_snapshots_go_on_around_a_kept_buffer(tmp_path: Path) -> None:
    """While a checkpoint is being uploaded, snapshots use the other two buffers. The last state finds one too."""
    config = config_for(
        tmp_path,
        "train.steps=12",
        "checkpoint.every_steps=3",
        "checkpoint.snapshot_every_steps=1",
    )
    state, batches = start(config)
    agent = Uploading(tmp_path, upload_steps=4)
    assert train_in(tmp_path, config, state, batches, agent) is Outcome.COMPLETED
    assert agent.saved_steps() == [3, 8, 12]
    assert agent.looks > 8
    steps = [content["step"] for kind, content in agent.messages if kind == "snapshot"]
    assert steps[-9:] == list(range(4, 13)), "each state is written once"
    told = [content for kind, content in agent.messages if kind == "snapshot"]
    assert {content["buffer"] for content in told} == {0, 1, 2}
    assert {(each["every_steps"], each["every_reason"]) for each in told} == {(1, "configured")}


class HeldCopier(HostCopier):
    """A copy in the background that a test lets go on, in place of a GPU's."""

    in_background = True

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self._work: Callable[[], None] = lambda: None

    def start(self, targets: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> None:
        """Copy in `wait`."""
        self._work = partial(super().start, targets, rows)

    def wait(self) -> None:
        """Copy once the test says so."""
        assert self.go_on.wait(60.0)
        self._work()


@pytest.mark.usefixtures("world_of_one")
def test_state_is_whole_and_told_only_when_its_copy_is_done(tmp_path: Path) -> None:
    """A copy goes on after `take`. The next agreement, before which no weight changes, waits for its end."""
    config = config_for(tmp_path)
    state, _ = start(config)
    state.steps_done = 5
    agent, copier = FakeAgent(), HeldCopier()
    describe = checkpoints_in(config, agent).describe
    snapshots = MemorySnapshots(1, 1, tmp_path, agent, state, describe, copier)
    snapshots.keep(state, None, -1)
    assert agent.messages == []
    with open_buffer(Buffer(1, 0, 0).path(tmp_path)) as buffer:
        assert buffer.step() is None
        offered = threading.Thread(target=snapshots.offer)
        offered.start()
        offered.join(0.2)
        assert offered.is_alive()
        copier.go_on.set()
        offered.join(60.0)
        assert not offered.is_alive()
        assert buffer.step() == 5
    assert agent.saved_steps() == [5]


@pytest.mark.usefixtures("world_of_one")
def test_worker_with_room_for_one_buffer_still_checkpoints(
    tmp_path: Path, small_memory: Path
) -> None:
    """Without room for three buffers there are no snapshots. The last checkpoint waits until its buffer is released."""
    config = config_for(
        tmp_path, "train.steps=5", "checkpoint.every_steps=2", "checkpoint.snapshot_every_steps=1"
    )
    state, batches = start(config)
    fill(small_memory, leave=int(1.5 * sum(each.rows.nbytes for _, each in state.slices())))

    class Slow(FakeAgent):
        """An agent that releases the checkpoint of step 4 once the worker says that it waits."""

        def released(self, step: int) -> bool:
            return step < 4 or any(kind == "no_room" for kind, _ in self.messages)

    agent = Slow()
    assert train_in(small_memory, config, state, batches, agent) is Outcome.COMPLETED
    kinds = [(kind, content.get("step")) for kind, content in agent.messages if kind != "step"]
    kinds.remove(("no_snapshots", None))
    assert kinds == [("snapshot", 2), ("snapshot", 4), ("no_room", 5), ("snapshot", 5)]
    assert agent.saved_steps() == [2, 4, 5]


def fill(folder: Path, leave: int = 0) -> Path:
    """A file that fills the directory, except for `leave` bytes."""
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(filler, filler.stat().st_size - leave)
    return filler


@pytest.mark.usefixtures("world_of_one")
def test_a_full_staging_directory_skips_checkpoints_and_fails_no_worker(
    tmp_path: Path, small_memory: Path
) -> None:
    """Without room a periodic checkpoint is skipped and leaves no file; the last one waits for room."""
    config = config_for(tmp_path, "train.steps=5", "checkpoint.every_steps=2")
    filler = fill(small_memory)

    class Roomy(FakeAgent):
        """An agent whose machine gets room again once a worker says that it waits for it."""

        def send(self, kind: str, **content: object) -> None:
            super().send(kind, **content)
            if kind == "no_room":
                filler.unlink()

    agent = Roomy()
    state, batches = start(config)
    assert train_in(small_memory, config, state, batches, agent) is Outcome.COMPLETED
    told = [(kind, content.get("step")) for kind, content in agent.messages if kind != "step"]
    kinds = [each for each in told if each != ("no_snapshots", None)]
    assert len(told) == len(kinds) + 1, "that there is no memory for snapshots is told once"
    assert kinds == [("skipped", 2), ("skipped", 4), ("no_room", 5), ("snapshot", 5)]
    assert agent.saved_steps() == [5]
    assert [path.name for path in small_memory.iterdir()] == ["snapshot-g1-rank-0-0"]


@pytest.mark.usefixtures("world_of_one")
def test_a_stop_without_room_ends_at_its_timeout(tmp_path: Path, small_memory: Path) -> None:
    """A worker that must checkpoint reports that it waits, and ends normally when there is no room in time."""
    config = config_for(tmp_path, "train.steps=1", "elastic.settle_timeout_s=0.5")
    fill(small_memory)
    agent = FakeAgent()
    state, batches = start(config)
    assert train_in(small_memory, config, state, batches, agent) is Outcome.COMPLETED
    kinds = [kind for kind, _ in agent.messages if kind not in ("step", "no_snapshots")]
    assert set(kinds[:-1]) == {"no_room"}
    assert kinds[-1] == "skipped"
