"""Scenario files: what is wrong in one is told in one line that names the field and the value."""

from pathlib import Path

import pytest

from elastic_pt.chaos.scenario import load, read_scenario
from elastic_pt.errors import ConfigError

GOOD = """
hypothesis = "It goes on."
[[faults]]
kind = "kill_node"
at = { step = 20 }
"""

MISTAKES = {
    "nodes = 0": ("nodes = 0", "greater than or equal to 1"),
    "node = 3": ("node = 3", "Extra inputs"),
    'store = "tape"': ("store = 'tape'", "'bucket' or 'directory'"),
    "longest_s = -1": ("longest_s = -1", "greater than 0"),
    'rows = ["X1"]': ("rows.1 = 'X1'", "pattern"),
    "faults = 3": ("faults = 3", "tuple"),
    "nodes = ": ("Invalid value",),
    "expect = { lost = 1 }": ("expect.lost = 1", "Extra inputs"),
    'config.run = { url = "s3://mine/run" }': ("config.run.url = 's3://mine/run'", "expected none"),
    'config.data = { url = "s3://mine/data" }': ("config.data.url", "expected none"),
    "config.train = { steps = 5 }": ("config.train.steps = 5", "own key steps"),
    "steps = 8": ("step = 20", "expected less than steps = 8"),
}
FAULTS = {
    'kind = "kill_node"\nnode = "node-3"\nat = { seconds = 1 }': ("faults.1", "'node-3'", "node-2"),
    'kind = "kill_nodes"\nat = { step = 1 }': ("faults.1", "'kill_nodes'", "expected one of"),
    'kind = "kill_node"\nat = { step = 1 }\nfor_s = 3': ("faults.1", "for_s", "no duration"),
    'kind = "agent_stops"\nat = { step = 1 }': ("faults.1", "for_s", "expected a duration"),
    'kind = "kill_node"\nat = { phase = "backward" }': ("faults.1.at.phase = 'backward'",),
    'kind = "kill_node"\nat = { step = 1, seconds = 2 }': ("faults.1.at", "expected either"),
    'kind = "kill_node"\nat = {}': ("faults.1.at", "expected a step, a phase or seconds"),
    'kind = "kill_node"\nat = { step = 1 }\nnode = "node-x"': ("faults.1.node", "'node-x'"),
    'kind = "notice"\nat = { step = 1 }\nlead_s = -2': ("faults.1", "lead_s = -2", "from 0 on"),
    'kind = "notice"\nat = { step = 1 }\nled_s = 2': ("faults.1", "led_s", "lead_s"),
    'kind = "kill_node"\nat = { step = 1, after = 1 }': ("faults.1", "after = 1", "earlier"),
    'kind = "worker_raises"\nat = { seconds = 3 }': ("faults.1", "expected a step or a phase"),
}


def refused(text: str) -> str:
    """The one line with which a text is refused."""
    with pytest.raises(ConfigError) as caught:
        read_scenario(text, "mine.toml", "mine")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("mine.toml: ")
    return message


@pytest.mark.parametrize("line", MISTAKES)
def test_a_wrong_field_is_named_with_its_value(line: str) -> None:
    """A user finds the place at once."""
    message = refused(
        f"{line}\n{GOOD}" if not line.startswith("faults") else f'hypothesis="x"\n{line}'
    )
    assert all(part in message for part in MISTAKES[line]), message


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_fault_is_named_with_its_number(fault: str) -> None:
    """Faults are counted from 1."""
    message = refused(f'hypothesis = "x"\n[[faults]]\n{fault}\n')
    assert all(part in message for part in FAULTS[fault]), message


def test_a_name_that_is_no_scenario_is_answered_with_those_that_are() -> None:
    """A typing error costs one look."""
    with pytest.raises(
        ConfigError, match=r"scenario 'killed-lader': expected .* such as killed-leader"
    ):
        load("killed-lader")
    with pytest.raises(ConfigError, match=r"nothing.toml: No such file"):
        load("nothing.toml")


def test_a_file_that_is_no_text_is_answered_in_one_line(tmp_path: Path) -> None:
    """A wrong file is a mistake of the user, not a traceback."""
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="byte 0 is not UTF-8"):
        load(str(path))
