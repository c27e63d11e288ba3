"""Records are read from the bucket as they were written, and older records are still read."""

import json
from dataclasses import replace
from typing import Any

import pytest

from elastic_pt.errors import LogDamaged
from elastic_pt.runlog.records import (
    ORIGIN,
    Body,
    Cause,
    CauseKind,
    Checkpoint,
    Commit,
    Control,
    Generation,
    InMemory,
    Kind,
    Member,
    Quarantine,
    Record,
    Recovery,
    Request,
    Stop,
    Verb,
)

CHECKPOINT = Checkpoint(150, 3, "ckpt/0000000150-g3-5f0c", 4711, "ab" * 32, 2.5)
GENERATION = Generation(
    number=4,
    members=(Member("a", "a1", "10.0.0.1", 4000, 17, 2), Member("b", "b1", "::1", 4001, 18, 1)),
    slots=(6, 2),
    store_address="10.0.0.1",
    store_port=4002,
    resume=CHECKPOINT,
    reason="lost c",
    causes=(
        Cause(CauseKind.LOST, "c", "silent for 1.6 s", detect_s=1.6),
        Cause(CauseKind.FAILED, "b", "worker 1: ValueError: bad", 151, "ValueError@loop.py:9"),
    ),
    frontier_step=171,
    agree_s=0.25,
)
PERMANENT = Commit((replace(CHECKPOINT, permanent=True),), "history/x", permanent_before=4)
BODIES: list[Body] = [
    GENERATION,
    replace(
        GENERATION,
        members=tuple(replace(each, zone="eu-1") for each in GENERATION.members),
        memory=InMemory(3, 171, (0, 1), ((1,), ())),
        mirrors=((1,), (0,)),
    ),
    Recovery(4, start_s=0.1, group_s=0.2, restore_s=0.3, step_s=0.4, total_s=1.25),
    Commit((CHECKPOINT,), "history/0000000150-g3-5f0c.jsonl"),
    PERMANENT,
    Quarantine("ckpt/0000000150-g3-5f0c", "part-00001.json is gone"),
    Quarantine("", "3 failures within 600 s, last: lost c", node="c", seconds=30.0),
    Stop("completed", 200),
    replace(GENERATION, why_not_memory="no member holds the rows of worker 1", restarts=2),
    Control(
        Request(Verb.DRAIN, "ann@desk", node="b", seconds=30.0, index=7),
        (Request(Verb.PAUSE, "ann@desk", "maintenance", index=5, done=True),),
        150,
    ),
]


def stored(body: Body) -> bytes:
    """A record as it is stored in the bucket."""
    return Record(
        7, 4, "a", "n", "2026-01-01T00:00:00.000+00:00", ORIGIN, {Kind.GENERATION: 6}, body
    ).to_bytes()


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_record_is_read_as_it_was_written(body: Body) -> None:
    """Every kind of record is read as it was written, with the SHA-256 of its bytes."""
    record = Record.from_bytes(stored(body), key="log/7")
    assert record.body == body
    assert (record.index, record.generation, record.latest) == (7, 4, {Kind.GENERATION: 6})
    assert record.sealed().sha256 == record.sha256
    assert record.kind == type(body).__name__.upper()


def without(body: Body, *names: str) -> bytes:
    """The record as an older version wrote it, without some fields of the body."""
    document: dict[str, Any] = json.loads(stored(body))
    for name in names:
        del document["body"][name]
    return json.dumps(document).encode()


def test_records_without_the_newer_fields_are_still_read() -> None:
    """A log from before causes, frontier, phases and node quarantines can still be read and continued."""
    newer = (
        "causes",
        "frontier_step",
        "agree_s",
        "why_not_memory",
        "reached_step",
        "below_minimum_s",
        "restarts",
    )
    old = Record.from_bytes(without(GENERATION, *newer), key="log/7").body
    assert isinstance(old, Generation)
    assert (old.reached_step, old.lost_steps, old.below_minimum_s) == (None, 0, 0.0)
    assert (old.causes, old.frontier_step, old.agree_s, old.why_not_memory) == ((), 0, 0.0, "")
    assert old.restarts == 0
    assert old.members == GENERATION.members
    commit = Commit((CHECKPOINT,), "history/x")
    document = json.loads(without(commit, "permanent_before"))
    del document["body"]["checkpoints"][0]["permanent"]
    assert Record.from_bytes(json.dumps(document).encode(), key="log/7").body == commit
    bad = Quarantine("ckpt/x", "bad")
    assert Record.from_bytes(without(bad, "node", "seconds"), key="log/7").body == bad


def test_only_a_log_with_a_request_has_the_newer_schema() -> None:
    """A version that knows no CONTROL reads every other log, and names the schema where it cannot."""
    control = BODIES[-1]
    assert isinstance(control, Control)
    plain = [each for each in BODIES[:-1] if each != PERMANENT]
    assert {json.loads(stored(each))["schema"] for each in plain} == {1}
    assert json.loads(stored(control))["schema"] == 2
    later = Record(
        8, 4, "a", "n", "2026-01-01T00:00:00.000+00:00", ORIGIN, {Kind.CONTROL: 7}, BODIES[5]
    )
    assert Record.from_bytes(later.to_bytes(), key="log/8").schema == 2
    other = stored(control).replace(b'"schema": 2', b'"schema": 4')
    with pytest.raises(LogDamaged, match="log/7: schema 4; expected 1, 2 or 3"):
        Record.from_bytes(other, key="log/7")


@pytest.mark.parametrize("name", ["number", "members", "store_port", "reason"])
def test_record_without_a_required_field_is_refused(name: str) -> None:
    """A GENERATION without a required field is not a record."""
    with pytest.raises(LogDamaged, match=f"log/7: not a record.*{name}"):
        Record.from_bytes(without(GENERATION, name), key="log/7")


@pytest.mark.parametrize("kind", list(CauseKind))
def test_every_cause_has_a_text(kind: CauseKind) -> None:
    """Every kind of cause has a text that names the node."""
    assert "node-7" in str(Cause(kind, "node-7", "some detail"))
