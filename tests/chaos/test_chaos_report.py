"""The report of a chaos run, and the index of several."""

import re
from pathlib import Path

from elastic_pt.chaos.report import lanes_of, write_index, write_report
from tests.chaos import results


def test_the_page_has_every_verdict_cost_and_fault(tmp_path: Path) -> None:
    """Hypothesis, verdicts, timeline, costs, buckets and the command to play it again are there, escaped."""
    write_report(results.result(tmp_path, passed=False), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "A run goes on &lt;after&gt; a freeze &amp; a loss." in page
    assert "✕ failed" in page
    assert page.count("✓ passed") == 1
    assert "step 48: abc, expected def" in page
    assert "4.50 s" in page
    assert "kill_node all after 9 s" in page
    assert "elastic-pt chaos run frozen.toml --seed 5" in page
    assert "62.5 %" in page
    assert "http" not in re.sub(r'lang="en"', "", page)
    assert len(re.findall(r'<path class="struck"', page)) == 2 * 3


def test_a_lane_has_a_bar_for_each_generation_of_its_node(tmp_path: Path) -> None:
    """Bars end where the node is no member any more; marks are at faults, ends and starts."""
    first, second = lanes_of(results.result(tmp_path).played)
    assert first.name == "node-0"
    members = [(each.style, each.start, each.end) for each in first.spans]
    assert members == [("member", 3.0, 8.5), ("member", 19.0, 24.0), ("lasting", 4.0, 10.0)]
    assert [(each.style, each.x) for each in first.marks] == [
        ("struck", 4.0),
        ("struck", 12.0),
        ("left", 12.1),
        ("joined", 14.0),
        ("left", 24.5),
    ]
    assert [(each.style, each.start, each.end) for each in second.spans] == [
        ("member", 3.0, 8.5),
        ("later", 8.5, 12.1),
    ]


def test_the_index_leads_to_each_page_and_names_what_was_left_out(tmp_path: Path) -> None:
    """A run that was not played does not count as passed."""
    found = [
        (results.result(tmp_path, passed=passed), f"{passed}/report.html")
        for passed in (True, False)
    ]
    write_index(
        found, [(results.scenario(), "no network (which need root)")], tmp_path / "index.html"
    )
    page = (tmp_path / "index.html").read_text()
    assert "2 runs, 1 failed, 1 left out" in page
    assert 'href="True/report.html"' in page
    assert "no network (which need root)" in page
    assert page.count("elastic-pt chaos run frozen.toml --seed 5") == 1
