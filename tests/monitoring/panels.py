"""The dashboards' queries as Grafana would send them: the variables of a dashboard filled in.

queries(dashboard)                              [PanelQuery(panel, row, expression, legend, …)]
filled(expression, run, range_s=60.0, step_s=1.0)     what goes to Prometheus
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

DASHBOARDS: Final = Path(__file__).parents[2] / "dashboards"
SCRAPES_PER_RATE: Final = 4
"""Grafana's `$__rate_interval` is at least four scrapes."""


@dataclass(frozen=True)
class PanelQuery:
    """One query of a panel."""

    dashboard: str
    row: str
    panel: str
    expression: str
    legend: str


def dashboards() -> list[dict[str, Any]]:
    """The committed files."""
    return [json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))]


def queries(dashboard: dict[str, Any]) -> Iterator[PanelQuery]:
    """Every query of every panel, those of collapsed rows too."""
    row = ""
    for each in dashboard["panels"]:
        if each["type"] == "row":
            row = each["title"]
        for panel in each.get("panels") or ([] if each["type"] == "row" else [each]):
            for target in panel["targets"]:
                yield PanelQuery(
                    dashboard["uid"],
                    row,
                    panel["title"],
                    target["expr"],
                    target["legendFormat"],
                )


def filled(
    expression: str, run: str, *, range_s: float, step_s: float, scrape_s: float, node: str = ".*"
) -> str:
    """The expression for one run, a visible range and a distance of the points."""
    variables = {
        "__rate_interval": f"{round(1000 * max(step_s + scrape_s, SCRAPES_PER_RATE * scrape_s))}ms",
        "__interval": f"{round(1000 * step_s)}ms",
        "__range": f"{round(1000 * range_s)}ms",
        # A regular expression within a string: Grafana escapes both.
        "run": re.escape(run).replace("\\", "\\\\"),
        "node": node,
    }
    return re.sub(r"\$(\w+)", lambda found: variables[found[1]], expression)
