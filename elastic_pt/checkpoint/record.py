"""Records with checked fields, and their JSON.

A `Record` is a frozen dataclass. pydantic checks its fields strictly when a record is built or decoded.
`__post_init__` checks combinations of fields. So every record is valid.

A `StoredDocument` is a record that is a separate object in the store. Its JSON is canonical (sorted keys, no
spaces). It holds the fields, `schema`, `kind`, and `sha256`, the seal over all the rest. `decode` refuses any flipped
bit, any unknown, missing or ill-typed field, and any other schema. A `Document` is one that this version also writes.

Every error is a `CheckpointError` of one line.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Self, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from elastic_pt.errors import CheckpointError, ConfigError
from elastic_pt.store.port import CREATE_LIMIT_BYTES

DOCUMENT_BYTES_MAX = CREATE_LIMIT_BYTES
SCHEMA = 3
"""The newest schema of any document that this version reads and writes."""
_ENVELOPE = ("schema", "kind", "sha256")


class Record:
    """A frozen dataclass; its JSON object has exactly its fields. Decorate subclasses with `record`."""

    what: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The fields by name. Nested records stay records."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Decode strictly. Raises `CheckpointError` for a missing, unknown or ill-typed field."""
        try:
            decoded: Self = _adapter(cls).validate_json(text)  # type: ignore[arg-type]
        except ValidationError as error:
            raise _refusal(cls.what, error) from error
        return decoded

    def refuse(self, field: str, wanted: str) -> CheckpointError:
        """The error for a field whose value does not fit the other fields."""
        return CheckpointError(
            f"{self.what}: {field} = {shown(getattr(self, field))}, expected {wanted}"
        )


Class = TypeVar("Class", bound=Record)


@dataclass_transform(frozen_default=True)
def record(cls: type[Class]) -> type[Class]:
    """Make a subclass of `Record` a dataclass whose constructor raises `CheckpointError` for a wrong field."""
    config = ConfigDict(strict=True, extra="forbid")
    made = cast(type[Class], dataclass(frozen=True, config=config)(cls))
    build = made.__init__
    names = [field.name for field in fields(made)]  # type: ignore[arg-type]

    @functools.wraps(build)
    def init(self: Class, *values: Any, **named: Any) -> None:
        # Pass the values by name, so that pydantic's error names the field.
        named |= zip(names, values, strict=False)
        try:
            build(self, *values[len(names) :], **named)
        except ValidationError as error:
            raise _refusal(made.what, error) from error

    made.__init__ = init  # type: ignore[assignment,method-assign]
    return made


class StoredDocument(Record):
    """A record that is a separate object in the store."""

    schemas: ClassVar[tuple[int, ...]]
    """The readable schemas."""

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Decode the bytes of one of the schemas. Raises `CheckpointError` for anything else."""
        return decode(data, cls, cls)

    @classmethod
    def _upgraded(cls, schema: int, content: dict[str, Any]) -> dict[str, Any]:
        """The fields of a document of `schema`, converted to the newest schema."""
        return content


class Document(StoredDocument):
    """A document that this version writes, in the last schema of the list."""

    def to_bytes(self) -> bytes:
        """Canonical bytes: equal documents have equal bytes."""
        return sealed(self.what, self.schemas[-1], self.to_json())


One = TypeVar("One", bound=StoredDocument)
Other = TypeVar("Other", bound=StoredDocument)


def decode(data: bytes, one: type[One], other: type[Other]) -> One | Other:
    """Decode a document of one of two kinds or schemas. Raises `CheckpointError` for any other bytes."""
    tree = _tree(data, one.what)
    schema = tree.get("schema")
    kinds: tuple[type[One] | type[Other], ...] = (one, other)
    for kind in kinds:
        if tree.get("kind") == kind.what and type(schema) is int and schema in kind.schemas:
            break
    else:
        found = f"schema {shown(schema)} of {shown(tree.get('kind'))}"
        if type(schema) is int and schema > SCHEMA and _is_sealed(tree, data):
            # Not a `CheckpointError`, because that would quarantine a good checkpoint of a later version.
            raise ConfigError(
                f"{one.what}: {found} is of a later version of elastic-pt; expected that version, "
                f"or schema {SCHEMA} at most"
            )
        wanted = " or ".join(map(str, sorted({*one.schemas, *other.schemas}, reverse=True)))
        raise CheckpointError(f"{one.what}: found {found}, expected schema {wanted}")
    content = {key: value for key, value in tree.items() if key not in _ENVELOPE}
    try:
        encoded = _encoded(content)
    except ValueError as error:  # not a finite number
        raise CheckpointError(f"{kind.what}: {error}") from error
    if _sealed(kind.what, schema, encoded) != data:
        raise CheckpointError(f"{kind.what}: damaged; expected bytes that match their own SHA-256")
    upgraded = kind._upgraded(schema, content)
    changed = {key: upgraded[key] for key in upgraded if upgraded[key] is not content.get(key)}
    return kind.from_json(
        _object({key: encoded[key] for key in upgraded if key not in changed} | _encoded(changed))
    )


def _is_sealed(tree: dict[str, Any], data: bytes) -> bool:
    """Whether these are the unchanged bytes of a document of any kind and schema."""
    content = {key: value for key, value in tree.items() if key not in _ENVELOPE}
    try:
        return sealed(str(tree.get("kind")), int(tree["schema"]), content) == data
    except ValueError:
        return False


def sealed(what: str, schema: int, content: Mapping[str, Any]) -> bytes:
    """The bytes of a document: its content, schema and kind, with the SHA-256 over them."""
    return _sealed(what, schema, _encoded(content))


def _sealed(what: str, schema: int, encoded: Mapping[str, bytes]) -> bytes:
    body = {"schema": canonical(schema), "kind": canonical(what), **encoded}
    seal = hashlib.sha256(_object(body)).hexdigest()
    return _object(body | {"sha256": canonical(seal)}) + b"\n"


def _encoded(content: Mapping[str, Any]) -> dict[str, bytes]:
    # Encode each value once, for the hash and for the output: a manifest has megabytes.
    return {key: canonical(value) for key, value in content.items()}


def _object(encoded: Mapping[str, bytes]) -> bytes:
    """The canonical JSON object of values that are already encoded."""
    return b"{" + b",".join(canonical(key) + b":" + encoded[key] for key in sorted(encoded)) + b"}"


def canonical(value: object) -> bytes:
    """The canonical JSON text of a value. Raises `ValueError` for a number that is not finite."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=Record.to_json
    )
    return text.encode("ascii")


def _tree(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{what}: {len(data)} bytes that are not JSON; expected JSON"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: {shown(value)}; expected a JSON object")
    return value


@functools.cache
def _adapter(cls: type[Record]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _refusal(what: str, error: ValidationError) -> CheckpointError:
    """The first error of pydantic, in one line."""
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    value = shown(first["input"])
    match first["type"]:
        case "missing" | "missing_argument":
            return CheckpointError(f"{what}: missing field {field!r}")
        case "unexpected_keyword_argument":
            return CheckpointError(f"{what}: unknown field {shown(field)}")
        case "dataclass_type" | "dataclass_exact_type":
            return CheckpointError(f"{what}: {field or 'it'} = {value}, expected a JSON object")
        case "tuple_type":
            return CheckpointError(f"{what}: {field} = {value}, expected a JSON array")
        case "json_invalid":
            return CheckpointError(f"{what}: not JSON")
        case "string_pattern_mismatch":
            wanted = f"text like {first['ctx']['pattern']}"
        case _:
            wanted = " ".join(first["msg"].removeprefix("Input should be ").split())
    return CheckpointError(f"{what}: {shown(field)[1:-1]} = {value}, expected {wanted}")


def shown(value: object) -> str:
    """The value as an error message shows it: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
