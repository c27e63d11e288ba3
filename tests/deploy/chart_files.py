"""Files below deploy/ that repeat what other files say: `python -m tests.deploy.chart_files` writes them.

    elastic_pt.config             ─► values.schema.json of the chart, the part about `config`
    deploy/monitoring/*rules.yml  ─► the chart's rules, and the PrometheusRule of the kustomize component
    dashboards/*.json             ─► the chart's dashboards, each in one line

A chart and a kustomization read no file outside their folders, so these are copies. A test compares them.
"""

import json
from pathlib import Path
from typing import Any, Final

import yaml

from elastic_pt.config import Config

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "deploy" / "helm" / "elastic-pt"
SCHEMA: Final = CHART / "values.schema.json"
RULE: Final = ROOT / "deploy" / "kubernetes" / "components" / "rules" / "prometheusrule.yaml"
LABELS: Final = {
    "app.kubernetes.io/name": "elastic-pt",
    "app.kubernetes.io/instance": "elastic-pt",
}
SET_BY_THE_CHART: Final = {
    "ElasticSection": ("leave_timeout_s", "notices"),
    "TelemetrySection": ("metrics_address", "metrics_port"),
}
"""Keys of the configuration that the pod's arguments set, by section: the chart has values for them, or fixes them."""
EXACT_MAX: Final = 2**53 - 1
"""Helm reads numbers as 64-bit floats: a larger integer would change without a word."""


def files() -> dict[Path, str]:
    """Each of these files -> its text."""
    written = f"# Written by `python -m {__spec__.name}` from deploy/monitoring/*-rules.yml.\n"
    rules = {"groups": [group for path in rule_files() for group in groups_of(path)]}
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "elastic-pt", "namespace": "elastic-pt", "labels": LABELS},
        "spec": rules,
    }
    return {
        SCHEMA: schema(json.loads(SCHEMA.read_text())),
        CHART / "files" / "rules.yaml": written + as_yaml(rules),
        RULE: written + as_yaml(rule),
    } | {
        CHART / "files" / "dashboards" / path.name: one_line(path)
        for path in sorted((ROOT / "dashboards").glob("*.json"))
    }


def one_line(path: Path) -> str:
    """The JSON of a file without spaces."""
    return json.dumps(json.loads(path.read_text()), separators=(",", ":")) + "\n"


def rule_files() -> list[Path]:
    """The rules of Prometheus, those that record first: alerts use them."""
    folder = ROOT / "deploy" / "monitoring"
    return [folder / "recording-rules.yml", folder / "alert-rules.yml"]


def groups_of(path: Path) -> list[dict[str, Any]]:
    """The groups of a file of rules."""
    found: list[dict[str, Any]] = yaml.safe_load(path.read_text())["groups"]
    return found


def as_yaml(tree: Any) -> str:
    """As YAML, in the order of the tree."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def schema(values: dict[str, Any]) -> str:
    """The schema of the chart's values, with the sections of the configuration as they are in the code."""
    config = Config.model_json_schema(ref_template="#/definitions/{model}")
    sections: dict[str, Any] = config.pop("$defs")
    for name, keys in SET_BY_THE_CHART.items():
        for key in keys:
            del sections[name]["properties"][key]
    for section in sections.values():
        section.pop("title", None)
        for leaf in section["properties"].values():
            leaf.pop("title", None)
            if leaf.get("type") == "integer":
                leaf["maximum"] = min(leaf.get("maximum", EXACT_MAX), EXACT_MAX)
                leaf.pop("exclusiveMaximum", None)
    values["properties"]["config"] = {
        "type": "object",
        "additionalProperties": False,
        "required": config["required"],
        "properties": {
            name: {"$ref": f"#/definitions/{Config.model_fields[name].annotation.__name__}"}  # type: ignore[union-attr]
            for name in config["properties"]
        },
    }
    values["definitions"] = {
        name: each for name, each in values["definitions"].items() if not name.endswith("Section")
    } | sections
    return json.dumps(values, indent=2) + "\n"


if __name__ == "__main__":
    for target, text in files().items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
