"""The report page: from a log, a history and accounts to what the page says."""

import itertools
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_run import EPOCH_S, PlantedRun

from elastic_pt.report.page.drawing import (
    Chart,
    Line,
    Point,
    Size,
    draw_chart,
    nice_ticks,
    shortened,
    time_ticks,
)
from elastic_pt.report.page.facts import read_facts
from elastic_pt.report.page.failures import FAILURES_MAX
from elastic_pt.report.page.model import Page, page_of
from elastic_pt.report.page.nodes import LANES_MAX
from elastic_pt.report.page.render import render
from elastic_pt.report.page.steps import moving_average, thin
from elastic_pt.report.page.write import write_report
from elastic_pt.report.status import Run
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import (
    COMPLETED,
    Cause,
    CauseKind,
    Generation,
    Member,
    Quarantine,
    Recovery,
    Stop,
)
from elastic_pt.store.open import open_store

LOST_B = Cause(CauseKind.LOST, "b", "its address refuses connections", detect_s=3.0)
SECTIONS = (
    *("headline", "loss", "nodes", "goodput", "failures", "checkpoints"),
    *("throughput", "mixture", "configuration", "definitions"),
)
values = st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(math.nan)), min_size=1, max_size=60)


class Reader(HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attributes if name == "id"]
        self.addresses += [value or "" for name, value in attributes if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.words += data


def disturbed(directory: Path) -> PlantedRun:
    """Two nodes; one is lost at step 25, and 5 steps are done again; another one joins."""
    run = PlantedRun(directory)
    sources = {"web": [3, 2.0], "code": [1, 1.0]}
    phases = {"data": 0.1, "compute": 1.0, "communicate": 0.8, "optimizer": 0.1}
    line = {"sources": sources, "phases": phases, "world_size": 2}
    run.generation("ab")
    run.commit([{**line, "loss": 9.0 - step / 5} for step in range(20)])
    run.time_s += 13.5
    run.generation("a", LOST_B, frontier=25)
    run.commit(
        [{"loss": 5.0, "held_out_loss": 5.5}, {"loss": None}, *[{"skipped": "not finite"}] * 8]
    )
    run.generation("ac", Cause(CauseKind.JOINED, "c"), frontier=30)
    run.commit([{"loss": 2.5}] * 10, permanent=True)
    run.append(Quarantine("ckpt/30", "bad shard"))
    run.append(Stop(COMPLETED, 40))
    run.account("a", 3.6, start=10.0, productive=70.0, recompute=20.0)
    run.account("b", 3.6, start=10.0, productive=40.0)
    return run


def page(run: Run) -> Page:
    """The page, some time after the end."""
    return page_of(read_facts(run, EPOCH_S + 1e4))


def tiles(found: Page) -> dict[str, str]:
    """The values of the headline by name."""
    return {tile.name: tile.value for tile in found.tiles}


def test_headline_answers_first_questions(tmp_path: Path) -> None:
    """State, step, loss, goodput, node time, cost and failures are those of the log and of the accounts."""
    assert tiles(page(disturbed(tmp_path / "run").open())) == {
        "State": "completed",
        "Step": "40",
        "Loss": "2.500",
        "Goodput": "73.3 %",
        "Node time": "150.0 s",
        "Cost": "0.15 USD",
        "Failures survived": "1",
    }


def test_waterfall_goes_from_all_time_to_productive_time(tmp_path: Path) -> None:
    """Each bucket takes its share off what the buckets before it have left, down to the productive time."""
    rows = page(disturbed(tmp_path / "run").open()).goodput.rows
    assert [row.name for row in rows] == ["all node time", "recompute", "start", "productive"]
    for before, after in itertools.pairwise(rows[:-1]):
        end = before.bar.width if before is rows[0] else before.bar.start
        assert after.bar.start + after.bar.width == pytest.approx(end)
    assert rows[-1].bar.width == pytest.approx(rows[-2].bar.start)
    assert rows[1].cells == ("20.0 s", "13.3 %", "0.02")


def test_bucket_costs_what_its_own_agents_cost(tmp_path: Path) -> None:
    """Money goes to the buckets of the agents that have a price, and the headline tells how many have none."""
    run = disturbed(tmp_path / "run")
    run.account("free", checkpoint_stall=50.0)
    found = page(run.open())
    assert {row.name: row.cells[2] for row in found.goodput.rows} == {
        "all node time": "0.15",
        "checkpoint stall": "0.00",
        "recompute": "0.02",
        "start": "0.02",
        "productive": "0.11",
    }
    (cost,) = (tile.note for tile in found.tiles if tile.name == "Cost")
    assert cost == "1 agent without a price not counted"


def test_each_bucket_has_the_unit_that_suits_it(tmp_path: Path) -> None:
    """Seconds beside hours are not shown as 0.0 h."""
    run = PlantedRun(tmp_path / "run")
    run.generation("a")
    run.account("a", productive=36_000.0, restore=25.5, agree=420.0)
    cells = {row.name: row.cells[0] for row in page(run.open()).goodput.rows}
    assert (cells["productive"], cells["agree"], cells["restore"]) == (
        "10.0 h",
        "7.0 min",
        "25.5 s",
    )


def test_failure_is_explained_with_its_cost(tmp_path: Path) -> None:
    """A failure has its cause, the node time of each phase, and the explanation of the log; a join is no failure."""
    found = page(disturbed(tmp_path / "run").open())
    (failure,) = found.failures
    assert failure.title == "Step 25, generation 2"
    assert failure.causes == "lost b"
    assert "5 steps done again" in failure.cost
    shares = {bar.name: bar.value for bar in failure.bars}
    assert shares == {
        "detect": "3.0 s",
        "agree": "0.5 s",
        "start": "1.5 s",
        "restore": "2.0 s",
        "recompute": "11.0 s",
    }
    assert sum(bar.width for bar in failure.bars) == pytest.approx(1.0)
    assert any("noticed 3.00 s after its last sign of life" in each for each in failure.sentences)
    assert len(found.planned) == 1


def test_unknown_steps_are_not_counted_as_none(tmp_path: Path) -> None:
    """When no member was left, nobody knows which steps were lost: sums say so, and no cost is 0.0 s."""
    run = PlantedRun(tmp_path / "run")
    run.generation("ab")
    run.commit([{}] * 5)
    run.append(
        Generation(
            2,
            (Member("a", "a2", "10.0.0.1", 1, 1, 1),),
            (4,),
            "10.0.0.1",
            1,
            None,
            "resumed by new nodes",
        )
    )
    (alone,) = page(run.open()).failures
    assert alone.cost.startswith("an unknown amount of node time, an unknown number of steps")
    run.append(Recovery(2, 1.0, 0.5, 2.0, 1.0, 4.5))
    (alone,) = page(run.open()).failures
    assert alone.cost.startswith("at least 3.5 s of node time, an unknown number of steps")
    run.number = 2
    run.generation("a", LOST_B, frontier=8, life="2")
    found = page(run.open())
    notes = {tile.name: tile.note for tile in found.tiles}
    assert notes["Failures survived"].startswith("3 or more steps done again")
    assert " cost at least " in found.failure_notes[0]


def test_lanes_show_when_each_node_was_member(tmp_path: Path) -> None:
    """A lost node's lane ends when its peers last heard it, with a mark; who joins has a mark at the start."""
    lanes = {
        lane.name: lane for lane in page(disturbed(tmp_path / "run").open()).nodes.figures[1].lanes
    }
    spans = {
        name: [each for each in lane.spans if each.style == "member"]
        for name, lane in lanes.items()
    }
    assert list(lanes) == ["a", "b", "c"]
    assert [(each.start, each.end) for each in spans["a"]] == [(0.0, 93.5)]
    assert [(each.start, each.end) for each in spans["b"]] == [(0.0, 50.0)]
    assert [(mark.style, mark.x) for mark in lanes["b"].marks] == [("lost", 50.0)]
    assert [(mark.style, mark.x) for mark in lanes["c"].marks] == [("joined", 73.5)]


def test_lanes_end_with_the_agents_when_no_member_is_left(tmp_path: Path) -> None:
    """When all members end, no record says when: lanes and world size end with their accounts, and the mark is `lost`."""
    run = PlantedRun(tmp_path / "run")
    run.generation("ab")
    run.account("a", incarnation="a", productive=20.0)
    run.account("b", incarnation="b", productive=24.0)
    run.commit([{}] * 5)
    run.time_s = 100.0
    down = page(run.open()).nodes.figures
    run.generation("ab", frontier=8, life="2")
    run.append(Stop(COMPLETED, 5))
    resumed = page(run.open()).nodes.figures
    for figures in (down, resumed):
        assert figures[0].chart is not None
        assert Point(24.0, 0.0) in figures[0].chart.lines[0].points
        for lane, end in zip(figures[1].lanes, (20.0, 24.0), strict=True):
            members = [each for each in lane.spans if each.style == "member"]
            assert (members[0].start, members[0].end) == (0.0, end)
            assert [(mark.style, mark.x) for mark in lane.marks] == [("lost", end)]
            assert "no member of its generation was left" in lane.marks[0].title


def test_loss_has_gaps_marks_and_held_out_points(tmp_path: Path) -> None:
    """The curve breaks where the loss is not finite; failures, skipped steps and held-out losses are on it."""
    figure = page(disturbed(tmp_path / "run").open()).loss.figures[0]
    assert figure.chart is not None
    raw = {point.x: point.y for point in figure.chart.lines[0].points}
    assert raw[22.0] is None
    assert (raw[21.0], raw[40.0]) == (5.0, 2.5)
    assert [(mark.style, mark.x) for mark in figure.chart.marks] == [
        ("failure", 25.0),
        ("planned", 30.0),
    ]
    assert [dot.x for dot in figure.chart.dots] == [21.0, *range(23, 31)]
    assert any("1 step had a loss that is not finite" in note for note in figure.notes)


def test_mixture_is_counted_in_rows(tmp_path: Path) -> None:
    """The realised share of a source is its share of the rows; an unknown plan is named."""
    mixture = page(disturbed(tmp_path / "run").open()).mixture
    assert {row.name: row.cells[:3] for row in mixture.rows} == {
        "web": ("unknown", "75.0 %", "60"),
        "code": ("unknown", "25.0 %", "20"),
    }
    assert any("plan is not known" in note for note in mixture.notes)


def test_checkpoints_are_told(tmp_path: Path) -> None:
    """Commits, permanent and quarantined checkpoints, and the usual interval are on the page."""
    checkpoints = page(disturbed(tmp_path / "run").open()).checkpoints
    assert "3 commits, 1 of them permanent, 1 quarantined" in checkpoints.notes[0]
    assert "10 steps (median; at most 20)" in checkpoints.notes[1]
    states = {row[0]: row[4] for row in checkpoints.tables[0].rows}
    assert states == {"40": "permanent", "30": "quarantined: bad shard", "20": "kept"}


def test_page_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    """The page has all sections, and no address in it leads out of it."""
    found = Reader(render(page(disturbed(tmp_path / "run").open())))
    assert [each for each in found.ids if each in SECTIONS] == list(SECTIONS)
    assert {each[0] for each in found.addresses} == {"#", "d"}
    assert "script" not in found.tags
    assert found.tags.count("svg") == 2 * 6


def test_names_from_the_run_are_escaped(tmp_path: Path) -> None:
    """A node, a cause or a source with HTML in its name is text on the page."""
    evil = '<img src=x onerror="alert(1)">&'
    run = PlantedRun(tmp_path / "run")
    run.generation([evil, "b"])
    run.commit([{"sources": {evil: [1, 2.0]}, "skipped": evil}])
    run.generation(["b"], Cause(CauseKind.LOST, evil, evil), frontier=3)
    run.append(Quarantine("ckpt/1", evil))
    run.append(Stop(evil, 3))
    run.account(evil, productive=10.0)
    found = Reader(render(page(run.open())))
    assert "img" not in found.tags
    assert evil in found.words


def test_long_run_makes_a_small_page(tmp_path: Path) -> None:
    """A run of 10,000 steps, 100 nodes and 300 generations is thinned to less than 500 kB, and the page says so."""
    run = PlantedRun(tmp_path / "run")
    names = [f"worker-{number:03d}.example" for number in range(100)]
    run.generation(names, workers=8)
    for number in range(150):
        run.commit([{"loss": 3.0 + step % 7} for step in range(66)])
        lost = names[number % 100]
        rest = [each for each in names if each != lost]
        run.generation(
            rest, Cause(CauseKind.LOST, lost, "silent", detect_s=2.0), frontier=run.step + 9
        )
        run.commit([{"loss": 3.0}])
        run.generation(names, Cause(CauseKind.JOINED, lost), frontier=run.step, life=f"-{number}")
    found = page(run.open())
    text = render(found)
    assert len(text.encode()) < 500_000
    assert len(found.failures) == FAILURES_MAX
    assert "20 most expensive of 150" in text
    assert "each point stands for" in text
    assert len(found.nodes.figures[1].lanes) == LANES_MAX
    assert "20 nodes with less time as a member have no lane here" in text


def test_run_without_records_says_one_line(tmp_path: Path) -> None:
    """A run that has not started has one line instead of empty sections."""
    found = page(PlantedRun(tmp_path / "run").open())
    assert "has not started" in found.nothing
    ids = Reader(render(found)).ids
    assert "nothing" in ids
    assert "loss" not in ids


def test_one_step_and_no_account(tmp_path: Path) -> None:
    """A run of one step by agents of an earlier version is shown; what is missing is named."""
    run = PlantedRun(tmp_path / "run")
    run.generation("a")
    run.commit([{"loss": 4.0}])
    found = page(run.open())
    assert tiles(found)["State"] == "down"
    assert "earlier version" in found.goodput.missing
    assert "no sources" in found.mixture.missing
    assert "no phases" in found.throughput.notes[-1]
    assert "NaN" not in render(found)


def test_failed_run_names_its_end(tmp_path: Path) -> None:
    """A failed run says why it ended, and does not call its failures survived."""
    run = PlantedRun(tmp_path / "run")
    run.generation("a")
    run.append(Stop("worker exits with code 1", 0))
    found = page(run.open())
    assert (found.tiles[0].value, found.tiles[0].tone) == ("failed", "bad")
    assert "Failures" in tiles(found)
    assert "worker exits with code 1" in " ".join(found.failure_notes)


def test_page_replaces_the_file_at_once(tmp_path: Path) -> None:
    """The file is replaced in one piece, and nothing else is left beside it."""
    out = tmp_path / "out" / "report.html"
    out.parent.mkdir()
    out.write_text("old")
    size = write_report(disturbed(tmp_path / "run").open(), out, EPOCH_S + 1e4)
    assert out.stat().st_size == size > 10_000
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.moto
def test_run_on_s3(tmp_path: Path, moto_url: str) -> None:
    """A run in a bucket has the page that the same run has in a directory."""
    planted = disturbed(tmp_path / "run").open()
    store = open_store(moto_url)
    for key in planted.store.keys(""):
        store.create(key, planted.store.read(key))
    log = RunLog(store, writer="test")
    log.refresh()
    assert tiles(page(Run(store, log, None))) == tiles(page(planted))


def test_step_counts_as_first_committed(tmp_path: Path) -> None:
    """Steps that were computed again after a quarantined checkpoint are not counted twice."""
    run = PlantedRun(tmp_path)
    run.generation("a")
    run.commit([{"loss": 1.0, "sources": {"a": [2, 1.0]}}] * 3)
    run.step = 1
    run.commit([{"loss": 9.0, "sources": {"a": [2, 1.0]}}] * 3)
    steps = read_facts(run.open(), EPOCH_S).steps
    assert list(steps.step) == [1, 2, 3, 4]
    assert list(steps.loss) == [1.0, 1.0, 1.0, 9.0]
    assert steps.sources["a"].rows == 8


@given(values, st.integers(1, 20))
def test_thinned_curve_keeps_extremes(loss: list[float], points_max: int) -> None:
    """Each point has the least, mean and greatest of its own steps, and all steps are in one point."""
    step = np.arange(1, len(loss) + 1, dtype=np.float64)
    found = thin(step, np.array(loss), points_max)
    assert len(found.steps) <= points_max
    assert found.steps[-1] == len(loss)
    first = 0
    for index, last in enumerate(found.steps):
        part = [each for each in loss[first : int(last)] if math.isfinite(each)]
        first = int(last)
        if not part:
            assert math.isnan(found.mean[index])
            continue
        assert (found.low[index], found.high[index]) == (min(part), max(part))
        assert found.mean[index] == pytest.approx(sum(part) / len(part))


@given(values, st.integers(1, 70))
def test_moving_average_leaves_out_missing_values(loss: list[float], window: int) -> None:
    """The average is that of the known values among the last ones."""
    found = moving_average(np.array(loss), window)
    for index, value in enumerate(found):
        part = [
            each for each in loss[max(0, index + 1 - window) : index + 1] if math.isfinite(each)
        ]
        if part:
            assert value == pytest.approx(sum(part) / len(part), abs=1e-6)
        else:
            assert math.isnan(value)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 12))
def test_ticks_are_few_and_inside(low: float, width: float, most: int) -> None:
    """An axis has at most so many ticks, all within its range, which floats can divide."""
    width = max(width, abs(low) * 1e-6)
    ticks = nice_ticks(low, low + width, most)
    assert len(ticks) <= most + 1
    assert all(low - width * 1e-3 <= each <= low + width * 1.001 for each in ticks)
    assert len(time_ticks(width, most)) <= 2 * most + 1


def test_line_breaks_at_missing_values() -> None:
    """A missing value interrupts the line, and a value alone is still visible."""
    points = [Point(0, 1.0), Point(1, 1.0), Point(2, None), Point(3, 1.0)]
    chart = Chart("a label", "x", "y", (0, 4), (0, 2), [Line("curve", points)])
    text = draw_chart(chart, Size(400, 200))
    path = text.split('class="curve" d="')[1].split('"')[0]
    assert path.count("M") == 2
    assert path.endswith("m-4 0h4")


def test_short_names_keep_what_differs() -> None:
    """Long names lose what all have in common first."""
    names = ["gpu-node-007.cluster.example", "gpu-node-012.cluster.example"]
    assert shortened(names, 8) == ["…007…", "…012…"]
    assert shortened(["a", "b"], 8) == ["a", "b"]
    assert shortened(["one-very-long-name"], 8) == ["one…name"]
