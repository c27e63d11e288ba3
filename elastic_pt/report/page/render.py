"""The page as HTML: the model and its drawings in the template. Pure, except that template and style are files of the package."""

from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from elastic_pt import __version__
from elastic_pt.report.page.drawing import Size, draw_chart, draw_lanes
from elastic_pt.report.page.model import Page
from elastic_pt.report.page.parts import Figure

WIDE: Final = Size(960, 300)
NARROW: Final = Size(360, 230)
_TEMPLATE: Final = "template.html"
_STYLE: Final = "style.css"


def render(page: Page) -> str:
    """The whole page. Every text is escaped by the template or by the drawings."""
    source = files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return fill(source, page=page, draw=_draw)


def fill(template: str, **values: Any) -> str:
    """A page by a template, which also gets `style`, the style of all pages, and `version`."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = Markup(files(__package__).joinpath(_STYLE).read_text(encoding="utf-8"))
    return environment.from_string(template).render(**values, style=style, version=__version__)


def _draw(figure: Figure, size_name: str) -> Markup:
    size = WIDE if size_name == "wide" else NARROW
    if figure.chart is not None:
        return Markup(draw_chart(figure.chart, size))
    label = f"Members over time, one lane for each of {len(figure.lanes)} nodes"
    return Markup(draw_lanes(figure.lanes, label, figure.duration_s, size.width))
