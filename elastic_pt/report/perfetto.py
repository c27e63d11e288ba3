"""A trace of a run for ui.perfetto.dev, from its log and history. Pure: records and step lines in, events out.

    process "run"      generations │ steps │ loss, world size │ commits, requests, quarantines, the end
    process "node b"   generation 1 [ start, process group, restore, first step ] ─ lost ─ detect ─ agree ─ generation 2 …

The format is the Chrome trace event format in JSON, in microseconds since the first record. Where things are is an
estimate, how long they took is not: the times of records come from the wall clocks of different machines. So

- no record is earlier than the one before it: the order is the log's;
- detect and agree end at the GENERATION, with the durations that it has; start, process group, restore and first
  step follow it, with the durations of its RECOVERY (the slowest member's);
- steps follow each other from there on, with the seconds that rank 0's worker measured;
- what would be outside of its generation is cut off.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from elastic_pt.report.change import Change, Clause, title_of, what_happened
from elastic_pt.report.explanation import explain
from elastic_pt.report.status import describe
from elastic_pt.runlog.records import (
    Commit,
    Control,
    Generation,
    Quarantine,
    Record,
    Recovery,
    Reopen,
    Stop,
    Verb,
)

STEP_SLICES_MAX: Final = 100_000
Event = dict[str, Any]
_RUN: Final = 1
"""The process of the run; those of the nodes follow."""
_GENERATIONS, _STEPS, _RECORDS = 1, 2, 3
"""The threads of the run."""


@dataclass
class _Life:
    """One generation in time. Seconds since the first record."""

    body: Generation
    begin_s: float
    """Its record."""
    broke_s: float
    """When the one before it broke: the last sign of life of the lost member."""
    noticed_s: float
    change: Change | None
    """None for the first one."""
    end_s: float
    """When it trained no more."""
    recovery: Recovery | None = None
    paused: str = ""
    """The request that paused it, if it was paused."""

    @property
    def title(self) -> str:
        return title_of(self.body.number, len(self.body.members), self.body.world_size)

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset(member.node for member in self.body.members)


def steps_per_slice(records: Iterable[Record], slices_max: int = STEP_SLICES_MAX) -> int:
    """How many steps must share a slice, so that the trace has about `slices_max` of them."""
    commits = (record.body for record in records if isinstance(record.body, Commit))
    # Steps that were committed twice are few. They do not count here.
    steps = max((commit.newest.step for commit in commits), default=0)
    return max(1, -(-steps // slices_max))


def trace_events(
    records: Sequence[Record], lines: Iterable[dict[str, Any]], per_slice: int
) -> Iterator[Event]:
    """The events of a trace. `lines` are the history's, in the order of their commits."""
    times = _times_s(records)
    lives = _lives(records, times)
    nodes = list(dict.fromkeys(member.node for each in lives for member in each.body.members))
    process_of = {node: _RUN + 1 + index for index, node in enumerate(nodes)}
    yield from _names(_RUN, "run", "generations", "steps", "records")
    for node, process in process_of.items():
        yield from _names(process, f"node {node}", "membership")
    yield from _generation_slices(lives, _RUN, None)
    for node, process in process_of.items():
        yield from _generation_slices(lives, process, node)
    before: frozenset[str] = frozenset()
    for each in lives:
        yield _counter("world size", each.begin_s, each.body.world_size)
        yield from _happenings(each, before, process_of)
        before = each.nodes
    for record, time_s in zip(records, times, strict=True):
        name = _record_name(record)
        if name:
            yield _instant(_RUN, _RECORDS, name, time_s, {"text": describe(record)})
    yield from _step_slices(lives, lines, per_slice)


def _times_s(records: Sequence[Record]) -> list[float]:
    """When each record was written, since the first one. None is earlier than the one before."""
    found: list[float] = []
    for record in records:
        time_s = record.written_at_s
        found.append(max(time_s, found[-1] if found else time_s))
    return [time_s - found[0] for time_s in found]


def _lives(records: Sequence[Record], times: Sequence[float]) -> list[_Life]:
    changes = {each.generation: each for each in explain(records) if isinstance(each, Change)}
    lives: list[_Life] = []
    over = False
    """The newest generation has ended, although the next one has not begun."""
    for record, time_s in zip(records, times, strict=True):
        body = record.body
        if isinstance(body, Generation):
            change = changes.get(body.number)
            lives.append(_next_life(body, time_s, change, lives[-1] if lives else None, over))
            over = False
            continue
        if not lives:
            continue
        newest = lives[-1]
        if not over:
            newest.end_s = time_s
        if isinstance(body, Recovery) and body.number == newest.body.number:
            newest.recovery = body
        elif isinstance(body, Stop):
            over = True
        elif isinstance(body, Control) and body.request.done and body.request.verb is Verb.PAUSE:
            over, newest.paused = True, str(body.request)
    return lives


def _next_life(
    body: Generation, time_s: float, change: Change | None, before: _Life | None, over: bool
) -> _Life:
    """The life that begins now. Ends the one before."""
    if before is None:
        return _Life(body, time_s, time_s, time_s, change, time_s)
    noticed_s = time_s - body.agree_s
    broke_s = noticed_s - max((cause.detect_s for cause in body.causes), default=0.0)
    # Nothing tells how long members lived that were all lost: until the last record, at least.
    if not over and (change is None or not change.resumed_by_new_nodes):
        before.end_s = max(before.begin_s, broke_s)
    noticed_s = max(noticed_s, before.end_s)
    broke_s = max(broke_s, before.end_s)
    return _Life(body, time_s, broke_s, noticed_s, change, time_s)


# ---- events ------------------------------------------------------------------------------------------


def _generation_slices(lives: Sequence[_Life], process: int, node: str | None) -> Iterator[Event]:
    """The generations of a node with their phases; those of the run without a node."""
    before: _Life | None = None
    for each in lives:
        if node is not None and node not in each.nodes:
            before = each
            continue
        if before is not None and (node is None or node in before.nodes):
            if before.paused:
                name = f"paused: {before.paused}"
                yield _slice(process, _GENERATIONS, name, before.end_s, each.broke_s)
            if each.broke_s < each.noticed_s:
                yield _slice(process, _GENERATIONS, "detect", each.broke_s, each.noticed_s)
            yield _slice(process, _GENERATIONS, "agree", each.noticed_s, each.begin_s)
        arguments = {"text": each.body.reason if each.change is None else str(each.change)}
        yield _slice(process, _GENERATIONS, each.title, each.begin_s, each.end_s, arguments)
        begin_s = each.begin_s
        for name, seconds in _phases(each.recovery):
            begin_s, end_s = min(begin_s, each.end_s), min(begin_s + seconds, each.end_s)
            yield _slice(process, _GENERATIONS, name, begin_s, end_s, {"seconds": seconds})
            begin_s = end_s
        before = each


def _phases(recovery: Recovery | None) -> list[tuple[str, float]]:
    if recovery is None:
        return []
    return [
        ("start", recovery.start_s),
        ("process group", recovery.group_s),
        ("restore", recovery.restore_s),
        ("first step", recovery.step_s),
    ]


def _happenings(life: _Life, before: frozenset[str], process_of: dict[str, int]) -> Iterator[Event]:
    """Why the generation began: at the tracks of the nodes to which it happened, else at that of the run.

    What happened to a node of the generation before (`before`) ended that one.
    """
    clauses = [Clause((), life.body.reason)] if life.change is None else what_happened(life.change)
    for clause in clauses:
        for node in clause.nodes or ("",):
            time_s = life.broke_s if node in before or not node else life.begin_s
            arguments = {"generation": life.body.number}
            process = process_of.get(node, _RUN)
            yield _instant(process, _GENERATIONS, clause.text, time_s, arguments)


def _record_name(record: Record) -> str:
    match record.body:
        case Commit() as commit:
            return f"commit step {commit.newest.step}"
        case Control() as control:
            return f"{'done: ' if control.request.done else ''}{control.request}"
        case Quarantine() as quarantine:
            return f"quarantine of {quarantine.directory or f'node {quarantine.node}'}"
        case Stop() as stop:
            return f"end: {stop.reason}"
        case Reopen() as reopen:
            return f"reopened: {reopen.why}"
    return ""


def _step_slices(
    lives: Sequence[_Life], lines: Iterable[dict[str, Any]], per_slice: int
) -> Iterator[Event]:
    by_number = {each.body.number: each for each in lives}
    reached_s = {
        number: each.begin_s + sum(seconds for _, seconds in _phases(each.recovery)[:-1])
        for number, each in by_number.items()
    }
    for group in _groups(lines, per_slice):
        number = group[0].get("generation")
        if number not in by_number:
            # Lines of older runs may lack their generation.
            continue
        first, last = group[0], group[-1]
        end_s = by_number[number].end_s
        begin_s = min(reached_s[number], end_s)
        reached_s[number] = begin_s + sum(line.get("seconds") or 0.0 for line in group)
        end_s = min(reached_s[number], end_s)
        same = first is last
        name = f"step {last['step']}" if same else f"steps {first['step']} to {last['step']}"
        arguments = {
            key: last[key]
            for key in ("loss", "gradient_norm", "tokens", "skipped", "phases")
            if last.get(key)
        }
        yield _slice(_RUN, _STEPS, name, begin_s, end_s, arguments)
        if last.get("loss") is not None:
            yield _counter("loss", end_s, last["loss"])


def _groups(lines: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Consecutive lines of one generation, at most `size`."""
    group: list[dict[str, Any]] = []
    for line in lines:
        follows = group and line.get("generation") == group[-1].get("generation")
        if group and (len(group) == size or not follows):
            yield group
            group = []
        group.append(line)
    if group:
        yield group


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _slice(
    process: int,
    thread: int,
    name: str,
    begin_s: float,
    end_s: float,
    arguments: dict[str, Any] | None = None,
) -> Event:
    # Both ends are rounded, not the duration: neighbours stay neighbours.
    begin, end = _microseconds(begin_s), _microseconds(end_s)
    where = {"pid": process, "tid": thread, "ts": begin, "dur": max(0, end - begin)}
    return {"ph": "X", "name": name, "cat": "run", **where, "args": arguments or {}}


def _instant(
    process: int, thread: int, name: str, time_s: float, arguments: dict[str, Any]
) -> Event:
    where = {"pid": process, "tid": thread, "ts": _microseconds(time_s), "s": "t"}
    return {"ph": "i", "name": name, "cat": "run", **where, "args": arguments}


def _counter(name: str, time_s: float, value: float) -> Event:
    where = {"pid": _RUN, "tid": 0, "ts": _microseconds(time_s)}
    return {"ph": "C", "name": name, "cat": "run", **where, "args": {name: value}}


def _names(process: int, name: str, *threads: str) -> Iterator[Event]:
    yield _metadata(process, 0, "process_name", {"name": name})
    yield _metadata(process, 0, "process_sort_index", {"sort_index": process})
    for index, thread in enumerate(threads, start=1):
        yield _metadata(process, index, "thread_name", {"name": thread})


def _metadata(process: int, thread: int, name: str, arguments: dict[str, Any]) -> Event:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "ts": 0, "args": arguments}
