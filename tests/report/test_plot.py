"""The plot of a run shows the loss, and what happened to each node."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from elastic_pt.report.plot import GenerationSpan, StepPoint, plot_run

GENERATIONS = [
    GenerationSpan(1, 0, 2, ("node-1", "node-2"), "started"),
    GenerationSpan(2, 10, 1, ("node-2",), "lost node-1"),
    GenerationSpan(3, 20, 2, ("node-2", "node-10"), "node-10 joins"),
    GenerationSpan(4, 30, 2, ("node-2", "node-10"), "node-10: worker 1 killed by SIGKILL"),
]
POINTS = [StepPoint(step, None if step == 5 else 7.0 - step / 10) for step in range(1, 41)]


@pytest.fixture
def axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Axes, Axes]:
    """Both panels of a drawn run."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: object, **options: object) -> None:
        drawn.append(figure)
        save(figure, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", keep)
    plot_run(tmp_path / "plot.png", "a run", POINTS, GENERATIONS)
    loss, membership = drawn[0].axes
    return loss, membership


def test_a_png_is_written(tmp_path: Path) -> None:
    """The file is a readable picture and has more than one colour."""
    path = tmp_path / "plot.png"
    plot_run(path, "a run", POINTS, GENERATIONS)
    pixels = imread(path)
    assert pixels.shape[1] > 800
    assert pixels.std() > 0.05


def test_run_without_a_step_is_drawn(tmp_path: Path) -> None:
    """A run without a commit is drawn, not refused."""
    plot_run(tmp_path / "plot.png", "a run", [], GENERATIONS[:1])
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_each_change_is_in_the_row_of_its_node(axes: tuple[Axes, Axes]) -> None:
    """Each change is written once, at its step, in the row of its node."""
    _, membership = axes
    rows = [label.get_text() for label in membership.get_yticklabels()]
    assert rows == ["node-1", "node-2", "node-10"]
    told = {
        (rows[int(note.xy[1])], note.xy[0], note.get_text())
        for note in membership.texts
        if hasattr(note, "xy")
    }
    assert told == {
        ("node-1", 10, "lost node-1"),
        ("node-10", 20, "node-10 joins"),
        ("node-10", 30, "node-10: worker 1 killed by SIGKILL"),
    }


def test_lost_node_is_red_and_joined_node_is_green(axes: tuple[Axes, Axes]) -> None:
    """Losses and joins have different colours."""
    _, membership = axes
    colors = {note.get_text(): to_rgb(note.get_color()) for note in membership.texts}
    red, green, _ = colors["lost node-1"]
    assert red > 2 * green
    red, green, _ = colors["node-10 joins"]
    assert green > 2 * red


def test_bars_cover_exactly_the_steps_of_each_node(axes: tuple[Axes, Axes]) -> None:
    """A node's bars are the steps it took part in: a lost node's end, and a joined node's begin, at the boundary."""
    _, membership = axes
    steps = [0.0, 0.0, 0.0]
    for bar in membership.patches:
        steps[round(bar.get_y() + bar.get_height() / 2)] += bar.get_width()  # type: ignore[attr-defined]
    assert steps == [10, 40, 20]


def test_the_loss_panel_shows_every_finite_step(axes: tuple[Axes, Axes]) -> None:
    """The curve has every step with a finite loss, and no value for a skipped step."""
    loss, _ = axes
    steps = np.asarray(loss.lines[0].get_xdata())
    assert steps.tolist() == [point.step for point in POINTS if point.loss is not None]
