"""A local file with a notice. It is in force as long as the file exists.

The file has lines `key: value`, or one JSON object, with the fields of `message.Message`:

    kind: preempt
    lead_s: 30

Or it is the file of Mithril, /opt/mithril/MITHRIL_SIGNAL.yml, whose lead is five minutes:

    instance_status: STATUS_PREEMPTING
    end_time: 2026-11-27T13:05:00Z

An empty file has no effect: its writer may not have finished.
"""

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import aiohttp

from elastic_pt.notices.http import json_object
from elastic_pt.notices.message import id_of, parse_message
from elastic_pt.notices.notice import Announcement, NoticeKind, SourceError, moment

_FILE_BYTES_MAX: Final = 64 * 1024
_MITHRIL: Final = {
    "STATUS_PREEMPTING": (NoticeKind.PREEMPT, "preempting"),
    "STATUS_RELOCATING": (NoticeKind.MAINTENANCE, "relocating"),
}
_MITHRIL_LEAD_S: Final = 300.0


def parse_file(text: str, what: str, node: str) -> list[Announcement]:
    """The events for a node in a file with this text. Raises `SourceError`."""
    if not text.strip():
        return []
    fields = json_object(text, what) if text.lstrip().startswith("{") else _lines(text, what)
    if "instance_status" in fields:
        return _mithril(fields, text)
    message = parse_message(fields, what)
    if message.withdrawn or message.node not in ("", node):
        return []
    return [message.announcement(id_of(text))]


def _lines(text: str, what: str) -> dict[str, object]:
    fields: dict[str, object] = {}
    for line in text.splitlines():
        content = line.strip()
        if content in ("", "---") or content.startswith("#"):
            continue
        key, colon, value = content.partition(":")
        if not colon:
            raise SourceError(f"{what}: {content[:80]!r}; expected key: value")
        fields[key.strip()] = value.strip().strip("'\"")
    return fields


def _mithril(fields: dict[str, object], text: str) -> list[Announcement]:
    status, due = str(fields["instance_status"]), str(fields.get("end_time", ""))
    if status not in _MITHRIL:
        return []
    kind, detail = _MITHRIL[status]
    return [Announcement(id_of(text), kind, detail, moment(due) if due else None, _MITHRIL_LEAD_S)]


class File:
    """One file."""

    name = "file"
    interval_s = 0.5

    def __init__(self, path: Path, node: str) -> None:
        self._path = path
        self._node = node

    async def read(self, _: aiohttp.ClientSession) -> Sequence[Announcement]:
        """The events in the file; none if it does not exist. Raises `SourceError`."""
        with suppress(FileNotFoundError):
            return parse_file(self._text(), str(self._path), self._node)
        return []

    def _text(self) -> str:
        # Opening a pipe would wait for a writer.
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SourceError(f"{self._path}: not a regular file; expected one")
            data = os.read(descriptor, _FILE_BYTES_MAX + 1)
        finally:
            os.close(descriptor)
        if len(data) > _FILE_BYTES_MAX:
            raise SourceError(
                f"{self._path}: more than {_FILE_BYTES_MAX} bytes; expected a short text"
            )
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise SourceError(f"{self._path}: not UTF-8; expected text") from error
