"""Read the dashboards of this package, with what a user has chosen filled in."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from elastic_pt.errors import ConfigError

Dashboards = dict[str, dict[str, Any]]
"""File name -> a dashboard as Grafana's API takes it, in the order of the names."""


@dataclass(frozen=True)
class Choices:
    """Values that the variables of the dashboards begin with; empty: as delivered."""

    datasource: str = ""
    """The UID of a Prometheus data source; Grafana's default one otherwise."""
    docs: str = ""
    """Where docs/ can be read, for links to runbooks."""


def shipped(choices: Choices) -> Dashboards:
    """All dashboards of the package."""
    found = sorted(
        (each for each in files(__package__).iterdir() if each.name.endswith(".json")),
        key=lambda each: each.name,
    )
    return {each.name: _chosen(json.loads(each.read_text("utf-8")), choices) for each in found}


def export(directory: Path, choices: Choices) -> list[Path]:
    """Write them to a directory, which is made if it is missing; returns the files."""
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, dashboard in shipped(choices).items():
            path = directory / name
            path.write_text(json.dumps(dashboard, indent=1, sort_keys=True) + "\n", "utf-8")
            written.append(path)
    except OSError as error:
        raise ConfigError(
            f"--out {directory}: {error.strerror}; expected a directory that can be written"
        ) from error
    return written


def _chosen(dashboard: dict[str, Any], choices: Choices) -> dict[str, Any]:
    for variable in dashboard["templating"]["list"]:
        value = {"datasource": choices.datasource, "docs": choices.docs.rstrip("/")}.get(
            variable["name"]
        )
        if value:
            variable["current"] = {"selected": True, "text": value, "value": value}
            if variable["type"] == "textbox":
                variable["query"] = value
    return dashboard
