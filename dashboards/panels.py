"""Panels of the dashboards. A panel is a builder of grafana-foundation-sdk, filled with the defaults of this project.

In a query, `@step` is short for `elastic_pt_step{run=~"$run",node=~"$node"}`, and `@nodes{state="active"}` for the same with that
matcher added. `@process_…` has no prefix.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import heatmap as heatmaps
from grafana_foundation_sdk.builders import stat as stats
from grafana_foundation_sdk.models import common as shown
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DOCS: Final = "${docs}"
"""Where the pages of docs/ can be read: a variable of the dashboards, because each company has its own copy."""
SOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
SELECTOR: Final = 'run=~"$run",node=~"$node"'
_EVENTS_INTERVAL: Final = "1m"
_GREEN: Final = models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "green"})
_METRIC: Final = re.compile(r"@(\w+)(\{)?")

Panel = Any
"""A builder of grafana-foundation-sdk: its panels have no common type with all the methods that are used here."""


@dataclass(frozen=True)
class Query:
    """PromQL in the short form, and the legend of its series."""

    expression: str
    legend: str = "{{run}}"


@dataclass(frozen=True)
class Limits:
    """Colors by value: green until the first of `steps`, or red if `low_is_bad`."""

    warn: float
    bad: float

    def builder(self) -> dashboard.ThresholdsConfig:
        """The thresholds as Grafana has them; a value is bad above `bad`, or below it where `bad` is the smaller one."""
        if self.bad < self.warn:
            steps = [(None, "red"), (self.bad, "yellow"), (self.warn, "green")]
        else:
            steps = [(None, "green"), (self.warn, "yellow"), (self.bad, "red")]
        return _thresholds(steps)


ANY: Final = Limits(1, 1)
"""Each one is bad."""


def expanded(expression: str) -> str:
    """The PromQL of the short form."""

    def selector(found: re.Match[str]) -> str:
        name = found[1] if found[1].startswith("process_") else f"elastic_pt_{found[1]}"
        return f"{name}{{{SELECTOR}" + ("," if found[2] else "}")

    return _METRIC.sub(selector, " ".join(expression.split()))


def stat(
    title: str,
    text: str,
    unit: str,
    expression: str,
    *,
    limits: Limits | None = None,
    none: str = "no data yet",
    width: int = 4,
    decimals: int | None = None,
) -> Panel:
    """One number for each run. `none` is what it says without data."""
    panel = (
        stats.Panel()
        .graph_mode(shown.BigValueGraphMode.NONE)
        .color_mode(
            shown.BigValueColorMode.NONE if limits is None else shown.BigValueColorMode.VALUE
        )
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_target("A", Query(expression), instant=True))
        .no_value(none)
    )
    return _described(panel, title, text, unit, limits, width, 4, decimals)


def lines(
    title: str,
    text: str,
    unit: str,
    *queries: Query,
    limits: Limits | None = None,
    stacked: bool = False,
    bars: bool = False,
    logarithmic: bool = False,
    none: str = "no data in this time range",
    width: int = 8,
    low: float | None = None,
    high: float | None = None,
    decimals: int | None = None,
) -> Panel:
    """Values over time."""
    style = shown.GraphDrawStyle.BARS if bars else shown.GraphDrawStyle.LINE
    stacking = shown.StackingMode.NORMAL if stacked or bars else shown.StackingMode.NONE
    panel = (
        timeseries.Panel()
        .draw_style(style)
        .line_width(1)
        .fill_opacity(70 if stacked or bars else 5)
        .show_points(shown.VisibilityMode.AUTO)
        .span_nulls(False)
        .stacking(common.StackingConfig().mode(stacking).group("A"))
        .scale_distribution(_scale(logarithmic))
        .thresholds_style(
            common.GraphThresholdsStyleConfig().mode(
                shown.GraphThresholdsStyleMode.OFF
                if limits is None
                else shown.GraphThresholdsStyleMode.DASHED
            )
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(shown.TooltipDisplayMode.MULTI)
            .sort(shown.SortOrder.DESCENDING)
        )
        .legend(
            common.VizLegendOptions()
            .display_mode(shown.LegendDisplayMode.LIST)
            .placement(shown.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .no_value(none)
    )
    if bars:
        # Events: windows of a minute hardly overlap, so that each shows once, and as a whole number.
        panel = panel.interval(_EVENTS_INTERVAL)
        queries = tuple(Query(f"round({each.expression})", each.legend) for each in queries)
    if "productive" in [each.legend for each in queries]:
        panel = panel.override_by_name("productive", [_GREEN])
    for number, query in enumerate(queries):
        panel = panel.with_target(_target(chr(ord("A") + number), query))
    if low is not None:
        panel = panel.min(low)
    if high is not None:
        panel = panel.max(high)
    return _described(panel, title, text, unit, limits, width, 8, decimals)


def ranking(
    title: str,
    text: str,
    unit: str,
    query: Query,
    *,
    limits: Limits | None = None,
    none: str = "none",
    width: int = 8,
    decimals: int | None = None,
) -> Panel:
    """A bar for each value of a label, the largest first."""
    panel = (
        bargauge.Panel()
        .orientation(shown.VizOrientation.HORIZONTAL)
        .display_mode(shown.BarGaugeDisplayMode.BASIC)
        .show_unfilled(False)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(
            _target("A", Query(f"sort_desc({query.expression})", query.legend), instant=True)
        )
        .min(0)
        .no_value(none)
    )
    return _described(panel, title, text, unit, limits, width, 8, decimals)


def heatmap(title: str, text: str, unit: str, expression: str, *, width: int = 8) -> Panel:
    """How often each bucket of a histogram was hit over time."""
    target = _target("A", Query(expression, "{{le}}")).format(PromQueryFormat.HEATMAP)
    panel = (
        heatmaps.Panel()
        .calculate(False)
        .color(
            heatmaps.HeatmapColorOptions()
            .mode(heat.HeatmapColorMode.SCHEME)
            .scheme("Blues")
            .scale(heat.HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(32)
        )
        .y_axis(heatmaps.YAxisConfig().axis_placement(shown.AxisPlacement.LEFT))
        .cell_gap(1)
        .filter_values(heatmaps.FilterValueRange().le(1e-9))
        .with_target(target)
    )
    return _described(panel, title, text, unit, None, width, 8, None)


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    expression: str
    unit: str = "none"
    limits: Limits | None = None
    decimals: int | None = None


def node_table(title: str, text: str, columns: Sequence[Column], *, width: int = 24) -> Panel:
    """A line for each node; each column is a query by (node)."""
    panel = table.Panel().cell_height(shown.TableCellHeight.SM)
    names = ["node"]
    for number, column in enumerate(columns):
        letter = chr(ord("A") + number)
        query = Query(column.expression, "{{node}}")
        target = _target(letter, query, instant=True).format(PromQueryFormat.TABLE)
        panel = panel.with_target(target)
        names.append(f"Value #{letter}")
        properties = [models.DynamicConfigValue("unit", column.unit)]
        if column.decimals is not None:
            properties.append(models.DynamicConfigValue("decimals", column.decimals))
        if column.limits is not None:
            properties += [
                models.DynamicConfigValue("thresholds", column.limits.builder().build()),
                models.DynamicConfigValue("custom.cellOptions", {"type": "color-text"}),
            ]
        panel = panel.override_by_name(column.title, properties)
    renamed = {name: each.title for name, each in zip(names[1:], columns, strict=True)}
    for transformation, options in (
        ("joinByField", {"byField": "node", "mode": "outer"}),
        ("filterFieldsByName", {"include": {"names": names}}),
        ("organize", {"renameByName": renamed, "indexByName": {}, "excludeByName": {}}),
    ):
        panel = panel.with_transformation(
            models.DataTransformerConfig(id_val=transformation, options=options)
        )
    return _described(panel, title, text, "none", None, width, 8, None)


def label_table(
    title: str, text: str, expression: str, labels: Sequence[str], *, width: int = 12
) -> Panel:
    """A line for each series of an info metric, with its labels."""
    target = _target("A", Query(expression, ""), instant=True).format(PromQueryFormat.TABLE)
    panel = (
        table.Panel()
        .cell_height(shown.TableCellHeight.SM)
        .with_target(target)
        .with_transformation(
            models.DataTransformerConfig(
                id_val="filterFieldsByName", options={"include": {"names": list(labels)}}
            )
        )
    )
    return _described(panel, title, text, "none", None, width, 8, None)


def with_runbooks(panel: Panel, *alerts: str) -> Panel:
    """Links from a panel to the pages of the alerts that watch the same thing."""
    return panel.links(
        [
            dashboard.DashboardLink(f"Runbook: {alert}")
            .type(models.DashboardLinkType.LINK)
            .url(f"{DOCS}/runbooks/{alert}.md")
            .target_blank(True)
            for alert in alerts
        ]
    )


def _described(
    panel: Panel,
    title: str,
    text: str,
    unit: str,
    limits: Limits | None,
    width: int,
    height: int,
    decimals: int | None,
) -> Panel:
    panel = panel.title(title).description(text).unit(unit).datasource(SOURCE)
    panel = panel.span(width).height(height)
    panel = panel.thresholds(_thresholds([(None, "green")]) if limits is None else limits.builder())
    return panel if decimals is None else panel.decimals(decimals)


def _target(reference: str, query: Query, *, instant: bool = False) -> prometheus.Dataquery:
    target = (
        prometheus.Dataquery()
        .ref_id(reference)
        .expr(expanded(query.expression))
        .legend_format(query.legend)
    )
    return target.instant() if instant else target.range()


def _thresholds(steps: Sequence[tuple[float | None, str]]) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value=value, color=color) for value, color in steps])
    )


def _scale(logarithmic: bool) -> common.ScaleDistributionConfig:
    scale = common.ScaleDistributionConfig()
    if not logarithmic:
        return scale.type(shown.ScaleDistribution.LINEAR)
    return scale.type(shown.ScaleDistribution.LOG).log(10)
