"""Rows, variables, annotations and links: what makes a dashboard of panels.

Panels of a row flow from left to right; their widths fill the 24 columns of the grid.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from dashboards.panels import DOCS, SOURCE, Panel, expanded

TITLES: Final = {
    "elastic-pt-run": "Run",
    "elastic-pt-faults": "Faults and recovery",
    "elastic-pt-checkpoints": "Checkpoints and storage",
    "elastic-pt-performance": "Performance",
    "elastic-pt-fleet": "Fleet",
}
"""UIDs, which never change, because links and bookmarks have them."""


@dataclass(frozen=True)
class Row:
    """A question and the panels that answer it."""

    title: str
    panels: Sequence[Panel]
    collapsed: bool = False


@dataclass(frozen=True)
class Board:
    """One dashboard."""

    uid: str
    description: str
    rows: Sequence[Row]
    all_runs: bool = False

    @property
    def file_name(self) -> str:
        """The file of its JSON."""
        return self.uid.removeprefix("elastic-pt-") + ".json"


Annotation = tuple[str, str, str, str, str]
ANNOTATIONS: Final[Sequence[Annotation]] = (
    (
        "Members changed as planned",
        "blue",
        'sum by (run, cause) (increase(@changes_total{cause=~"joined|left|barred"}[$__rate_interval])) > 0',
        "{{cause}}",
        "A node joined, left in good order, or was kept out.",
    ),
    (
        "Fault",
        "red",
        'sum by (run, cause) (increase(@changes_total{cause!~"joined|left|barred"}[$__rate_interval])) > 0',
        "{{cause}}",
        "A node was lost, or its workers failed; or no node was left.",
    ),
    (
        "Quarantine",
        "orange",
        "sum by (run, what) (increase(@quarantines_total[$__rate_interval])) > 0",
        "quarantine of a {{what}}",
        "It is not used any more.",
    ),
    (
        "Generation",
        "light-blue",
        "max by (run) (changes(@generation[$__rate_interval])) > 0",
        "new generation",
        "The members are others than before, or start again.",
    ),
)


def as_json(board: Board) -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    builder = (
        dashboard.Dashboard(f"elastic_pt: {TITLES[board.uid]}")
        .uid(board.uid)
        .description(board.description)
        .tags(["elastic_pt"])
        .time("now-6h", "now")
        .refresh("10s")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .editable()
        .links(_links(board))
    )
    for variable in _variables(board):
        builder = builder.with_variable(variable)
    for name, color, expression, *_ in ANNOTATIONS:
        annotation = dashboard.AnnotationQuery().name(name).datasource(SOURCE).icon_color(color)
        enabled = name != "Generation"
        builder = builder.annotation(annotation.enable(enabled).expr(expanded(expression)))
    for row in board.rows:
        builder = _with_row(builder, row)
    found: dict[str, Any] = json.loads(JSONEncoder(sort_keys=True).encode(builder.build()))
    for variable in found["templating"]["list"]:
        # The SDK writes the fields of an interval to every variable; Grafana's schema does not have them.
        for name in ("auto", "auto_count", "auto_min"):
            variable.pop(name, None)
    # The SDK lacks these fields of an annotation by Prometheus.
    for written, (*_, title, text) in zip(found["annotations"]["list"], ANNOTATIONS, strict=True):
        written |= {"titleFormat": title, "textFormat": text, "step": "15s"}
    for number, panel in enumerate(_all_panels(found["panels"]), start=1):
        panel["id"] = number
    return found


def as_text(board: Board) -> str:
    """The bytes of the committed file."""
    return json.dumps(as_json(board), indent=1, sort_keys=True) + "\n"


def _all_panels(panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for panel in panels for each in (panel, *panel.get("panels", []))]


def _with_row(builder: dashboard.Dashboard, row: Row) -> dashboard.Dashboard:
    header = dashboard.Row(row.title)
    if row.collapsed:
        for panel in row.panels:
            header = header.with_panel(panel)
        return builder.with_row(header)
    builder = builder.with_row(header)
    for panel in row.panels:
        builder = builder.with_panel(panel)
    return builder


def _links(board: Board) -> list[Builder[models.DashboardLink]]:
    others: list[Builder[models.DashboardLink]] = [
        dashboard.DashboardLink(title)
        .type(models.DashboardLinkType.LINK)
        .url(f"/d/{uid}")
        .include_vars(True)
        .keep_time(True)
        for uid, title in TITLES.items()
        if uid != board.uid
    ]
    pages: list[Builder[models.DashboardLink]] = [
        dashboard.DashboardLink(title)
        .type(models.DashboardLinkType.LINK)
        .icon("doc")
        .url(f"{DOCS}/{page}")
        .target_blank(True)
        for title, page in (("Runbooks", "runbooks/README.md"), ("Metrics", "metrics.md"))
    ]
    return others + pages


def _variables(board: Board) -> Sequence[Any]:
    everything = models.VariableOption(text="All", value="$__all", selected=True)
    run = (
        dashboard.QueryVariable("run")
        .label("Run")
        .datasource(SOURCE)
        .query({"query": "label_values(elastic_pt_run_info, run)", "refId": "run"})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
    )
    if board.all_runs:
        run = run.include_all(True).current(everything)
    node = (
        dashboard.QueryVariable("node")
        .label("Node")
        .datasource(SOURCE)
        .query({"query": 'label_values(elastic_pt_run_info{run=~"$run"}, node)', "refId": "node"})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything)
    )
    source = dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    pages = (
        dashboard.TextBoxVariable("docs")
        .label("Address of docs/")
        .description(
            "Where the links to runbooks lead, for instance https://git.example.com/elastic-pt/docs."
        )
        .default_value("/docs")
        .current(models.VariableOption(text="/docs", value="/docs", selected=True))
    )
    return (source, run, node, pages)
