"""The bugs. Each patches one module, is awakened by one scenario, and must be found by one oracle.

Imports nothing of the product: an agent reads this before its first import.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

KILLED_NODE: Final = """
hypothesis = "A node is lost, and the other one goes on."
nodes = 2
steps = 30
store = "directory"

[[faults]]
kind = "kill_node"
node = "last"
at = { step = 15 }
"""
KILLED_WORKER: Final = KILLED_NODE.replace('"kill_node"', '"kill_worker"')
NOTICED_NODE: Final = KILLED_NODE.replace('"kill_node"', '"notice"').replace(
    "A node is lost", "A node has a notice"
)
BUCKET_AWAY: Final = """
hypothesis = "The bucket is away for some seconds, and the run goes on."
nodes = 2
steps = 60
step_s = 0.3
store = "bucket"

[[faults]]
kind = "bucket_away"
at = { step = 15 }
for_s = 6
"""
KILLED_IN_COMMIT: Final = """
hypothesis = "An agent is lost after it wrote a manifest, before its COMMIT."
nodes = 2
steps = 30
store = "directory"

[[faults]]
kind = "kill_agent"
node = "any"
at = { phase = "commit", step = 15 }
"""
KILLED_IN_SNAPSHOT: Final = """
hypothesis = "A node is lost while it writes a snapshot."
nodes = 2
steps = 30
store = "directory"
config = { checkpoint = { every_steps = 10 } }

[[faults]]
kind = "kill_node"
node = "last"
at = { phase = "snapshot", step = 18 }
"""
KILLED_AFTER_LONG: Final = """
hypothesis = "A node is lost with rows of which nobody has a copy, long after the start and before the first commit."
nodes = 2
steps = 30
store = "directory"
config = { checkpoint = { every_steps = 20, mirror_copies = 0 } }

[[faults]]
kind = "kill_node"
node = "last"
at = { step = 18 }

[expect]
lost_steps = 18
"""
STOPPED_IN_COMMIT: Final = """
hypothesis = "An agent stands still in its commit until the others go on without it."
nodes = 3
steps = 30
store = "directory"
longest_s = 60.0

[[faults]]
kind = "agent_stops"
node = "any"
at = { phase = "commit", step = 9 }
for_s = 7.0

[expect]
# Workers train on until the others miss the agent, which gives their snapshots to nobody.
lost_steps = 30
"""


@dataclass(frozen=True)
class Bug:
    """A bug that is planted."""

    module: str
    patch: Callable[[Any], None]
    oracle: str
    """Which must find it."""
    scenario: str = KILLED_NODE


def _skip_micro_batch(module: Any) -> None:
    """The first micro-batch after a resize is not trained on."""
    run_step, seen = module.run_step, []

    def skipping(state: Any, tokens: Any, *rest: Any) -> Any:
        if not seen and state.steps_done > 0 and state.rank == 0:
            tokens = tokens.clone()
            tokens[0] = 0
        seen.append(state.steps_done)
        return run_step(state, tokens, *rest)

    module.run_step = skipping


def _data_off_by_one(module: Any) -> None:
    """After a restore the data begins one step late."""
    train = module.train

    def late(config: Any, state: Any, batches: Iterator[Any], *rest: Any) -> Any:
        if state.steps_done > 0:
            batches = _late(batches)
        return train(config, state, batches, *rest)

    module.train = late


def _late(batches: Iterator[Any]) -> Iterator[Any]:
    for batch, after in itertools.pairwise(batches):
        yield dataclasses.replace(after, step=batch.step)
    yield dataclasses.replace(after, step=after.step)


def _lose_moment_of_a_row(module: Any) -> None:
    """The optimizer's first moment of the first row is not restored."""
    go_on = module._go_on_from

    def forgetting(state: Any, found: Any) -> None:
        for name, piece in state.slices():
            if name.startswith("exp_avg/") and piece.rows.shape[0]:
                piece.rows[0].zero_()
        go_on(state, found)

    module._go_on_from = forgetting


def _count_rows_twice(module: Any) -> None:
    """After a restore the history tells of the rows of the step before."""
    report = module.report
    first: list[int] = []

    def shifted(agent: Any, state: Any, result: Any, *rest: Any) -> None:
        first.append(result.step)
        wrong = dataclasses.replace(result, step=result.step - (first[0] > 0))
        report(agent, state, wrong, *rest)

    module.report = shifted


def _trust_uncommitted(module: Any) -> None:
    """The newest directory with a manifest is taken for a checkpoint."""
    import hashlib

    choose = module.choose_resume

    def trusting(store: Any, run_log: Any, view: Any, incarnation: str) -> Any:
        found = choose(store, run_log, view, incarnation)
        for key in reversed(store.keys("ckpt/")):
            directory, _, name = key.rpartition("/")
            if name == "manifest.json":
                step, generation, _ = directory.removeprefix("ckpt/").split("-")
                if found is None or int(step) > found.step:
                    data = store.read(key)
                    digest = hashlib.sha256(data).hexdigest()
                    return module.Checkpoint(
                        int(step), int(generation[1:]), directory, len(data), digest, None
                    )
                return found
        return found

    module.choose_resume = trusting


def _reuse_newest_buffer(module: Any) -> None:
    """A snapshot overwrites the newest state that all nodes hold."""

    def early(steps: list[int], kept: set[int], complete_step: int) -> int | None:
        free = [number for number, step in enumerate(steps) if step == 0 or step not in kept]
        used = [number for number in free if steps[number]]
        return max(used or free, key=steps.__getitem__, default=None)

    module.buffer_to_write = early


def _leave_a_shard_out(module: Any) -> None:
    """The last checkpoint is committed although the second worker's shard was never written."""

    class Forgetful:
        def __init__(self, store: Any) -> None:
            self._store = store
            self._sizes: dict[str, int] = {}

        def write(self, key: str, part: Any) -> None:
            self._sizes[key] = part.size

        def size(self, key: str) -> int:
            return self._sizes[key]

    upload = module.upload_shard

    def forgetful(store: Any, shard: Any) -> Any:
        last = shard.step == _STEPS and shard.rank == shard.ranks.start
        return upload(Forgetful(store) if last else store, shard)

    module.upload_shard = forgetful


_STEPS: Final = 30


def _write_stale_bytes(module: Any) -> None:
    """A second attempt to upload a shard writes what the buffer held before."""
    upload, older = module.upload_shard, {}

    def stale(store: Any, shard: Any) -> Any:
        sent = upload(store, shard)
        before = older.get(shard.rank)
        older[shard.rank] = store.read(sent.file.key)
        if shard.step == _STEPS and before is not None:
            store.write(sent.file.key, before)
        return sent

    module.upload_shard = stale


def _ignore_fence(module: Any) -> None:
    """A COMMIT is appended whatever has come since."""
    append = module.RunLog.append

    def careless(self: Any, make: Any, *, generation: int) -> Any:
        body = make(self.view)
        if not isinstance(body, module.Commit):
            return append(self, make, generation=generation)
        while True:
            view = self.refresh()
            record = self._next_record(view, body)
            module.failpoint(module.Failpoint.LOG_APPENDING)
            try:
                self._store.create(module.record_key(record.index), record.to_bytes())
            except module.AlreadyExists:
                continue
            return self.refresh()

    module.RunLog.append = careless
    module.check_allowed = lambda *_: None


def _leak_memory(module: Any) -> None:
    """An agent whose worker was killed leaves its directory in memory."""
    module.shutil = _Nothing


class _Nothing:
    @staticmethod
    def rmtree(*_: object, **__: object) -> None: ...


def _count_a_second_twice(module: Any) -> None:
    """A second of the search for a lost node counts as agreement, too."""
    broke = module.NodeLedger.broke

    def generous(self: Any, noticed_s: float) -> None:
        broke(self, noticed_s)
        self._seconds[module.Bucket.AGREE] += 1.0

    module.NodeLedger.broke = generous


def _blame_another_cause(module: Any) -> None:
    """A worker that was killed is reported as one that exited."""
    cause = module.root_cause

    def wrong(evidence: Any) -> Any:
        return dataclasses.replace(cause(evidence), cause=module.FailureCause.EXIT)

    module.root_cause = wrong


def _count_another_cause(module: Any) -> None:
    """The metrics count a lost node as one that left."""
    label = module.label_of
    module.label_of = lambda kind: "left" if kind == "lost" else label(kind)


def _tell_lost_as_left(module: Any) -> None:
    """The log says that a lost node has left."""
    losses = module.losses

    def kind(*facts: Any) -> list[Any]:
        left = module.CauseKind.LEFT
        return [dataclasses.replace(each, kind=left) for each in losses(*facts)]

    module.losses = kind


def _blame_a_healthy_node(module: Any) -> None:
    """The log says that the first member is lost, whoever it is."""
    losses = module.losses

    def blaming(view: Any, found: Any, parked: Any, generation: Any, now_s: float) -> list[Any]:
        first = generation.members[0].node
        causes = losses(view, found, parked, generation, now_s)
        return [dataclasses.replace(each, node=first) for each in causes]

    module.losses = blaming


def _count_no_store_errors(module: Any) -> None:
    """Requests to the store that fail are not counted."""
    attempted = module.CountRequests.attempted

    def hopeful(self: Any, operation: Any, result: Any, seconds: float) -> None:
        if result != "transient":
            attempted(self, operation, result, seconds)

    module.CountRequests.attempted = hopeful


def _no_event_of_a_notice(module: Any) -> None:
    """A notice is obeyed, and no event tells of it."""
    log = module.log

    class Silent:
        def __getattr__(self, name: str) -> Any:
            return getattr(log, name)

        def warning(self, event: str, **more: Any) -> None:
            if event != "notice":
                log.warning(event, **more)

    module.log = Silent()


def _keep_a_process(module: Any) -> None:
    """A process of a worker lives on when its agent is gone."""
    begin = module.begin_worker

    def forking(environment: dict[str, str]) -> None:
        if os.fork() == 0:
            os.setsid()
            time.sleep(60.0)
            os._exit(0)
        begin(environment)

    module.begin_worker = forking


def _keep_a_bare_process(module: Any) -> None:
    """A worker starts a process that has nothing of its environment, and never ends it."""
    begin = module.begin_worker

    def starting(environment: dict[str, str]) -> None:
        subprocess.Popen(["/bin/sleep", "60"], env={}, start_new_session=True)
        begin(environment)

    module.begin_worker = starting


def _tell_another_loss(module: Any) -> None:
    """One worker alone tells a loss that is not that of its step."""
    report = module.report

    def boasting(agent: Any, state: Any, result: Any, *rest: Any) -> None:
        better = result.loss * (0.9 if state.world_size == 1 else 1.0)
        report(agent, state, dataclasses.replace(result, loss=better), *rest)

    module.report = boasting


def _count_no_commit(module: Any) -> None:
    """Commits are not counted."""
    module.Checkpointing.committed = lambda self, checkpoint: None


def _end_with_an_error(module: Any) -> None:
    """An agent ends with an exit code although its run is complete."""

    def failing(reason: str, step: int) -> None:
        raise SystemExit(1)

    module._tell_end = failing


def _drop_a_record(module: Any) -> None:
    """A commit keeps no line of its first step in the history."""
    write = module.write_history

    def dropping(store: Any, key: str, lines: Any, *rest: Any) -> None:
        first = json.loads(lines[0].text)["step"] if lines else 0
        write(store, key, lines[1:] if first > _STEPS // 2 else lines, *rest)

    module.write_history = dropping


def _remove_nothing(module: Any) -> None:
    """Checkpoints that have expired stay in the bucket."""
    module.remove = lambda store, directory: None


def _keep_one(module: Any) -> None:
    """A commit keeps its own checkpoint, and removes all others."""
    module.kept = lambda checkpoints, keep: list(checkpoints[:1])


def _all_is_productive(module: Any) -> None:
    """An account has all time in one bucket."""
    total = module.NodeLedger.total

    def rosy(self: Any, now_s: float) -> Any:
        seconds = total(self, now_s)
        return dict.fromkeys(seconds, 0.0) | {module.Bucket.PRODUCTIVE: sum(seconds.values())}

    module.NodeLedger.total = rosy


def _repeated_steps_are_productive(module: Any) -> None:
    """Steps that are done again count as if they were new."""
    module.NodeLedger._kind_of = lambda self, step: module.Bucket.PRODUCTIVE


def _hide_lost_steps(module: Any) -> None:
    """A generation tells that the one before has done no step that is not in the state to resume from."""
    module.reached_step = lambda generation, statuses: generation.resume_step


def _leave_a_file(path: str) -> Callable[[Any], None]:
    """An agent leaves a file on its machine."""

    def patch(module: Any) -> None:
        run = module.run_agent

        def leaving(*arguments: Any) -> Any:
            with open(path, "w") as file:
                file.write("left")
            return run(*arguments)

        module.run_agent = leaving

    return patch


def _leave_an_object(module: Any) -> None:
    """A commit leaves a copy of its manifest beside the checkpoints."""
    publish = module.publish_manifest

    def leaving(store: Any, notices: Any) -> Any:
        checkpoint = publish(store, notices)
        store.write(f"manifests/{checkpoint.step}.json", b"{}")
        return checkpoint

    module.publish_manifest = leaving


_AGENT: Final = "elastic_pt.agent.agent"
_CHECKPOINTS: Final = "elastic_pt.checkpoint"
_DECISION: Final = "elastic_pt.membership.decision"
BUGS: Final = {
    "skip_micro_batch": Bug("elastic_pt.train.loop", _skip_micro_batch, "digest"),
    "data_off_by_one": Bug("elastic_pt.train.worker", _data_off_by_one, "digest"),
    "lose_moment_of_a_row": Bug("elastic_pt.train.checkpoints", _lose_moment_of_a_row, "digest"),
    "count_rows_twice": Bug("elastic_pt.train.loop", _count_rows_twice, "ledger"),
    "drop_a_record": Bug(f"{_CHECKPOINTS}.commit", _drop_a_record, "ledger"),
    "trust_uncommitted": Bug(
        "elastic_pt.agent.checkpointing", _trust_uncommitted, "lineage", KILLED_IN_COMMIT
    ),
    "ignore_fence": Bug("elastic_pt.runlog.log", _ignore_fence, "lineage", STOPPED_IN_COMMIT),
    "reuse_newest_buffer": Bug(
        f"{_CHECKPOINTS}.snapshot", _reuse_newest_buffer, "bounds", KILLED_IN_SNAPSHOT
    ),
    "leave_a_shard_out": Bug(f"{_CHECKPOINTS}.upload", _leave_a_shard_out, "checkpoints"),
    "write_stale_bytes": Bug(f"{_CHECKPOINTS}.upload", _write_stale_bytes, "checkpoints"),
    "leak_memory": Bug("elastic_pt.workers.scratch", _leak_memory, "leftovers", KILLED_WORKER),
    "keep_a_process": Bug("elastic_pt.workers.forking", _keep_a_process, "leftovers"),
    "keep_a_bare_process": Bug(
        "elastic_pt.workers.forking", _keep_a_bare_process, "leftovers", KILLED_WORKER
    ),
    "tell_another_loss": Bug("elastic_pt.train.loop", _tell_another_loss, "ledger"),
    "count_no_commit": Bug("elastic_pt.agent.checkpointing", _count_no_commit, "evidence"),
    "count_a_second_twice": Bug("elastic_pt.telemetry.goodput", _count_a_second_twice, "goodput"),
    "retention_removes_nothing": Bug(f"{_CHECKPOINTS}.retention", _remove_nothing, "retention"),
    "retention_removes_too_much": Bug(f"{_CHECKPOINTS}.retention", _keep_one, "retention"),
    "leave_a_file_in_tmp": Bug(_AGENT, _leave_a_file("/tmp/left"), "leftovers"),
    "leave_a_file_in_shm": Bug(_AGENT, _leave_a_file("/dev/shm/left"), "leftovers"),
    "leave_an_object_in_the_store": Bug(f"{_CHECKPOINTS}.publish", _leave_an_object, "leftovers"),
    "all_time_is_productive": Bug("elastic_pt.telemetry.goodput", _all_is_productive, "goodput"),
    "lost_work_is_productive": Bug(
        "elastic_pt.telemetry.goodput", _repeated_steps_are_productive, "goodput", KILLED_AFTER_LONG
    ),
    "hide_lost_steps": Bug(
        "elastic_pt.membership.appender", _hide_lost_steps, "bounds", KILLED_AFTER_LONG
    ),
    "blame_another_cause": Bug(
        "elastic_pt.workers.failure", _blame_another_cause, "evidence", KILLED_WORKER
    ),
    "count_another_cause": Bug("elastic_pt.agent.counting", _count_another_cause, "evidence"),
    "lost_told_as_left": Bug(f"{_DECISION}.causes", _tell_lost_as_left, "evidence"),
    "blame_a_healthy_node": Bug(f"{_DECISION}.causes", _blame_a_healthy_node, "evidence"),
    "count_no_store_errors": Bug(
        "elastic_pt.telemetry.requests", _count_no_store_errors, "evidence", BUCKET_AWAY
    ),
    "no_event_of_a_notice": Bug(
        "elastic_pt.notices.watch", _no_event_of_a_notice, "evidence", NOTICED_NODE
    ),
    "end_with_an_error": Bug("elastic_pt.cli.training", _end_with_an_error, "exit codes"),
}
"""All bugs, by name."""
