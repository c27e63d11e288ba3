"""What must hold of a run's directory after a chaos run, whatever struck it. Only reads; any process.

    log ─► check_lineage      one history of members and states
    log, histories ─► check_ledger      each row of the plan once, in order
    log, checkpoints ─► check_digest, check_checkpoints      the bits of the undisturbed run
    log, accounts ─► check_goodput      each node-second counts once

Each returns one line about what it found, or raises `Objection`. They use the product's readers, but not its judgement:
what a fenced writer or a damaged checkpoint is, is said here once more.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from elastic_pt.checkpoint.digest import digest
from elastic_pt.checkpoint.history import read_history
from elastic_pt.checkpoint.index import read_manifest
from elastic_pt.checkpoint.verify import verify
from elastic_pt.config import TrainSection
from elastic_pt.report.change import Change
from elastic_pt.report.explanation import explain
from elastic_pt.report.goodput import Goodput, failure_costs, goodput_of
from elastic_pt.runlog.log import RunLog, RunView, fold
from elastic_pt.runlog.records import COMPLETED, Checkpoint, Commit, Generation, Record, Recovery
from elastic_pt.store.port import Store
from elastic_pt.telemetry.account import Account
from elastic_pt.telemetry.goodput import Bucket

_BUCKETS_TOLERANCE: Final = 0.005
_SUM_S: Final = 0.01
_EXACT: Final = ("loss", "z_loss", "gradient_norm", "learning_rate", "sources", "skipped")
"""What a line of the history tells of a step, whoever trained it."""


class Objection(Exception):
    """What an oracle does not accept, in one line."""


def check_lineage(records: Sequence[Record]) -> str:
    """Generations count up by one; each begins from a committed state; only members of the newest one append.

    `records`: all of a log. The hash chain is checked where they are read (`RunLog.records`).
    """
    view = RunView()
    committed: list[Checkpoint] = []
    generations: list[Generation] = []
    for record in records:
        where = f"record {record.index} ({record.kind} by {record.writer})"
        body = record.body
        if isinstance(body, Generation):
            _check_generation(where, body, view, committed)
            generations.append(body)
        elif isinstance(body, Commit | Recovery):
            members = () if view.generation is None else view.generation.members
            if record.writer not in {each.node for each in members}:
                raise Objection(
                    f"{where}: not a member of generation {view.generation_number}, expected a member"
                )
        if isinstance(body, Commit):
            _check_commit(where, body.newest, view, generations)
            committed.append(body.newest)
        view = fold(view, record)
    return f"{len(records)} records, {len(generations)} generations, {len(committed)} commits"


def _check_generation(
    where: str, generation: Generation, view: RunView, committed: Sequence[Checkpoint]
) -> None:
    if generation.number != view.generation_number + 1:
        raise Objection(
            f"{where}: generation {generation.number} after {view.generation_number}, expected the next"
        )
    resume = generation.resume
    if resume is not None and (resume not in committed or resume.directory in view.quarantined):
        raise Objection(
            f"{where}: resumes from {resume.directory}, expected a committed checkpoint"
        )
    if generation.committed_step < view.committed_step:
        raise Objection(
            f"{where}: resumes from step {generation.committed_step}, expected the newest commit, "
            f"of step {view.committed_step}"
        )


def _check_commit(
    where: str, checkpoint: Checkpoint, view: RunView, generations: Sequence[Generation]
) -> None:
    """The committed state is one that each later generation has gone through, too."""
    if checkpoint.step <= view.committed_step:
        raise Objection(
            f"{where}: step {checkpoint.step}, expected one after the commit of step {view.committed_step}"
        )
    for generation in generations:
        if generation.number == checkpoint.generation and generation.resume_step > checkpoint.step:
            raise Objection(
                f"{where}: step {checkpoint.step} of generation {generation.number}, "
                f"which began at step {generation.resume_step}"
            )
        if generation.number > checkpoint.generation and generation.resume_step < checkpoint.step:
            raise Objection(
                f"{where}: step {checkpoint.step} of generation {checkpoint.generation}, but generation "
                f"{generation.number} has gone back to step {generation.resume_step}"
            )
    if checkpoint.generation not in {each.number for each in generations}:
        raise Objection(f"{where}: of generation {checkpoint.generation}, expected one before it")


def check_ledger(
    store: Store,
    records: Sequence[Record],
    train: TrainSection,
    undisturbed: Mapping[int, Mapping[str, Any]] = MappingProxyType({}),
) -> str:
    """Each row of the plan exactly once in the committed history, in order: no gap, no overlap.

    What a line tells of its step, such as the loss, is what the `undisturbed` run's line of that step tells.

    The history must reach the newest commit, and in a completed run the last step.
    """
    lines: list[dict[str, Any]] = []
    view = RunView()
    for record in records:
        body = record.body
        if isinstance(body, Generation):
            # A checkpoint that was committed and later found unusable: its steps were done again.
            lines = [line for line in lines if line["step"] <= body.resume_step]
            # The lines of a state that was in memory are in the next commit, whichever node was lost.
            if len(lines) != body.resume_step and body.memory is None:
                raise Objection(
                    f"generation {body.number} begins at step {body.resume_step}, "
                    f"but the history before it has {len(lines)} steps"
                )
        elif isinstance(body, Commit):
            lines += read_history(store, body.history)
            if len(lines) != body.newest.step:
                raise Objection(
                    f"the history up to the commit of step {body.newest.step} has {len(lines)} steps"
                )
        view = fold(view, record)
    for number, line in enumerate(lines, start=1):
        first = (number - 1) * train.global_batch
        found, expected = (line["step"], *line["rows"]), (number, first, first + train.global_batch)
        if found != expected:
            raise Objection(
                f"line {number} of the history: step {found[0]} of rows {found[1]} to {found[2]}, "
                f"expected step {number} of rows {expected[1]} to {expected[2]}"
            )
        both = (line, undisturbed.get(number, line))
        told, exact = ({key: each[key] for key in _EXACT} for each in both)
        if told != exact:
            raise Objection(f"line {number} of the history: {told}, expected {exact}")
    if (last := completed_step(view)) is not None and last != len(lines):
        raise Objection(f"the run ended at step {last}, the history has {len(lines)}")
    return f"{len(lines)} steps, {len(lines) * train.global_batch} rows, each once"


def completed_step(view: RunView) -> int | None:
    """The step at which the run has completed; None if it has not."""
    stop = view.stop
    return stop.step if stop is not None and stop.reason == COMPLETED else None


def run_digest(store: Store, view: RunView) -> str:
    """Digest of the newest committed checkpoint."""
    return digest(store, read_manifest(store, view.checkpoints[0], view.run_id))


def check_digest(store: Store, view: RunView, references: Mapping[int, str]) -> str:
    """The newest committed state has the bits of the undisturbed run at its step; a completed run's is its last."""
    if not view.checkpoints:
        if view.stop is not None and view.stop.step == 0:
            return "no checkpoint is committed, as the run ended before its first step"
        raise Objection("no checkpoint is committed")
    step = view.checkpoints[0].step
    if (last := completed_step(view)) is not None and step != last:
        raise Objection(f"the newest commit is of step {step}, expected {last}")
    found, expected = run_digest(store, view), references.get(step)
    if expected is None:
        return f"step {step}: {found[:16]}, which the undisturbed run has not kept"
    if found != expected:
        raise Objection(f"step {step}: {found[:16]}, expected {expected[:16]}")
    return f"step {step}: {found[:16]} as in the undisturbed run"


def check_checkpoints(store: Store, log: RunLog, references: Mapping[int, str]) -> str:
    """Each checkpoint that may be used has no wrong byte, is of its step, and has the undisturbed run's bits there."""
    view, count, compared = log.view, 0, 0
    for checkpoint in log.usable(view):
        problems = verify(store, checkpoint, view.run_id)
        if problems:
            raise Objection(f"step {checkpoint.step}: {'; '.join(problems)}")
        manifest = read_manifest(store, checkpoint, view.run_id)
        if manifest.state.step != checkpoint.step:
            raise Objection(f"step {checkpoint.step}: has the state of step {manifest.state.step}")
        expected = references.get(checkpoint.step)
        if expected is not None:
            compared += 1
            if (found := digest(store, manifest)) != expected:
                raise Objection(f"step {checkpoint.step}: {found[:16]}, expected {expected[:16]}")
        count += 1
    return f"{count} checkpoints verified, {compared} of them compared with the undisturbed run"


def goodput_at(now_at_s: float, accounts: Sequence[Account], records: Sequence[Record]) -> Goodput:
    """What the run's node-seconds were spent on, up to a Unix time; infinite if no agent runs any more."""
    changes = [each for each in explain(records) if isinstance(each, Change)]
    failures = failure_costs(records, changes, {})
    return goodput_of(accounts, records, now_at_s, failures)


def check_goodput(goodput: Goodput) -> str:
    """Each node-second, of every agent that had started, counts in exactly one bucket."""
    if not goodput.agents:
        raise Objection("no agent has an account")
    spent_s = sum(goodput.buckets.values())
    if abs(spent_s - goodput.node_seconds) > _BUCKETS_TOLERANCE * goodput.node_seconds:
        raise Objection(
            f"the buckets add up to {spent_s:.3f} s, expected {goodput.node_seconds:.3f} node-seconds"
        )
    time_s = sum(each.ended_at_s - each.started_at_s for each in goodput.agents)
    useful_s = sum(each.seconds[Bucket.PRODUCTIVE] for each in goodput.agents)
    share = goodput.goodput or 0.0
    if abs(goodput.node_seconds - time_s) > _SUM_S or abs(share * time_s - useful_s) > _SUM_S:
        raise Objection(
            f"{share:.3f} of {goodput.node_seconds:.3f} node-seconds are productive, "
            f"expected {useful_s:.3f} s of {time_s:.3f} s by its agents"
        )
    return f"{spent_s:.3f} s in buckets, {goodput.node_seconds:.3f} node-seconds"
