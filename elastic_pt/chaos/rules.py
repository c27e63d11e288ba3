"""What in a scenario cannot be as it is written, though each key alone could: found before anything starts. Pure.

Scenario ─► one line for each rule that it breaks: key, value, what is expected
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from elastic_pt.chaos.kinds import Need
from elastic_pt.failpoints import Failpoint

if TYPE_CHECKING:
    from elastic_pt.chaos.scenario import FaultSpec, Scenario

_NOT_IN_CONFIG: Final = {
    "run.url": "none: each run has a place of its own",
    "data.url": "none: each run has its own copy of the data",
    "train.steps": "the scenario's own key steps",
    "train.numerics": "none: only exact weights can be judged",
    "elastic.workers_per_node": "the scenario's own key workers_per_node",
    "elastic.notices": "none: the fault notice is the source",
    "elastic.port": "none: several nodes are on this machine",
    "telemetry.metrics_port": "none: several nodes are on this machine",
    "telemetry.log_format": "none: the oracles read the events",
    "telemetry.log_level": "none: the oracles read the events",
}
"""Keys of the run that a scenario may not set in `config`, and what is expected instead."""

_OF_TWO: Final = ("follower", "mirror-of-leader")
"""Whom there is only beside a leader."""


def broken_rules(scenario: "Scenario") -> Iterator[str]:
    """All rules that a scenario breaks."""
    yield from _keys_of_its_own(scenario)
    expect = scenario.expect
    if expect.reason and expect.outcome == "completes":
        yield f"expect.reason = {expect.reason!r}: expected none, as outcome = 'completes'"
    least_s = scenario.steps * scenario.step_s
    if least_s >= scenario.longest_s:
        yield (
            f"longest_s = {scenario.longest_s:g}: expected more than steps x step_s = {least_s:g}"
        )
    for number, fault in enumerate(scenario.faults, start=1):
        for each in _of_fault(scenario, number, fault):
            yield f"faults.{number}.{each}"


def _keys_of_its_own(scenario: "Scenario") -> Iterator[str]:
    """Faults delete and damage what is stored at the URLs: it must be the run's own copy."""
    for name, expected in _NOT_IN_CONFIG.items():
        section, key = name.split(".")
        if key in scenario.config.get(section, {}):
            yield f"config.{name} = {scenario.config[section][key]!r}: expected {expected}"


def _of_fault(scenario: "Scenario", number: int, fault: "FaultSpec") -> Iterator[str]:
    at = fault.at
    if at.step is not None and at.step >= scenario.steps:
        yield f"at.step = {at.step}: expected less than steps = {scenario.steps}"
    if at.after is not None and at.after >= number:
        earlier = (
            f"an earlier fault, up to {number - 1}" if number > 1 else "none for the first fault"
        )
        yield f"at.after = {at.after}: expected {earlier}"
    elif (least_s := _least_s(scenario, fault)) >= scenario.longest_s:
        yield f"at: not before {least_s:g} s, expected less than longest_s = {scenario.longest_s:g}"
    total = scenario.nodes + scenario.newcomers
    last = total - 1
    for node in fault.nodes:
        if node.startswith("node-") and int(node.removeprefix("node-")) > last:
            yield f"node = {node!r}: expected one up to node-{last}"
        if node in _OF_TWO and total == 1:
            yield f"node = {node!r}: expected another one, as nodes = 1"
    if at.point is Failpoint.MIRROR_COPIED and total == 1:
        yield f"at.phase = '{at.phase}': expected another one, as nodes = 1 has no mirror"
    if Need.BUCKET in fault.of.needs and scenario.store == "directory":
        yield f"kind = {fault.kind!r}: expected store = 'bucket', not 'directory'"


def _least_s(scenario: "Scenario", fault: "FaultSpec") -> float:
    """Seconds after the start of the nodes before which a fault cannot strike."""
    at = fault.at
    before_s = 0.0 if at.after is None else _least_s(scenario, scenario.faults[at.after - 1])
    if at.seconds is not None:
        return before_s + at.seconds
    return max(before_s, (at.step or 0) * scenario.step_s)
