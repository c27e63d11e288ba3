"""docs/events.md lists the events of the code."""

import ast
from collections import defaultdict
from pathlib import Path

from elastic_pt.telemetry import shipping

ROOT = Path(__file__).parents[2]
LEVELS = {"exception": "error"} | {each: each for each in ("debug", "info", "warning", "error")}


def events_of_the_code() -> dict[str, set[str]]:
    """The levels of each event, by its name: the calls `log.<level>(NAME, ...)` of the package."""
    found = defaultdict[str, set[str]](set)
    for path in (ROOT / "elastic_pt").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            match call:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name("log"), attr=method), args=[name, *_]
                ) if method in LEVELS:
                    names = [
                        each.value for each in ast.walk(name) if isinstance(each, ast.Constant)
                    ]
                    assert names, f"{path.name}:{call.lineno}: the name is no constant"
                    for each in names:
                        found[str(each)].add(LEVELS[method])
    # Made by the buffer itself: it must not wait behind the events that it is about.
    assert '"events_dropped"' in Path(shipping.__file__).read_text()
    return found | {"events_dropped": {"warning"}}


def test_the_table_of_events_is_complete() -> None:
    """Whoever adds, renames or removes an event changes the page that operators search."""
    text = (ROOT / "docs" / "events.md").read_text()
    table = text.partition("<!-- events: begin -->")[2].partition("<!-- events: end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    listed = {name.strip("`"): set(levels.split(", ")) for name, levels, _ in rows}
    assert list(listed) == sorted(listed)
    assert listed == events_of_the_code()
