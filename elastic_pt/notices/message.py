"""The message of an operator's own tool: the format of the notice file and of the webhook's body."""

import datetime
import hashlib
from collections.abc import Mapping
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from elastic_pt.notices.notice import Announcement, NoticeKind, SourceError

_NAME_CHARACTERS_MAX: Final = 200


class Message(BaseModel):
    """One event. All fields are optional: the default is a preemption with the lead `elastic.leave_timeout_s`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: NoticeKind = NoticeKind.PREEMPT
    event_id: Annotated[str, Field(max_length=_NAME_CHARACTERS_MAX)] = ""
    lead_s: Annotated[float, Field(ge=0.0, le=1e6)] | None = None
    """Seconds until the machine is taken away."""
    deadline: datetime.datetime | None = None
    """When the machine is taken away. Without a zone it is UTC."""
    node: Annotated[str, Field(max_length=_NAME_CHARACTERS_MAX)] = ""
    """The node that the event concerns; empty means this node."""
    withdrawn: bool = False
    """The event of this id is cancelled."""

    def announcement(self, event_id: str) -> Announcement:
        """The event as an announcement; `event_id` is used if the message has none."""
        due = self.deadline
        if due is not None and due.tzinfo is None:
            due = due.replace(tzinfo=datetime.UTC)
        return Announcement(self.event_id or event_id, self.kind, self.kind, due, self.lead_s)


def parse_message(fields: Mapping[str, object], what: str) -> Message:
    """The fields of a message. Raises `SourceError` with the first field that is wrong."""
    try:
        return Message.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            expected = f"one of {', '.join(Message.model_fields)}"
        else:
            expected = first["msg"].removeprefix("Input should be ")
        raise SourceError(
            f"{what}: {field} = {str(first['input'])[:80]!r}; expected {expected}"
        ) from error


def id_of(text: str | bytes) -> str:
    """An id for an event without one: a hash of its text."""
    data = text.encode() if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()[:16]
