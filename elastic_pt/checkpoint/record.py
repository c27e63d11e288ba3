"""Records that check themselves, as strict JSON.

A `Record` is a frozen dataclass whose JSON object has exactly its fields; a `Document` is a record that
is an object of its own in the store. Decoding refuses what encoding would not have written: other
fields, other types, another schema, and (for documents, by their seal) any flipped bit.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Self, TypeVar

from elastic_pt.errors import CheckpointError
from elastic_pt.store.port import CREATE_LIMIT_BYTES

DOCUMENT_BYTES_MAX = CREATE_LIMIT_BYTES
COUNT_MAX = 1 << 53
TEXT_LENGTH_MAX = 512


class Record:
    """A frozen dataclass whose JSON object has exactly its fields."""

    what: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return {name: _plain(getattr(self, name)) for name in names}

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Decode strictly: a missing, unknown or ill-typed field is a `CheckpointError`."""
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        return cls(**cls._decoded(_exactly(cls.what, value, names)))

    @classmethod
    def _decoded(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values

    def _whole(self, field: str, low: int, high: int = COUNT_MAX) -> None:
        value = getattr(self, field)
        if type(value) is not int or not low <= value <= high:
            self._refuse(field, f"a whole number from {low} to {high}")

    def _text(self, field: str, pattern: re.Pattern[str]) -> None:
        value = getattr(self, field)
        fits = isinstance(value, str) and len(value) <= TEXT_LENGTH_MAX
        if not fits or not pattern.fullmatch(value) or ".." in value:
            self._refuse(field, f"text like {pattern.pattern}")

    def _refuse(self, field: str, wanted: str) -> None:
        value = shown(getattr(self, field))
        raise CheckpointError(f"{self.what}: {field} = {value}: {wanted} would be right")


class Document(Record):
    """A record that is an object of its own in the store: canonical JSON with a schema version."""

    schema: ClassVar[int]

    def to_bytes(self) -> bytes:
        """Canonical bytes: equal records have equal bytes, and any changed bit is noticed by `from_bytes`."""
        body = {"schema": self.schema, "kind": self.what} | self.to_json()
        # Each value is encoded once: the seal of a large document is not worth a second time.
        encoded = {key: canonical(value) for key, value in body.items()}
        seal = hashlib.sha256(_object(encoded)).hexdigest()
        return _object(encoded | {"sha256": canonical(seal)}) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Decode what `to_bytes` wrote. Raises `CheckpointError` for anything else, one flipped bit included."""
        return cls._from_tree(_tree(data, cls.what), data)

    @classmethod
    def _from_tree(cls, value: dict[str, Any], data: bytes) -> Self:
        if value.get("schema") != cls.schema or value.get("kind") != cls.what:
            found = f"schema {shown(value.get('schema'))} of {shown(value.get('kind'))}"
            raise CheckpointError(f"{cls.what}: found {found}; expected schema {cls.schema}")
        ours = {key: value[key] for key in value if key not in ("schema", "kind", "sha256")}
        record = cls.from_json(ours)
        if record.to_bytes() != data:
            raise CheckpointError(f"{cls.what}: the bytes do not match their own SHA-256")
        return record


One = TypeVar("One", bound=Document)
Other = TypeVar("Other", bound=Document)


def either(one: type[One], other: type[Other], data: bytes) -> One | Other:
    """Decode a document that is of one of two schemas or kinds. Raises `CheckpointError` as `from_bytes` does."""
    value = _tree(data, one.what)
    if (value.get("schema"), value.get("kind")) == (other.schema, other.what):
        return other._from_tree(value, data)
    return one._from_tree(value, data)


def _tree(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: not JSON ({len(data)} bytes)") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: not a JSON object")
    return value


def _plain(value: object) -> object:
    # Not `asdict`, which copies every number of a large manifest one by one.
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, tuple) and value and isinstance(value[0], Record):
        return [record.to_json() for record in value]
    return value


def _exactly(what: str, value: object, names: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: {shown(value)} is not a JSON object")
    for problem, wrong in (("missing", names - value.keys()), ("unknown", value.keys() - names)):
        if wrong:
            raise CheckpointError(f"{what}: {problem} field {', '.join(map(shown, sorted(wrong)))}")
    return dict(value)


def as_tuple(value: object) -> tuple[Any, ...]:
    """A JSON array as a tuple; `CheckpointError` for anything else."""
    if not isinstance(value, list | tuple):
        raise CheckpointError(f"{shown(value)} is not a JSON array")
    return tuple(value)


def all_whole(values: object, low: int, high: int) -> bool:
    """Whether this is a tuple of whole numbers from `low` to `high`."""
    if not isinstance(values, tuple) or not set(map(type, values)) <= {int}:
        return False
    return not values or low <= min(values) <= max(values) <= high


def _object(encoded: Mapping[str, bytes]) -> bytes:
    """The canonical JSON object of values that are encoded already."""
    return b"{" + b",".join(canonical(key) + b":" + encoded[key] for key in sorted(encoded)) + b"}"


def canonical(value: object) -> bytes:
    """The one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def shown(value: object) -> str:
    """The value as an error message shows it: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
