"""What is wrong in a TOML file, told to whoever wrote it: field, value, and what is expected. Pure.

pydantic's errors + the model that they are about ─► one line
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError

_Location = tuple[int | str, ...]

_SHOULD: Final = re.compile(r"^\w+ should (?:be |have |)")
_OTHER_WORDS: Final = {
    "a valid dictionary": "a table",
    "a valid mapping": "a table",
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid string": "text",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
}
"""What pydantic says about types, and what the writer of a TOML file knows them by."""


def mistakes_in(error: ValidationError, model: type[BaseModel], under: str = "") -> str:
    """All mistakes in one line. `model` was to be made, from a table at the path `under` (`config.`, empty: the file)."""
    return "; ".join(_mistake(each, model, under) for each in error.errors())


def _mistake(mistake: Mapping[str, Any], model: type[BaseModel], under: str) -> str:
    location: _Location = mistake["loc"]
    # Lists are counted from 1.
    field = under + ".".join(str(part + 1 if isinstance(part, int) else part) for part in location)
    shown = f"{field} = {mistake['input']!r}"
    match mistake["type"]:
        case "extra_forbidden":
            return f"{shown}: unknown key; expected {_known_keys(model, location)}"
        case "missing":
            return f"{field}: missing; expected {_wanted(model, location)}"
        case "value_error" if not isinstance(mistake["input"], dict):
            return f"{shown}: {mistake['ctx']['error']}"
        case "value_error" if any(isinstance(part, int) for part in location):
            # A rule over several keys names them itself, but does not know which table of a list it is.
            return f"{field}.{mistake['ctx']['error']}"
        case "value_error":
            return f"{under}{mistake['ctx']['error']}"
        case "string_pattern_mismatch":
            return f"{shown}: expected {_sentence(model, location)}"
        case _:
            return f"{shown}: {_expectation(mistake['msg'])}"


def _expectation(message: str) -> str:
    """A message of pydantic in the wording of this project."""
    for said, meant in _OTHER_WORDS.items():
        if said in message:
            return f"expected {meant}"
    return _SHOULD.sub("expected ", message)


def _known_keys(model: type[BaseModel], location: _Location) -> str:
    fields = _table(model, location[:-1]).model_fields
    return near_or_all(str(location[-1]), list(fields))


def near_or_all(given: str, known: Sequence[str]) -> str:
    """The names that are close to a wrong one, as a clause; all if none is."""
    near = get_close_matches(given, known)
    return " or ".join(near) if near else f"one of {', '.join(known)}"


def _wanted(model: type[BaseModel], location: _Location) -> str:
    table = _table(model, location)
    if table is not _table(model, location[:-1]):
        required = [key for key, leaf in table.model_fields.items() if leaf.is_required()]
        if required:
            return f"a [{location[-1]}] table with {', '.join(required)}"
    return _sentence(model, location)


def _sentence(model: type[BaseModel], location: _Location) -> str:
    """What the description of a field says first."""
    names = [part for part in location if isinstance(part, str)]
    field = _table(model, location[:-1]).model_fields[names[-1]]
    sentence = (field.description or "A value").partition(". ")[0]
    return f"{sentence[0].lower()}{sentence[1:].rstrip('.')}"


def _table(model: type[BaseModel], location: _Location) -> type[BaseModel]:
    """The model of the innermost table on the way to a field."""
    for part in location:
        field = model.model_fields.get(str(part))
        model = (None if field is None else _model_in(field.annotation)) or model
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model of a table, or of the tables of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(each) for each in get_args(annotation))
    return next((each for each in found if each is not None), None)
