"""Pictures of the dashboards without Grafana: the answers of a real Prometheus, drawn where Grafana puts the panels.

python -m dashboards.pictures PROMETHEUS_URL RUN DIRECTORY [START END]     a PNG for each dashboard; Unix times
"""

import json
import math
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from dashboards.boards import boards
from dashboards.layout import as_json
from tests.monitoring.panels import filled

SCRAPE_S: Final = 0.5
_POINTS: Final = 160
_COLUMN_INCHES: Final = 0.85
_LINE_INCHES: Final = 0.36
_PALETTE: Final = (
    *("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#705da0"),
    *("#37872d", "#fade2a", "#447ebc", "#c15c17", "#890f02", "#0a437c"),
)
"""Grafana's own first colors."""
_SCALES: Final[dict[str, list[tuple[float, str, float]]]] = {
    "s": [
        (1e-3, "ms", 1e3),
        (1, "s", 1),
        (120, "min", 1 / 60),
        (7200, "h", 1 / 3600),
        (172800, "d", 1 / 86400),
    ],
    "bytes": [
        (1, "B", 1),
        (1024, "KiB", 1 / 1024),
        (2**20, "MiB", 2.0**-20),
        (2**30, "GiB", 2.0**-30),
    ],
    "Bps": [(1, "B/s", 1), (1e3, "kB/s", 1e-3), (1e6, "MB/s", 1e-6)],
}


class Pictures:
    """Draws dashboards from one Prometheus, for one run and time range."""

    def __init__(self, url: str, run: str, start_s: float, end_s: float) -> None:
        self._url, self._run, self._start_s, self._end_s = url, run, start_s, end_s
        self._step_s = max(SCRAPE_S, (end_s - start_s) / _POINTS)

    def draw(self, dashboard: dict[str, Any], path: Path) -> None:
        """One PNG; collapsed rows are left out."""
        panels = dashboard["panels"]
        height = max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in panels)
        size = (24 * _COLUMN_INCHES, height * _LINE_INCHES)
        figure = plt.figure(figsize=size, dpi=70, facecolor="white")
        for panel in panels:
            place = panel["gridPos"]
            top = 1 - place["y"] / height
            if panel["type"] == "row":
                figure.text(
                    place["x"] / 24 + 0.005, top - 0.7 / height, panel["title"], weight="bold"
                )
                continue
            x, w, h = place["x"] / 24, place["w"] / 24, place["h"] / height
            axes = figure.add_axes((x + 0.035, top - h + 1.6 / height, w - 0.045, h - 2.9 / height))
            axes.set_title(panel["title"], fontsize=9, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            self._panel(axes, panel)
        figure.savefig(path)
        plt.close(figure)

    def _panel(self, axes: Axes, panel: dict[str, Any]) -> None:
        kind, unit = panel["type"], panel["fieldConfig"]["defaults"]["unit"]
        instant = kind in ("stat", "bargauge", "table")
        answers = [
            (each["legendFormat"], self._ask(each["expr"], instant)) for each in panel["targets"]
        ]
        found = [
            (_legend(text, series["metric"]), series)
            for text, answer in answers
            for series in answer
        ]
        if not found:
            axes.text(
                0.5,
                0.5,
                panel["fieldConfig"]["defaults"].get("noValue", "No data"),
                ha="center",
                color="red",
            )
        elif kind == "stat":
            text = "\n".join(_shown(float(series["value"][1]), unit) for _, series in found)
            axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=20)
        elif kind == "bargauge":
            values = [float(series["value"][1]) for _, series in found]
            axes.barh(range(len(values)), values, color="#b6d7a8")
            axes.set_yticks([])
            for number, (value, (name, _)) in enumerate(zip(values, found, strict=True)):
                text = f" {name}: {_shown(value, unit)}"
                axes.text(0, number, text, va="center", fontsize=8)
            axes.invert_yaxis()
        elif kind == "table":
            self._table(axes, panel)
        elif kind == "heatmap":
            self._heatmap(axes, found)
        else:
            self._lines(axes, panel, found)
        if instant or not found:
            axes.set_xticks([])
            if kind != "bargauge":
                axes.set_yticks([])

    def _table(self, axes: Axes, panel: dict[str, Any]) -> None:
        """Columns are the queries, or the labels of the only one."""
        by_name = {
            each["matcher"]["options"]: each for each in panel["fieldConfig"].get("overrides", [])
        }
        targets = panel["targets"]
        answers = [self._ask(each["expr"], True) for each in targets]
        if len(targets) == 1:
            wanted = panel["transformations"][0]["options"]["include"]["names"]
            rows = [[each["metric"].get(name, "")[-40:] for name in wanted] for each in answers[0]]
            axes.table(rows, colLabels=wanted, loc="upper center", cellLoc="left")
            return
        units = [each["properties"][0]["value"] for each in by_name.values()]
        nodes = sorted({series["metric"]["node"] for answer in answers for series in answer})
        cells = [
            {series["metric"]["node"]: float(series["value"][1]) for series in answer}
            for answer in answers
        ]
        rows = [
            [
                node,
                *(
                    _shown(cell[node], unit) if node in cell else ""
                    for cell, unit in zip(cells, units, strict=True)
                ),
            ]
            for node in nodes
        ]
        axes.table(rows, colLabels=["node", *by_name], loc="upper center", cellLoc="left")

    def _lines(self, axes: Axes, panel: dict[str, Any], found: list[tuple[str, Any]]) -> None:
        custom, unit = (
            panel["fieldConfig"]["defaults"]["custom"],
            panel["fieldConfig"]["defaults"]["unit"],
        )
        times = [self._start_s + number * self._step_s for number in range(_POINTS + 1)]
        stacked = custom["stacking"]["mode"] == "normal"
        base = [0.0] * len(times)
        for number, (name, series) in enumerate(found):
            known = {
                round((float(at) - self._start_s) / self._step_s): float(value)
                for at, value in series["values"]
            }
            values = [known.get(point, math.nan) for point in range(len(times))]
            color = _PALETTE[number % len(_PALETTE)]
            seconds = [at - self._start_s for at in times]
            if stacked:
                top = [
                    low + (0 if math.isnan(value) else value)
                    for low, value in zip(base, values, strict=True)
                ]
                axes.fill_between(
                    seconds, base, top, label=name, step="mid", alpha=0.7, color=color
                )
                base = top
            else:
                axes.plot(seconds, values, label=name, linewidth=1, color=color)
        if custom.get("scaleDistribution", {}).get("type") == "log":
            axes.set_yscale("log")
        for bound, setter in (("min", "bottom"), ("max", "top")):
            if bound in panel["fieldConfig"]["defaults"]:
                axes.set_ylim(**{setter: panel["fieldConfig"]["defaults"][bound]})
        axes.yaxis.set_major_formatter(lambda value, _: _shown(value, unit))
        axes.tick_params(labelsize=6)
        axes.legend(
            fontsize=5, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False
        )

    def _heatmap(self, axes: Axes, found: list[tuple[str, Any]]) -> None:
        found = sorted(found, key=lambda each: float(each[0].replace("+Inf", "inf")))
        rows: list[list[float]] = []
        below = [0.0] * (_POINTS + 1)
        for _, series in found:
            known = {
                round((float(at) - self._start_s) / self._step_s): float(value)
                for at, value in series["values"]
            }
            now = [known.get(number, 0.0) for number in range(_POINTS + 1)]
            rows.append([max(0.0, high - low) for high, low in zip(now, below, strict=True)])
            below = now
        axes.set_xticks([])
        axes.imshow(rows, aspect="auto", origin="lower", cmap="Blues")
        axes.set_yticks(range(len(found)), [name for name, _ in found], fontsize=6)

    def _ask(self, expression: str, instant: bool) -> list[dict[str, Any]]:
        query = filled(
            expression,
            self._run,
            range_s=self._end_s - self._start_s,
            step_s=self._step_s,
            scrape_s=SCRAPE_S,
        )
        span = (
            {"time": self._end_s}
            if instant
            else {"start": self._start_s, "end": self._end_s, "step": self._step_s}
        )
        path = "query" if instant else "query_range"
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode({'query': query} | span)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return result


def _legend(text: str, labels: Mapping[str, str]) -> str:
    for name, value in labels.items():
        text = text.replace("{{" + name + "}}", value[-24:])
    return text


def _shown(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:.1f} %"
    if unit == "currencyUSD":
        return f"${value:.4g}"
    if unit == "dateTimeFromNow":
        return time.strftime("%H:%M:%S", time.gmtime(value / 1000))
    if unit in _SCALES:
        scales = _SCALES[unit]
        _, name, factor = next(
            (each for each in reversed(scales) if abs(value) >= each[0]), scales[0]
        )
        return f"{value * factor:.3g} {name}"
    suffix = unit.partition(":")[2] if ":" in unit else "" if unit == "none" else unit
    return f"{value:.4g}{suffix}"


def main(url: str, run: str, directory: str, *span: str) -> None:
    """See the module."""
    start_s, end_s = map(float, span) if span else (time.time() - 3600, time.time())
    Path(directory).mkdir(parents=True, exist_ok=True)
    pictures = Pictures(url, run, start_s, end_s)
    for board in boards():
        pictures.draw(as_json(board), Path(directory) / f"{board.file_name[:-5]}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
