"""The tables of docs/chaos.md, from the code: fields of a scenario, kinds of faults, oracles, and what a campaign leaves out.

python -m elastic_pt.chaos.document docs/chaos.md       writes them into the page, between their marks
"""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from elastic_pt.chaos.campaign import why_not
from elastic_pt.chaos.kinds import KINDS, RANGES, Kind
from elastic_pt.chaos.oracles import ORACLES
from elastic_pt.chaos.scenario import Expectation, FaultSpec, Moment, Phase, Scenario

_REQUIRED: Final = "required"


def filled(page: str) -> str:
    """The page with all tables as they are now. Raises `KeyError` for a mark of no table."""
    tables = {
        "scenario": _fields(Scenario),
        "fault": _fields(FaultSpec),
        "moment": _fields(Moment),
        "expect": _fields(Expectation),
        "phases": _phases(),
        "kinds": _kinds(),
        "oracles": _oracles(),
        "left out": _left_out(),
    }

    def table(found: re.Match[str]) -> str:
        name = found[1]
        lines = "\n".join(f"| {' | '.join(row)} |" for row in tables[name])
        return f"<!-- {name}: begin -->\n{lines}\n<!-- {name}: end -->"

    return re.sub(r"<!-- ([a-z ]+): begin -->\n.*?<!-- \1: end -->", table, page, flags=re.DOTALL)


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    schema = model.model_json_schema()
    yield "key", "value", "default", "meaning"
    yield "---", "---", "---", "---"
    for name, about in schema["properties"].items():
        meaning = " ".join((model.model_fields[name].description or "").split())
        shape = _resolved(about, schema.get("$defs", {}))
        default = _REQUIRED if name in schema.get("required", ()) else _shown(about.get("default"))
        yield f"`{name}`", _accepted(shape), default, meaning


def _resolved(about: Mapping[str, Any], parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All shapes that a value may have."""
    found = []
    for each in about.get("anyOf", [about]):
        if "$ref" in each:
            each = parts[each["$ref"].rpartition("/")[2]]
        if each.get("type") != "null":
            found.append(dict(each))
    return found


def _accepted(shapes: list[dict[str, Any]]) -> str:
    return " or ".join(_accepted_shape(each) for each in shapes)


def _accepted_shape(shape: Mapping[str, Any]) -> str:
    if "enum" in shape:
        return ", ".join(f"`{each}`" for each in shape["enum"])
    match shape["type"]:
        case "integer" | "number":
            low = shape.get("minimum", shape.get("exclusiveMinimum", 0))
            kind = "whole number" if shape["type"] == "integer" else "number"
            if "exclusiveMinimum" in shape:
                return f"{kind} above {low:g}, at most {shape['maximum']:g}"
            most = f" to {shape['maximum']:g}" if "maximum" in shape else ""
            return f"{kind} from {low:g}{most}"
        case "array":
            return "list"
        case "object":
            return "table"
        case "boolean":
            return "true or false"
        case _:
            return "text"


def _shown(default: Any) -> str:
    match default:
        case None | "" | [] | {}:
            return ""
        case dict():
            return "see below"
        case bool():
            return f"`{str(default).lower()}`"
        case float() | int():
            return f"`{default:g}`"
        case _:
            return f"`{default}`"


def _phases() -> Iterator[tuple[str, ...]]:
    yield "phase", "where a process stands then"
    yield "---", "---"
    for each in Phase:
        yield f"`{each}`", each.point.moment


def _kinds() -> Iterator[tuple[str, ...]]:
    yield "kind", "what it does", "lasts `for_s`", "parameters", "needs", "told by"
    yield ("---",) * 6
    for each in KINDS.values():
        yield (
            f"`{each.name}`",
            each.meaning,
            "yes" if each.lasts else "",
            ", ".join(
                f"`{name} = {value:g}` ({RANGES[name]})" for name, value in each.parameters.items()
            ),
            ", ".join(sorted(each.needs)),
            _told_by(each),
        )


def _told_by(kind: Kind) -> str:
    evidence = kind.evidence
    told = [f"cause `{each}`" for each in sorted(evidence.causes)]
    told += [f"event `{each}`" for each in sorted(evidence.events)]
    told += [f"`{each}`" for each in sorted(evidence.metrics)]
    told += [f"answer to `{each}`" for each in sorted(evidence.answers)]
    if evidence.silent:
        return f"nothing: {evidence.silent}"
    return ", ".join(told) + (" (if something starts then)" if evidence.at_start else "")


def _oracles() -> Iterator[tuple[str, ...]]:
    yield "oracle", "question"
    yield "---", "---"
    for each in ORACLES:
        yield each.name, each.question


def _left_out() -> Iterator[tuple[str, ...]]:
    yield "kind", "phases", "why"
    yield "---", "---", "---"
    for kind in KINDS.values():
        by_reason: dict[str, list[Phase]] = {}
        for phase in Phase:
            if why := why_not(kind, phase):
                by_reason.setdefault(why, []).append(phase)
        for why, phases in by_reason.items():
            told = "all" if len(phases) == len(Phase) else ", ".join(f"`{each}`" for each in phases)
            yield f"`{kind.name}`", told, why


if __name__ == "__main__":
    _path = Path(sys.argv[1])
    _path.write_text(filled(_path.read_text(encoding="utf-8")), encoding="utf-8")
