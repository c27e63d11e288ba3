"""The dashboards are what Grafana's own types say, checked by their compiler."""

import shutil
from pathlib import Path

from tests.monitoring.panels import dashboards
from tests.monitoring.schema import COMPILER, check
from tests.services.fixtures import left_out


def test_dashboards_follow_grafanas_schema(tmp_path: Path) -> None:
    """Grafana would drop a field that it does not know without a word: every field of the JSON is one of its schema."""
    if shutil.which("node") is None or not COMPILER.exists():
        left_out("the check of the dashboards against @grafana/schema, which needs Node.js and npm")
    assert check(dashboards(), tmp_path) == ""
