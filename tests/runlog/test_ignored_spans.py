"""Spans that a run leaves out: recorded once, from the earliest step of a generation that leaves them out."""

import dataclasses
import json

import pytest

from elastic_pt.errors import LogDamaged
from elastic_pt.runlog.ignored import (
    SPANS_MAX,
    DamagedSpan,
    IgnoredSpan,
    ignored_next,
    still_damaged,
)
from elastic_pt.runlog.records import ORIGIN, Kind, Record
from tests.membership.world import generation


def span(start: int, end: int, source: str = "web") -> DamagedSpan:
    """Damaged tokens of one file."""
    return DamagedSpan(source, (start, end), "shards/web/train-00000.bin")


def test_new_span_counts_from_the_first_step_of_its_generation() -> None:
    """Steps count from 1: after a resume from step 7, the first one without the span is step 8."""
    first = ignored_next((), [span(64, 128), span(0, 64), span(64, 128)], 7)
    assert first == (IgnoredSpan(span(0, 64), 8), IgnoredSpan(span(64, 128), 8))
    second = ignored_next(first, [span(0, 64, "books"), span(64, 128)], 20)
    assert second == (IgnoredSpan(span(0, 64, "books"), 21), *first)
    assert ignored_next(second, [], 30) == second


def test_resume_from_an_earlier_step_moves_the_first_step_back() -> None:
    """Steps that are done again leave the span out too; a later resume does not move the first step on."""
    ignored = (IgnoredSpan(span(0, 64), 8), IgnoredSpan(span(64, 128), 21))
    assert [each.first_step for each in ignored_next(ignored, [], 12)] == [8, 13]
    assert [each.first_step for each in ignored_next(ignored, [], 0)] == [1, 1]


def test_span_that_is_left_out_already_cannot_be_damaged_again() -> None:
    """A worker that reads tokens which it must leave out is broken: this counts as a failure, and does not repeat forever."""
    ignored = (IgnoredSpan(span(0, 128), 8),)
    assert still_damaged(ignored, [span(64, 128)]) == ()
    assert still_damaged(ignored, [span(64, 192)]) == (span(64, 192),)
    assert still_damaged(ignored, [span(64, 128, "books")]) == (span(64, 128, "books"),)


def test_too_many_spans_are_not_left_out() -> None:
    """A run whose data is damaged in very many places fails instead."""
    ignored = tuple(IgnoredSpan(span(64 * n, 64 * n + 64), 1) for n in range(SPANS_MAX - 1))
    more = [span(64 * n, 64 * n + 64) for n in (SPANS_MAX, SPANS_MAX + 1)]
    assert still_damaged(ignored, more[:1]) == (more[0],)
    assert still_damaged(ignored, more) == ()
    assert len(ignored_next(ignored, more[:1], 5)) == SPANS_MAX


def test_only_a_generation_that_leaves_tokens_out_has_the_newest_schema() -> None:
    """An earlier version would train on the tokens, so it must refuse the log. It reads all other logs."""
    plain = generation("a")
    body = dataclasses.replace(plain, ignored=(IgnoredSpan(span(0, 64), 8),))
    records = [
        Record(0, 1, "a", "n", "2026-01-01T00:00:00+00:00", ORIGIN, {Kind.GENERATION: 0}, each)
        for each in (plain, body)
    ]
    assert [json.loads(each.to_bytes())["schema"] for each in records] == [1, 3]
    for each in records:
        assert Record.from_bytes(each.to_bytes(), key="log/0").body == each.body
    newer = records[1].to_bytes().replace(b'"schema": 3', b'"schema": 4')
    with pytest.raises(LogDamaged, match="schema 4; expected 1, 2 or 3"):
        Record.from_bytes(newer, key="log/0")
