"""The Grafana dashboards show the metrics that exist, all of them, and are what their code writes."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from dashboards.boards import ABSENT, DIRECTORY, boards, texts
from dashboards.layout import TITLES
from elastic_pt.telemetry.catalogue import catalogue
from tests.monitoring.rules import RUNBOOKS

EXPOSED = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
PANEL_QUERIES_MIN = 40
FILES = sorted(texts())


def dashboard(name: str) -> dict[str, Any]:
    """A committed file."""
    found: dict[str, Any] = json.loads((DIRECTORY / name).read_text())
    return found


def all_panels(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Panels of all rows, without the rows themselves."""
    for panel in found["panels"]:
        yield from panel.get("panels", [])
        if panel["type"] != "row":
            yield panel


def expressions(name: str) -> list[str]:
    """Every query of a dashboard's panels."""
    return [t["expr"] for panel in all_panels(dashboard(name)) for t in panel["targets"]]


def exposed_names() -> dict[str, str]:
    """Name of every series that an agent exposes -> the metric it belongs to."""
    return {
        f"elastic_pt_{each.name}{suffix}": f"elastic_pt_{each.name}"
        for each in catalogue()
        for suffix in EXPOSED[each.kind]
    }


def used_names() -> set[str]:
    """Series names in all queries of all panels."""
    queries = [query for name in FILES for query in expressions(name)]
    return {name for query in queries for name in re.findall(r"elastic_pt_\w+", query)}


def test_committed_files_are_what_the_code_writes() -> None:
    """Nobody edits the JSON by hand: the code reproduces it byte for byte, and there is no other file."""
    committed = {path.name: path.read_text() for path in DIRECTORY.glob("*.json")}
    assert committed == texts(), "python -m dashboards writes them anew"


def test_every_query_uses_series_that_exist() -> None:
    """A renamed metric cannot leave an empty panel behind."""
    assert used_names() <= exposed_names().keys()


def test_every_metric_is_shown_or_left_out_on_purpose() -> None:
    """A new metric is put on a dashboard, or its absence is given a reason."""
    names = exposed_names()
    shown = {names[name] for name in used_names()}
    assert shown | ABSENT.keys() == set(names.values())
    assert not shown & ABSENT.keys()


def test_there_are_enough_panels() -> None:
    """The five dashboards together ask Prometheus at least 40 questions; rows of GPUs do not count."""
    queries = [
        target["expr"]
        for name in FILES
        for panel in dashboard(name)["panels"]
        for target in panel.get("targets", [])
    ]
    assert len(queries) >= PANEL_QUERIES_MIN
    assert not [query for query in queries if "elastic_pt_gpu_" in query]


@pytest.mark.parametrize("name", FILES)
def test_panels_fill_the_grid_and_say_what_they_answer(name: str) -> None:
    """Every panel has its own place within the grid, an id of its own, a unit, thresholds, and a question that it answers."""
    panels = list(all_panels(dashboard(name)))
    for panel in panels:
        defaults = panel["fieldConfig"]["defaults"]
        assert "?" in panel["description"], panel["title"]
        assert defaults["unit"], panel["title"]
        assert defaults["thresholds"]["steps"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    rows = [panel for panel in dashboard(name)["panels"] if panel["type"] == "row"]
    assert rows[0] == dashboard(name)["panels"][0]
    numbers = [panel["id"] for panel in [*panels, *rows]]
    assert len(set(numbers)) == len(numbers)
    # A collapsed row's panels lie below it, where the next row would be.
    taken: set[tuple[int, int]] = set()
    for panel in dashboard(name)["panels"]:
        place = panel["gridPos"]
        across = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in across for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert across.stop <= 24, panel["title"]
        taken |= cells
    below = max(y for _, y in taken) + 1
    assert {(x, y) for x in range(24) for y in range(below)} == taken, "the grid has gaps"


@pytest.mark.parametrize("name", FILES)
def test_queries_select_by_the_variables(name: str) -> None:
    """Every series of every query and annotation is selected by run and node, with =~ because several can be chosen."""
    found = dashboard(name)
    annotations = [each["expr"] for each in found["annotations"]["list"]]
    for expression in [*expressions(name), *annotations]:
        metrics = re.findall(r"(?:elastic_pt|process)_\w+(\S{0,13})", expression)
        assert metrics, expression
        assert set(metrics) == {'{run=~"$run",'}, expression
    variables = {each["name"]: each for each in found["templating"]["list"]}
    assert list(variables) == ["datasource", "run", "node", "docs"]
    assert variables["run"]["multi"]
    assert variables["node"]["multi"]
    assert (found["refresh"], found["time"]["from"]) == ("10s", "now-6h")


@pytest.mark.parametrize("name", FILES)
def test_links_lead_to_pages_and_dashboards_that_exist(name: str) -> None:
    """Every dashboard links to the four others, and a panel's runbook is a page of docs/runbooks."""
    found = dashboard(name)
    urls = [link["url"] for link in found["links"]]
    others = {f"/d/{uid}" for uid in TITLES if uid != found["uid"]}
    assert others == {url for url in urls if url.startswith("/d/")}
    runbooks = [link["url"] for panel in all_panels(found) for link in panel.get("links", [])]
    assert runbooks
    for url in [*urls, *runbooks]:
        if page := re.fullmatch(r"\$\{docs\}/(.+)", url):
            assert (RUNBOOKS.parent / page[1]).is_file(), url
        else:
            assert url in others


def test_uids_do_not_change() -> None:
    """Bookmarks and links of chats have them."""
    assert [each.uid for each in boards()] == list(TITLES)
    assert {dashboard(name)["uid"] for name in FILES} == {
        "elastic-pt-run",
        "elastic-pt-faults",
        "elastic-pt-checkpoints",
        "elastic-pt-performance",
        "elastic-pt-fleet",
    }
