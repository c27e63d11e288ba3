"""The Grafana dashboard shows the metrics that exist, all of them, and is what its script writes."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from elastic_pt.telemetry.catalogue import Metrics

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
EXPOSED = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """dashboards/build.py as a module; it belongs to no package."""
    specification = importlib.util.spec_from_file_location("build", DASHBOARDS / "build.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def exposed_names() -> dict[str, str]:
    """Name of every series that an agent exposes -> the metric it belongs to."""
    return {
        family.name + suffix: family.name
        for family in Metrics().registry.collect()
        for suffix in EXPOSED[family.type]
    }


def used_names(dashboard: dict) -> set[str]:
    """Series names in all queries of the dashboard."""
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return {name for query in queries for name in re.findall(r"elastic_pt_\w+", query)}


def test_committed_dashboard_is_what_the_script_writes(script: ModuleType) -> None:
    """Nobody edits the JSON by hand: the script reproduces it byte for byte."""
    assert script.OUTPUT.read_text() == script.text()


def test_every_query_uses_series_that_exist(script: ModuleType) -> None:
    """A renamed metric cannot leave an empty panel behind."""
    assert used_names(script.build()) <= exposed_names().keys()


def test_every_metric_is_shown_or_left_out_on_purpose(script: ModuleType) -> None:
    """A new metric is put on the dashboard, or its absence is given a reason."""
    names = exposed_names()
    shown = {names[name] for name in used_names(script.build())}
    assert shown | script.ABSENT.keys() == set(names.values())
    assert not shown & script.ABSENT.keys()


def test_panels_do_not_overlap_and_have_a_description(script: ModuleType) -> None:
    """Every panel has its own place within the grid, a number of its own, and a sentence for the reader."""
    taken: set[tuple[int, int]] = set()
    panels = json.loads(script.OUTPUT.read_text())["panels"]
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        assert panel["description"].endswith((".", "?"))
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)
