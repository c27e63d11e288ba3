"""A fleet that checkpoints to a bucket and is killed as a whole; a later fleet must find a whole run.

    before    a fleet commits some steps, and leaves attempts that it never committed
    attempt   a fleet takes over, restores, trains, uploads, commits, removes, sweeps ─► killed at a failpoint
    after     a fleet checks the log and every checkpoint, takes over, trains to the end; nothing superfluous is left

All parts are the product's own: takeover, restore, uploaders, committer, tidier, log, store. The state of a step is a
function of the seed and the step, so every checkpoint can be compared with it, bit for bit.
"""

import os
import random
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import torch

from elastic_pt import failpoints
from elastic_pt.agent.checkpointing import choose_resume
from elastic_pt.checkpoint.commit import CommitRules, Committer, directory_of
from elastic_pt.checkpoint.history import StepHistory, read_history
from elastic_pt.checkpoint.index import read_manifest
from elastic_pt.checkpoint.layout import shard_key
from elastic_pt.checkpoint.upload import KeptShard, Uploader
from elastic_pt.checkpoint.verify import verify
from elastic_pt.membership.appender import Appender
from elastic_pt.membership.decision.decide import Propose
from elastic_pt.membership.decision.memory import Memory
from elastic_pt.membership.own_status import OwnStatus
from elastic_pt.membership.peers import PeerTable
from elastic_pt.membership.resources import BoundStore, Resources
from elastic_pt.runlog.log import RunLog, RunView, check_allowed, fold
from elastic_pt.runlog.records import COMPLETED, Checkpoint, Commit, Generation
from elastic_pt.store import s3
from elastic_pt.store.local import UNFINISHED
from elastic_pt.store.open import open_store
from elastic_pt.store.port import KeepsUnfinished
from tests.checkpoint.world import (
    full_tensors,
    load_world,
    nodes_of,
    same_bits,
    stage,
    training_state,
)
from tests.crash.processes import Say
from tests.membership.world import LIMITS, member, waiting

SHAPES: Final = {"head.weight": (7, 3), "norm.weight": (5,), "wide": (9, 40)}
EVERY: Final = 2
"""Steps between two checkpoints."""
BEFORE: Final = 4
CRASH: Final = 8
LAST: Final = 10
"""The last steps of the three fleets."""
TORN: Final = 3
"""The step of an attempt that the first fleet never commits."""
_WAIT_S: Final = 30.0
_OLD_S: Final = 7200.0


@dataclass(frozen=True)
class Shape:
    """What a seed decides about a scenario."""

    seed: int
    workers: tuple[int, int, int]
    """Workers of each fleet."""
    workers_per_node: int
    keep: int
    keep_every_steps: int
    small_parts: bool
    """Whether shards are uploaded in several parts (only on S3)."""
    damaged: bool
    """Whether a file of the newest checkpoint is missing before the attempt."""
    completes: bool
    """Whether the attempt goes on to the end of the run."""

    @classmethod
    def of(cls, seed: int) -> "Shape":
        """The scenario of a seed."""
        draw = random.Random(f"bucket {seed}")
        counts = tuple(draw.randint(1, 3) for _ in range(3))
        return cls(
            seed,
            cast(tuple[int, int, int], counts),
            draw.choice((1, 2)),
            draw.choice((1, 2, 3)),
            draw.choice((0, 4)),
            draw.random() < 0.25,
            draw.random() < 0.25,
            draw.random() < 0.25,
        )


def state_of(seed: int, step: int) -> dict[str, torch.Tensor]:
    """The weights and moments after `step` steps."""
    return full_tensors(SHAPES, seed=1_000_003 * seed + step)


class Fleet:
    """One fleet of a scenario: all its agents and workers, in one process."""

    def __init__(self, url: str, shape: Shape, number: int, scratch: Path, say: Say) -> None:
        """`number` is 0 before, 1 for the attempt, 2 after."""
        s3.PART_BYTES = 1500 if shape.small_parts else 16 << 20
        self._shape = shape
        self._say = say
        self._scratch = scratch
        self.store = open_store(url, timeout_s=_WAIT_S)
        self.log = RunLog(self.store, writer=f"node-{number}")
        self._nodes = nodes_of(shape.workers[number], shape.workers_per_node)
        self._members = tuple(
            replace(member(f"n{index}", len(ranks)), incarnation=f"{number:02}{index:02}")
            for index, ranks in enumerate(self._nodes)
        )
        self._done: dict[int, threading.Event] = {}
        self._left = 0
        self._uploaded = threading.Condition()
        self._failures: list[str] = []

    def take_over(self) -> Generation:
        """Append the next GENERATION as an agent does, and load the state that it names."""
        self.log.refresh()
        first = self._members[0]
        resources = Resources(
            log=self.log,
            hints=self.store,
            clock_s=time.monotonic,
            bind_store=lambda: cast(BoundStore, first),
            choose_resume=lambda view: choose_resume(self.store, self.log, view, first.incarnation),
            on_drain=lambda _: None,
        )
        me = OwnStatus(replace(waiting("a"), member=first), resources)
        table, memory = PeerTable(time.monotonic), Memory(time.monotonic())
        Appender(me, table, memory, LIMITS, resources).propose(Propose(self._members, "started"))
        generation = self.log.view.generation
        assert generation is not None
        assert generation.members == self._members
        if generation.resume is not None:
            self.require_state(generation.resume, self._shape.workers[0])
        return generation

    def require_state(self, checkpoint: Checkpoint, readers: int) -> None:
        """Fail unless a checkpoint has, bit for bit, the state of its step."""
        manifest = read_manifest(self.store, checkpoint, self.log.view.run_id)
        assert manifest.state == training_state(checkpoint.step)
        found = load_world(self.store, manifest, readers)
        expected = state_of(self._shape.seed, checkpoint.step)
        assert found.keys() == expected.keys()
        wrong = [name for name, each in expected.items() if not same_bits(found[name], each)]
        assert not wrong, f"step {checkpoint.step}: {wrong} differ"

    def train(self, generation: Generation, until: int, *, finish: bool = False) -> None:
        """Do the steps up to `until`, with a checkpoint every `EVERY` steps."""
        history = StepHistory()
        rules = CommitRules(self._shape.keep, self._shape.keep_every_steps, LAST, _WAIT_S)
        first = self._members[0].incarnation
        committer = Committer(self.store, self.log, history, first, rules, self)
        uploaders = [
            Uploader(self.store, on_uploaded=self._note_upload, on_failed=self._note_failure)
            for _ in self._nodes
        ]
        for step in range(generation.resume_step + 1, until + 1):
            committer.note_step(generation.number, {"step": step, "loss": 1.0 / step})
            if step % EVERY == 0:
                self._checkpoint(generation, step, committer, uploaders)
        if finish:
            self._done[LAST] = threading.Event()
            committer.finish(generation)
            assert self._done[LAST].wait(_WAIT_S)
        committer.close(_WAIT_S)
        for each in uploaders:
            assert each.close(_WAIT_S)
        assert not self._failures, self._failures

    def _checkpoint(
        self, generation: Generation, step: int, committer: Committer, uploaders: list[Uploader]
    ) -> None:
        shards = self.staged(generation, step)
        self._done[step] = threading.Event()
        self._left = len(shards)
        committer.expect(step, generation)
        for shard in shards:
            uploaders[shard.rank // self._shape.workers_per_node].submit(shard)
        assert self._done[step].wait(_WAIT_S), self._failures
        with self._uploaded:
            assert self._uploaded.wait_for(lambda: self._left == 0, _WAIT_S), self._failures
        assert not self._failures, self._failures

    def staged(self, generation: Generation, step: int) -> list[KeptShard]:
        """The shards of all workers of a step."""
        return stage(
            self._scratch,
            state_of(self._shape.seed, step),
            generation.world_size,
            directory_of(generation, step),
            training_state(step),
            run_id=self.log.view.run_id,
            workers=self._shape.workers_per_node,
        )

    def _note_upload(self, _: KeptShard) -> None:
        with self._uploaded:
            self._left -= 1
            self._uploaded.notify_all()

    def _note_failure(self, shard: KeptShard, error: Exception) -> None:
        self._failures.append(f"upload {shard.rank}: {error}")
        self._note_upload(shard)

    def committed(self, checkpoint: Checkpoint) -> None:
        """See `CommitListener`."""
        self._say(f"committed {checkpoint.step}")

    def ended(self, generation: Generation, step: int, failure: Exception | None) -> None:
        """See `CommitListener`."""
        if failure is not None:
            self._failures.append(f"commit {step}: {failure}")
        self._done[step].set()

    def untidy(self, failure: Exception) -> None:
        """See `CommitListener`."""
        self._failures.append(f"tidy: {failure}")

    # ---- what must hold ------------------------------------------------------------------------

    def check(self, promised_step: int) -> None:
        """Fail unless the log has one lineage, every checkpoint that it names is whole, and no commit is lost."""
        view = self._check_lineage()
        assert view.commit is not None
        assert view.commit.newest.step >= promised_step, f"the commit of {promised_step} is lost"
        self.log.refresh()
        assert self.log.view.checkpoints == view.checkpoints
        draw = random.Random(self._shape.seed)
        for checkpoint in self.log.usable(view):
            problems = verify(self.store, checkpoint, view.run_id)
            if self._shape.damaged and (checkpoint.generation, checkpoint.step) == (1, BEFORE):
                assert problems
                continue
            assert problems == []
            self.require_state(checkpoint, draw.randint(1, 4))

    def _check_lineage(self) -> RunView:
        view, steps = RunView(), list[int]()
        for record in self.log.records():
            body = record.body
            check_allowed(view, body, view.generation_number)
            if isinstance(body, Generation):
                assert body.resume == next(self.log.usable(view), None)
                steps = steps[: body.resume_step]
                assert len(steps) == body.resume_step
            if isinstance(body, Commit):
                assert body.newest.generation == view.generation_number
                assert set(body.checkpoints[1:]) <= set(view.checkpoints)
                steps += [each["step"] for each in read_history(self.store, body.history)]
                assert steps == list(range(1, body.newest.step + 1)), steps
            view = fold(view, record)
        return view

    def check_end(self) -> None:
        """Fail unless the run is complete, and the bucket has only what the log names."""
        view = self.log.refresh()
        assert view.stop is not None
        assert (view.stop.reason, view.stop.step) == (COMPLETED, LAST)
        kept = {each.directory for each in view.checkpoints}
        kept |= {each.directory for each, _ in self.log.permanent(view)}
        found = {key.rpartition("/")[0] for key in self.store.keys("ckpt/")}
        assert found == kept, f"left: {found - kept}, missing: {kept - found}"
        if isinstance(self.store, KeepsUnfinished):
            assert self.store.unfinished("") == []


def prepare(root: Path, shape: Shape, scratch: Path) -> None:
    """The first fleet, on a local store: some commits, and an attempt without a commit."""
    fleet = Fleet(f"file://{root}", shape, 0, scratch, lambda _: None)
    generation = fleet.take_over()
    fleet.train(generation, BEFORE)
    torn = fleet.staged(generation, TORN)
    fleet.store.write(shard_key(torn[0].directory, 0), torn[0].path)
    if shape.damaged:
        fleet.store.delete(shard_key(fleet.log.view.checkpoints[0].directory, 0))


def attempt(root: Path, url: str, shape: Shape, scratch: Path, rules: str, say: Say) -> None:
    """The second fleet, which may be killed anywhere. The first one's files are at `root`."""
    fleet = Fleet(url, shape, 1, scratch, say)
    if isinstance(fleet.store, s3.S3Store):
        for path in (each for each in root.rglob("*") if each.is_file()):
            fleet.store.write(path.relative_to(root).as_posix(), path.read_bytes())
        torn = next(iter(sorted((root / "ckpt").glob(f"{TORN:010}-*"))))
        key = shard_key(f"ckpt/{torn.name}", 1)
        upload = fleet.store._call("test", "create_multipart_upload", key)["UploadId"]
        part = {"UploadId": upload, "PartNumber": 1, "Body": b"part"}
        fleet.store._call("test", "upload_part", key, **part)
    failpoints.arm(rules)
    say("ready")
    fleet.train(fleet.take_over(), LAST if shape.completes else CRASH, finish=shape.completes)
    hits = {} if failpoints._armed is None else failpoints._armed._hits
    for point, count in hits.items():
        say(f"reached {point.label} {count}")


def age_unfinished(root: Path) -> None:
    """The hidden files of killed writers in a local store become older than any writer that lives."""
    old_s = time.time() - _OLD_S
    for path in (root / UNFINISHED).glob("*"):
        os.utime(path, (old_s, old_s))


def recover(url: str, shape: Shape, scratch: Path, promised_step: int) -> None:
    """The third fleet: check what is there, go on to the end, and check that."""
    fleet = Fleet(url, shape, 2, scratch, lambda _: None)
    fleet.check(promised_step)
    if fleet.log.view.stop is not None:
        assert promised_step == LAST
        return
    fleet.train(fleet.take_over(), LAST, finish=True)
    fleet.check(LAST)
    fleet.check_end()
    if url.startswith("file://"):
        assert not list((Path(url.removeprefix("file://")) / UNFINISHED).glob("*"))
