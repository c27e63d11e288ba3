"""Scenario files: what is wrong in one is told in one line that names the field and the value."""

import re
import textwrap
from pathlib import Path

import pytest

from elastic_pt.chaos.kinds import KINDS, RANGES
from elastic_pt.chaos.scenario import load, read_scenario
from elastic_pt.errors import ConfigError

GOOD = """
hypothesis = "It goes on."
[[faults]]
kind = "kill_node"
at = { step = 20 }
"""

MISTAKES = {
    "nodes = 0": "nodes = 0: expected greater than or equal to 1",
    "nodes = 1.5": "nodes = 1.5: expected a whole number",
    "node = 3": "node = 3: unknown key; expected nodes",
    "speed = 3": "speed = 3: unknown key; expected one of name, hypothesis, rows, quick, nodes",
    'store = "tape"': "store = 'tape': expected 'bucket' or 'directory'",
    "longest_s = -1": "longest_s = -1: expected greater than 0",
    "longest_s = 4": "longest_s = 4: expected more than steps x step_s = 4.8",
    'rows = ["X1"]': "rows.1 = 'X1': expected rows of docs/faults.md that it checks, such as `F6`",
    'rows = "F1"': "rows = 'F1': expected a list",
    'quick = "maybe"': "quick = 'maybe': expected true or false",
    'name = "My run"': "name = 'My run': expected small letters, digits and hyphens",
    "nodes = ": "not valid TOML: Invalid value",
    "steps = 8": "faults.1.at.step = 20: expected less than steps = 8",
    "nodes = 5\nworkers_per_node = 2": "workers_per_node = 2: 5 nodes have 10 workers, expected at most 8",
    "expect = 3": "expect = 3: expected a table",
    "expect = { lost = 1 }": "expect.lost = 1: unknown key; expected one of outcome, reason",
    'expect = { outcome = "stop" }': "expect.outcome = 'stop': expected 'completes', 'stops' or",
    'expect.reason = "lost"': "expect.reason = 'lost': expected none, as outcome = 'completes'",
    "config = 3": "config = 3: expected a table",
    "config.elastic = { nodes_mni = 2 }": "config.elastic.nodes_mni = 2: unknown key; expected nodes_min",
    "config.elastc = { nodes_min = 2 }": "config.elastc = {'nodes_min': 2}: unknown key; expected elastic",
    "config.elastic = { nodes_min = 5 }": "config.elastic.nodes_min = 5: expected at most elastic.nodes_max",
    'config.train.learning_rate = "x"': "config.train.learning_rate = 'x': expected a number",
    'config.run = { url = "s3://mine/run" }': "config.run.url = 's3://mine/run': expected none",
    'config.data = { url = "s3://mine/data" }': "config.data.url = 's3://mine/data': expected none",
    "config.train = { steps = 5 }": "config.train.steps = 5: expected the scenario's own key steps",
    'config.telemetry.log_format = "text"': "config.telemetry.log_format = 'text': expected none",
}
"""Lines of a scenario, each with the beginning of what is said about it."""

FAULTS = {
    'node = "node-3"': "node = 'node-3': expected one up to node-2",
    'node = "node-x"': "node = 'node-x': expected one or a list of node-0, node-1",
    'node = ["leader", 3]': "node = ['leader', 3]: expected one or a list of node-0",
    "node = []": "node = []: expected one or a list of node-0",
    'kind = "kil_node"': "kind = 'kil_node': expected kill_node or kill_worker (docs/chaos.md has all)",
    'kind = "zzz"': "kind = 'zzz': expected a kind of faults (docs/chaos.md has all)",
    "for_s = 3": "for_s = 3: expected none, as kill_node does not last",
    'for_s = "x"': "for_s = 'x': expected a number",
    'kind = "agent_stops"': "for_s: missing; expected how many seconds agent_stops lasts",
    'at = { phase = "mirorr" }': "at.phase = 'mirorr': expected 'import', 'rendezvous'",
    "at = { stp = 1 }": "at.stp = 1: unknown key; expected step",
    "at = { step = 1, seconds = 2 }": "at.seconds = 2: expected none beside a step or a phase",
    "at = {}": "at.step: missing; expected a step, a phase or seconds",
    "at = 3": "at = 3: expected a table",
    "at = { step = 1, after = 1 }": "at.after = 1: expected none for the first fault",
    "at = { seconds = 130 }": "at: not before 130 s, expected less than longest_s = 120",
    'kind = "notice"\nlead_s = -2': "lead_s = -2: expected a number from 0 to 86400",
    'kind = "notice"\nled_s = 2': "led_s = 2: unknown key; expected lead_s",
    'kind = "join"\ncount = 1.5': "count = 1.5: expected a whole number from 1 to 16",
    'kind = "join"\ncount = 0': "count = 0: expected a whole number from 1 to 16",
    'kind = "throttled"\nfor_s = 2\nshare = 3': "share = 3: expected a number above 0, at most 1",
    'kind = "worker_raises"\nat = { seconds = 3 }': "at: after 3 s, expected a step or a phase",
}
"""What is written of a fault that is right else, each with the beginning of what is said about it."""

RULES = {
    ("nodes = 1", 'at = { phase = "mirror" }'): "at.phase = 'mirror': expected another one",
    ("nodes = 1", 'node = "follower"'): "node = 'follower': expected another one",
    (
        'store = "directory"',
        'kind = "denied"\nfor_s = 2',
    ): "kind = 'denied': expected store = 'bucket'",
}
"""A line of the scenario and one of its fault that do not fit together."""


def refused(text: str) -> str:
    """The one line with which a text is refused."""
    with pytest.raises(ConfigError) as caught:
        read_scenario(text, "mine.toml", "mine")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("mine.toml: ")
    assert "expected" in message
    return message.removeprefix("mine.toml: ")


def fault(written: str) -> str:
    """The table of a fault, right where nothing else is written."""
    keys = {line.split(" ")[0] for line in written.splitlines()}
    right = {"kind": 'kind = "kill_node"', "at": "at = { step = 1 }"}
    return "\n".join(["[[faults]]", written, *(right[key] for key in right.keys() - keys)])


@pytest.mark.parametrize("line", MISTAKES)
def test_a_wrong_field_is_told_with_its_value_and_what_is_expected(line: str) -> None:
    """A user finds the place at once, before anything starts."""
    assert refused(f"{line}\n{GOOD}").startswith(MISTAKES[line])


@pytest.mark.parametrize("written", FAULTS)
def test_a_wrong_fault_is_told_with_its_number(written: str) -> None:
    """Faults are counted from 1."""
    message = refused(f'hypothesis = "x"\n{fault(written)}')
    assert message.startswith(f"faults.1.{FAULTS[written]}")


@pytest.mark.parametrize("both", RULES)
def test_a_fault_must_fit_its_scenario(both: tuple[str, str]) -> None:
    """What could never strike is refused, instead of failing after a minute."""
    line, written = both
    assert refused(f'hypothesis = "x"\n{line}\n{fault(written)}').startswith(
        f"faults.1.{RULES[both]}"
    )


def test_a_spare_needs_no_slot() -> None:
    """It waits until a member is lost."""
    line = "nodes = 5\nworkers_per_node = 2"
    assert "10 workers" in refused(f"{line}\n{GOOD}")
    read_scenario(f"{line}\nconfig.elastic.nodes_max = 4\n{GOOD}", "mine.toml", "mine")


def test_all_mistakes_are_told_at_once() -> None:
    """Each time a file is corrected costs a look."""
    assert refused(f"nodes = 0\nsteps = 0\n{GOOD}").count("expected") == 2
    assert refused(f'steps = 3\nexpect.reason = "x"\n{GOOD}').count("expected") == 2


def test_a_time_after_another_fault_counts_from_that_one() -> None:
    """Both times together are longer than the run may take."""
    faults = [fault("at = { seconds = 70 }"), fault("at = { seconds = 70, after = 1 }")]
    told = refused("\n".join(['hypothesis = "x"', *faults]))
    assert told.startswith("faults.2.at: not before 140 s, expected less than longest_s = 120")


def test_each_parameter_of_a_kind_has_a_range_that_holds_its_default() -> None:
    """The table of docs/chaos.md shows it, and a file is checked against it."""
    for kind in KINDS.values():
        for name, default in kind.parameters.items():
            assert default in RANGES[name], f"{kind.name}.{name}"


def test_a_name_that_is_no_scenario_is_answered_with_those_that_are() -> None:
    """A typing error costs one look."""
    with pytest.raises(
        ConfigError, match=r"scenario 'killed-lader': expected .* such as killed-leader"
    ):
        load("killed-lader")
    with pytest.raises(ConfigError, match=r"nothing.toml: No such file"):
        load("nothing.toml")


def test_the_example_of_the_page_is_a_scenario() -> None:
    """A newcomer begins with it."""
    page = (Path(__file__).parents[2] / "docs" / "chaos.md").read_text()
    found = re.search(r"\n((?:    hypothesis = .*)(?:\n|    .*\n)+)", page)
    assert found is not None
    scenario = read_scenario(textwrap.dedent(found[1]), "page", "page")
    assert [each.kind for each in scenario.faults] == ["node_freezes", "kill_node"]


def test_a_file_of_a_windows_editor_is_read(tmp_path: Path) -> None:
    """It begins with a byte order mark."""
    path = tmp_path / "mine.toml"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert load(str(path)).name == "mine"


def test_a_file_that_is_no_text_is_answered_in_one_line(tmp_path: Path) -> None:
    """A wrong file is a mistake of the user, not a traceback."""
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="byte 0 is not UTF-8"):
        load(str(path))
