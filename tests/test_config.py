"""Every key of `[elastic]` reaches what it is about, under its own name and in its own unit."""

import dataclasses

import pytest

from elastic_pt.agent.agent import budgets_of, limits_of
from elastic_pt.config import Config, parse_config
from elastic_pt.membership.budgets import Budgets
from elastic_pt.membership.status import Limits


def config(*overrides: str) -> Config:
    """The smallest configuration, with overrides."""
    text = '[run]\nurl = "run"\n[data]\nurl = "data"\n'
    return parse_config(text, source="test", overrides=overrides)


CASES = [
    ("nodes_min", 3, "nodes_min"),
    ("nodes_max", 9, "nodes_max"),
    ("heartbeat_timeout_s", 1.25, "heartbeat_timeout_s"),
    ("heartbeat_interval_s", 0.125, "heartbeat_interval_s"),
    ("join_window_s", 0.75, "join_window_s"),
    ("takeover_s", 7.5, "takeover_s"),
    ("flaps_max", 5, "flaps_max"),
    ("flap_window_s", 77.0, "flap_window_s"),
    ("quarantine_s", 11.0, "bar_s"),
    ("same_failures_max", 4, "same_failures_max"),
    ("failures_max", 6, "failures_max"),
]
"""Each key, another value than its default, and the field that it sets."""


@pytest.mark.parametrize(("key", "value", "field"), CASES)
def test_a_key_changes_its_own_bound_and_no_other(key: str, value: float, field: str) -> None:
    """One key, one field: what the operator sets is what membership and history work with."""
    before = [limits_of(config()), budgets_of(config())]
    changed = config(f"elastic.{key}={value}")
    after = [limits_of(changed), budgets_of(changed)]
    differing = {
        name: new
        for old_part, new_part in zip(before, after, strict=True)
        for (name, old), new in zip(
            dataclasses.asdict(old_part).items(), dataclasses.asdict(new_part).values(), strict=True
        )
        if old != new
    }
    assert differing == {field: value}


def test_slots_are_those_of_a_step() -> None:
    """V follows from the batch: no world has more workers than a step has micro-batches."""
    found = limits_of(config("train.global_batch=12", "train.micro_batch=3"))
    assert found.slots == 4


def test_all_bounds_can_be_set() -> None:
    """No bound of membership or history is out of the operator's reach."""
    fields = {each.name for part in (Limits, Budgets) for each in dataclasses.fields(part)}
    assert {field for _, _, field in CASES} | {"slots"} == fields
