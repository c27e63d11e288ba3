"""The rule files of deploy/monitoring, and a copy of them in which time passes faster.

    scaled(directory, 100.0)     5m in brackets, behind `offset` or at `for:` becomes 3 s; 300 in elastic_pt:limit_seconds, 3

The scaled rules are right for a run whose steps are as much shorter, so a test sees in seconds what takes an hour.
ClockSkew's limit stays: it is a difference of two clocks, and no duration.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
RUNBOOKS: Final = ROOT / "docs" / "runbooks"
RULE_FILES: Final = tuple(
    ROOT / "deploy" / "monitoring" / f"{kind}-rules.yml" for kind in ("recording", "alert")
)

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION: Final = re.compile(r"(?P<before>\[|offset )(?P<number>\d+)(?P<unit>[smhd])")


def rules() -> Iterator[dict[str, Any]]:
    """Every rule, recording ones first."""
    for path in RULE_FILES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def alerts() -> list[dict[str, Any]]:
    """The alerts; one of two severities is there twice."""
    return [rule for rule in rules() if "alert" in rule]


def alert_names() -> list[str]:
    """Each name once, in order."""
    return list(dict.fromkeys(rule["alert"] for rule in alerts()))


def scaled(directory: Path, factor: float) -> list[Path]:
    """Copies of the rule files with all durations divided by `factor`."""
    copies = []
    for path in RULE_FILES:
        document = yaml.safe_load(path.read_text())
        for group in document["groups"]:
            for rule in group["rules"]:
                _scale(rule, factor)
        # JSON is YAML.
        copies.append(directory / path.name)
        copies[-1].write_text(json.dumps(document))
    return copies


def _scale(rule: dict[str, Any], factor: float) -> None:
    def milliseconds(number: str, unit: str) -> str:
        return f"{max(1, round(1000 * int(number) * _SECONDS[unit] / factor))}ms"

    if "for" in rule:
        rule["for"] = milliseconds(rule["for"][:-1], rule["for"][-1])
    if rule.get("record") == "elastic_pt:limit_seconds" and rule["labels"]["alert"] != "ClockSkew":
        rule["expr"] = f"vector({float(rule['expr'][len('vector(') : -1]) / factor})"
    rule["expr"] = _DURATION.sub(
        lambda found: found["before"] + milliseconds(found["number"], found["unit"]), rule["expr"]
    )
