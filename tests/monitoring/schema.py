"""The dashboards as TypeScript, so that Grafana's own schema package can check them.

    check(dashboards, directory)     the compiler's complaints; empty if the dashboards are what Grafana's types say

`make services` installs the schema package and the compiler into services/grafana-schema, at the versions of
tests/services/grafana-schema/package-lock.json. Grafana's enumerations have strings and numbers as values, and JSON has
only those: `Plain` makes unions of them. Options that are not given are Grafana's defaults: `Some` makes them optional.
"""

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = ROOT / "services" / "grafana-schema" / "node_modules"
COMPILER: Final = PACKAGES / "typescript" / "bin" / "tsc"
TIMEOUT_S: Final = 120.0

_PLUGINS: Final = {
    "timeseries": "TimeSeries",
    "stat": "Stat",
    "bargauge": "BarGauge",
    "table": "Table",
    "heatmap": "Heatmap",
}
_WITH_FIELDS: Final = ("timeseries", "table", "heatmap")
"""Panels with options for each field."""
_HEAD: Final = """\
import type {{ AnnotationQuery, Dashboard, Panel, RowPanel, VariableModel }} from "{raw}/dashboard/x/dashboard_types.gen";
{imports}
type Plain<T> = T extends string ? `${{T}}` : T extends number ? (`${{T}}` extends `${{infer N extends number}}` ? N : T)
  : T extends (infer U)[] ? Plain<U>[] : T extends object ? {{ [K in keyof T]: Plain<T[K]> }} : T;
type Some<T> = T extends (infer U)[] ? Some<U>[] : T extends object ? {{ [K in keyof T]?: Some<T[K]> }} : T;
// Fields of the Prometheus data source, which the general type of an annotation leaves open.
type Annotation = Plain<AnnotationQuery> & {{ expr: string; step: string; titleFormat: string; textFormat: string }};
type Query = {{
  refId: string; expr: string; legendFormat: string; instant: boolean; range: boolean; format?: "table" | "heatmap";
}};
"""


def check(dashboards: Sequence[dict[str, Any]], directory: Path) -> str:
    """Compile them without output, in an empty directory."""
    (directory / "node_modules").symlink_to(PACKAGES)
    (directory / "dashboards.ts").write_text("\n".join(_module(dashboards)))
    command = [
        "node",
        str(COMPILER),
        "--noEmit",
        "--strict",
        "--skipLibCheck",
        "--noErrorTruncation",
    ]
    command += ["--module", "esnext", "--moduleResolution", "node10", "--target", "es2022"]
    done = subprocess.run(
        [*command, "dashboards.ts"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.stdout + done.stderr


def _module(dashboards: Sequence[dict[str, Any]]) -> Iterator[str]:
    raw = "@grafana/schema/dist/esm/raw"
    imports = [
        f'import type * as {kind} from "{raw}/composable/{kind}/panelcfg/x/{name}PanelCfg_types.gen";'
        for kind, name in _PLUGINS.items()
    ]
    yield _HEAD.format(raw=raw, imports="\n".join(imports))
    for number, dashboard in enumerate(dashboards):
        yield from _checked(f"d{number}", dashboard)


def _checked(name: str, dashboard: dict[str, Any]) -> Iterator[str]:
    """The dashboard's own fields, then its parts one by one, so that a complaint names its place."""
    whole = dashboard | {"panels": [], "annotations": {"list": []}}
    yield f"const {name}: Plain<Dashboard> = {json.dumps(whole)};"
    for number, each in enumerate(dashboard["annotations"]["list"]):
        yield f"const {name}a{number}: Annotation = {json.dumps(each)};"
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            row = panel | {"panels": []}
            yield f"const {name}r{panel['id']}: Plain<RowPanel> = {json.dumps(row)};"
        for each in panel.get("panels", []) if panel["type"] == "row" else [panel]:
            yield from _panel(f"{name}p{each['id']}", each)


def _panel(name: str, panel: dict[str, Any]) -> Iterator[str]:
    kind = panel["type"]
    yield f"const {name}: Plain<Panel> = {json.dumps(panel)};"
    yield f"const {name}o: Some<Plain<{kind}.Options>> = {json.dumps(panel.get('options', {}))};"
    custom = panel["fieldConfig"]["defaults"].get("custom", {})
    if kind in _WITH_FIELDS:
        yield f"const {name}c: Some<Plain<{kind}.FieldConfig>> = {json.dumps(custom)};"
    for number, target in enumerate(panel["targets"]):
        yield f"const {name}q{number}: Query = {json.dumps(target)};"
