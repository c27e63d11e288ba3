"""Up to which step a checkpoint is exact: the steps at which its run changed to another platform.

A run stays on one platform (`identity`) until an operator reopens it for another one. The next generation resumes
from a committed checkpoint, and its platform counts from that step on. A later generation that resumes from an
earlier checkpoint cancels that change: the steps are done again, on its own platform.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from elastic_pt.errors import NotFound
from elastic_pt.runlog.identity import differing_names, platform_in, read_identity
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import Generation, Kind, Record, Reopen
from elastic_pt.store.port import Store


@dataclass(frozen=True)
class PlatformChange:
    """A run continued on another platform."""

    step: int
    """Steps done before the change, on earlier platforms."""
    differs: tuple[str, ...]
    """Each name that decides the bits and differs, with its value before and after."""
    why: str
    """The operator's reason."""

    def __str__(self) -> str:
        return f"another platform: {', '.join(self.differs)} (reopened: {self.why})"


def read_platform_changes(
    store: Store, log: RunLog, generation: int, step: int
) -> list[PlatformChange]:
    """The changes before the checkpoint of `step` that `generation` wrote; empty if that is exact."""
    head = log.refresh().head
    if head is None:
        return []
    reopened = [
        each
        for each in log.chain(head, Kind.REOPEN)
        if isinstance(each.body, Reopen) and each.body.platform
    ]
    if not reopened:
        return []
    try:
        first = platform_in(read_identity(store))
    except NotFound:
        first = {}
    records = chain(reopened, log.chain(head, Kind.GENERATION))
    changes = platform_changes(sorted(records, key=lambda each: each.index), first, generation)
    return [change for change in changes if change.step < step]


def platform_changes(
    records: Iterable[Record], first: Mapping[str, str], generation: int
) -> list[PlatformChange]:
    """The changes in GENERATION and REOPEN records, in the log's order, up to `generation`. Pure.

    `first` is the platform of the run's first node.
    """
    spans: list[tuple[int, Mapping[str, str], PlatformChange | None]] = [(0, first, None)]
    why = ""
    for record in records:
        body = record.body
        if isinstance(body, Reopen):
            why = body.why
        if not isinstance(body, Generation) or body.number > generation or not body.platform:
            continue
        step = body.resume_step
        spans = [span for span in spans if span[0] < step]
        before = spans[-1][1] if spans else {}
        names = differing_names(before, body.platform)
        if names:
            values = (f"{x} = {body.platform.get(x)!r} after {before[x]!r}" for x in names)
            spans.append((step, body.platform, PlatformChange(step, tuple(values), why)))
        elif spans:
            # It may record more names of the same platform.
            spans[-1] = (spans[-1][0], body.platform, spans[-1][2])
        else:
            spans.append((step, body.platform, None))
    return [change for _, _, change in spans if change is not None]
