"""The rules as files: valid, tested, about metrics that exist, and each alert with its page."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_pt.telemetry.catalogue import Metrics, catalogue
from elastic_pt.telemetry.goodput import Bucket
from tests.monitoring.rules import ROOT, RULE_FILES, RUNBOOKS, alert_names, alerts, rules
from tests.services.fixtures import left_out
from tests.services.prometheus import missing_commands

PROMTOOL_TESTS = sorted(Path(__file__).parent.glob("*.test.yml"))
SECTIONS = ["Meaning", "Impact", "Checks", "Mending", "How to reproduce it"]


def promtool(*arguments: str | Path) -> None:
    """Run promtool; its words if it fails."""
    if missing_commands():
        left_out("promtool's checks of the rules")
    done = subprocess.run(
        ["promtool", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules() -> None:
    """The rule files load in Prometheus, and no two rules are the same."""
    promtool("check", "rules", "--lint-fatal", *RULE_FILES)


@pytest.mark.parametrize("path", PROMTOOL_TESTS, ids=lambda path: path.stem)
def test_promtool_tests(path: Path) -> None:
    """Injected series fire the alert that they should and no other, and near misses fire none."""
    promtool("test", "rules", path)


def promtool_cases() -> list[dict[str, Any]]:
    """Every case of the files for promtool."""
    return [case for path in PROMTOOL_TESTS for case in yaml.safe_load(path.read_text())["tests"]]


@pytest.mark.parametrize("alert", alert_names())
def test_every_alert_has_a_series_that_fires_it_and_a_near_miss(alert: str) -> None:
    """An alert without a test that fires it may never fire; one without a near miss may fire always."""
    asked = [
        (check["expr"], [sample["labels"] for sample in check["exp_samples"]])
        for case in promtool_cases()
        if alert in case["name"]
        for check in case["promql_expr_test"]
    ]
    fires = [
        labels for _, labels in asked if any(f'alertname="{alert}"' in each for each in labels)
    ]
    quiet = [labels for expr, labels in asked if expr.startswith("ALERTS") and labels == []]
    assert fires
    assert quiet


def test_rules_use_metrics_that_exist() -> None:
    """A rule about a metric that was renamed, or a rule that is gone, would never fire and nobody would notice."""
    known = {rule["record"] for rule in rules() if "record" in rule}
    for each in catalogue():
        names = [each.exposed_name]
        if each.kind == "histogram":
            names = [f"{each.exposed_name}{suffix}" for suffix in ("_bucket", "_sum", "_count")]
        known.update(names)
    for rule in rules():
        used = set(re.findall(r"elastic_pt[_:][a-z0-9_:]+", rule["expr"]))
        assert used <= known, rule


def test_rules_select_labels_that_exist() -> None:
    """A selector of a label that the metric does not have would match nothing."""
    labels = {each.exposed_name: {"run", "node", *each.labels} for each in catalogue()}
    for rule in rules():
        for name, selector in re.findall(r"(elastic_pt_[a-z0-9_]+)\{([^}]*)\}", rule["expr"]):
            used = set(re.findall(r"(\w+)(?:=|!)", selector))
            assert used <= labels[name], rule


def test_rules_name_buckets_that_exist() -> None:
    """A bucket of time that was renamed would silently count as lost, or as never paused."""
    for rule in rules():
        for text in re.findall(r'time_seconds_total\{state(?:=|!=|=~|!~)"([^"]*)"', rule["expr"]):
            assert set(text.split("|")) <= set(Bucket), rule


def test_long_steps_have_buckets() -> None:
    """A percentile on a dashboard is never above the last bucket's bound."""
    metrics = Metrics()
    metrics.step_seconds.observe(1200.0)
    bucket = {"le": "1000.0"}
    assert metrics.registry.get_sample_value("elastic_pt_step_seconds_bucket", bucket) == 0
    bucket = {"le": "3000.0"}
    assert metrics.registry.get_sample_value("elastic_pt_step_seconds_bucket", bucket) == 1


def test_runs_stay_apart() -> None:
    """One Prometheus watches many runs: no aggregation, and no matching, mixes two of them."""
    for rule in rules():
        grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", rule["expr"])
        assert all("run" in labels.split(", ") for labels in grouped), rule
        assert not re.search(r"\b(?:sum|max|min|count|avg)\(", rule["expr"]), rule


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_tells_what_where_and_how_much(rule: dict[str, Any]) -> None:
    """Who is woken reads the run, the node if it is about one, the value, and where the page is."""
    assert rule["labels"] in ({"severity": "page"}, {"severity": "ticket"})
    texts = rule["annotations"]
    assert texts.keys() == {"summary", "description", "runbook_url"}
    both = texts["summary"] + texts["description"]
    assert "$labels.run" in texts["description"]
    assert "$value" in both or rule["alert"] == "NoticeSourceDown"
    about_a_node = "by (run, node" in rule["expr"] or rule["alert"] == "NoticeSourceDown"
    assert ("$labels.node" in both) == about_a_node
    name = rule["alert"]
    assert texts["runbook_url"] == f"{{{{ $externalLabels.runbooks }}}}docs/runbooks/{name}.md"


def test_every_alert_has_its_page_and_no_page_is_left_over() -> None:
    """Each page explains one alert, and the index lists them all with their severities."""
    pages = {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"}
    assert pages == set(alert_names())
    rows = re.findall(
        r"^\| \[(\w+)\]\((\w+)\.md\) \| ([a-z, ]+) \|",
        (RUNBOOKS / "README.md").read_text(),
        re.MULTILINE,
    )
    assert [(name, name) for name, _, _ in rows] == [(name, page) for name, page, _ in rows]
    severities: dict[str, list[str]] = {}
    for rule in alerts():
        severities.setdefault(rule["alert"], []).append(rule["labels"]["severity"])
    assert {name: text for name, _, text in rows} == {
        name: ", ".join(each) for name, each in severities.items()
    }


@pytest.mark.parametrize("alert", alert_names())
def test_a_page_has_all_parts(alert: str) -> None:
    """Meaning, impact, checks with a command, mending, and how to reproduce it."""
    page = RUNBOOKS / f"{alert}.md"
    text = page.read_text()
    assert text.startswith(f"# {alert}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    checks = text.partition("## Checks\n")[2].partition("\n## ")[0]
    assert re.search(r"^    \S", checks, re.MULTILINE)


def test_pages_point_at_tests_that_exist() -> None:
    """A page that says which test reproduces the fault names one that is there."""
    for page in RUNBOOKS.glob("*.md"):
        for path, name in re.findall(
            r"`((?:chaos_)?tests/\S+?\.py)(?:::(\w+))?`", page.read_text()
        ):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
            assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{page.name}: {name}"
