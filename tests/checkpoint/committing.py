"""A run whose checkpoints the real committer commits one by one, and a bucket that can be disturbed."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic_pt.checkpoint.commit import CommitRules, Committer, directory_of
from elastic_pt.checkpoint.history import StepHistory
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Checkpoint, Generation, Quarantine
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from tests.checkpoint.world import full_tensors, stage, training_state, upload_nodes
from tests.membership.bucket import WatchedStore
from tests.membership.world import generation, member

WAIT_S = 20.0


class DisturbedStore(WatchedStore):
    """A store that calls `before` before each create and delete."""

    before: Callable[[str, str], None] = staticmethod(lambda verb, key: None)  # type: ignore[assignment]

    def _ask(self, verb: str, key: str, *arguments: Any) -> Any:
        if verb in ("create", "delete"):
            self.before(verb, key)
        return super()._ask(verb, key, *arguments)


class World:
    """A run of one node with one worker. It commits one checkpoint at a time."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every_steps: int = 0,
        store: Store | None = None,
        generation_number: int = 1,
        tidy: bool = True,
    ) -> None:
        self.folder = folder
        self.store = DisturbedStore(store or open_store(f"file://{folder / 'run'}"))
        self.log = RunLog(self.store, writer="a")
        self.generation: Generation = replace(
            generation("a"),
            number=generation_number,
            members=(replace(member("a"), incarnation="abcd"),),
        )
        self.log.append(lambda _: self.generation, generation=generation_number - 1)
        self.done: dict[int, threading.Event] = {}
        self.commits: list[Checkpoint] = []
        self.failed: list[int] = []
        self.untidied: list[Exception] = []
        self.committer = Committer(
            self.store,
            self.log,
            StepHistory(),
            self.generation.members[0].incarnation,
            CommitRules(keep, keep_every_steps, last_step=100, timeout_s=WAIT_S, tidy=tidy),
            self,
        )

    def ended(self, generation: Generation, step: int, failure: Exception | None) -> None:
        """See `CommitListener`."""
        if failure is not None:
            self.failed.append(step)
        self.done[step].set()

    def untidy(self, failure: Exception) -> None:
        """See `CommitListener`."""
        self.untidied.append(failure)

    def committed(self, checkpoint: Checkpoint) -> None:
        """See `CommitListener`."""
        self.commits.append(checkpoint)

    def upload(self, step: int) -> None:
        """Upload a worker's shard of a step."""
        directory = directory_of(self.generation, step)
        run_id = self.log.view.run_id
        shards = stage(
            self.folder, full_tensors(), 1, directory, training_state(step), run_id=run_id
        )
        upload_nodes(self.store, shards)

    def commit(self, step: int, request: int = -1) -> None:
        """Upload and commit a step's checkpoint. Returns when the workers are released."""
        self.upload(step)
        self.done[step] = threading.Event()
        self.committer.expect(step, self.generation, request)
        assert self.done[step].wait(WAIT_S)

    def there(self, step: int) -> bool:
        """Whether files of a checkpoint are in the bucket."""
        return bool(self.store.keys(f"{directory_of(self.generation, step)}/"))

    def step_back(self) -> None:
        """Quarantine every checkpoint that the newest COMMIT names, like a start that finds all of them damaged."""
        for checkpoint in self.log.view.checkpoints:
            why = Quarantine(checkpoint.directory, "torn")
            self.log.append(lambda _, why=why: why, generation=self.generation.number)  # type: ignore[misc]

    def succeed(self) -> None:
        """The same node starts the next generation."""
        number = self.generation.number
        self.generation = replace(self.generation, number=number + 1)
        self.log.append(lambda _: self.generation, generation=number)
