"""Count and list what `prepare` leaves out, and refuse a source that loses too many files.

    left-out.jsonl     {"source": …, "file": …, "reason": …, "documents": n}, one line per file and reason;
                       without `documents` where the whole file was left out by its name

A file counts as lost if all of it was left out, or if more of its documents were left out than kept. Empty and
duplicate documents do not count, and a hidden or empty file that was left out does not count either.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from elastic_pt.data.sources import Skip, SourceFiles
from elastic_pt.errors import DataError

LEFT_OUT_KEY = "left-out.jsonl"
EXAMPLES = 3

DUPLICATE = "duplicate"
_LOSES_NOTHING = frozenset({"empty", DUPLICATE})


@dataclass
class SourceLosses:
    """What one source has lost so far. Its size grows with the files, not with the documents."""

    source: SourceFiles
    documents: Counter[Skip] = field(default_factory=Counter)
    """Documents left out, by file and reason."""
    _kept: Counter[str] = field(default_factory=Counter)

    def skip(self, item: Skip) -> None:
        """Count a document that was left out."""
        self.documents[item] += 1

    def keep(self, url: str) -> None:
        """Count a usable document of this file."""
        self._kept[url] += 1

    def drop(self, item: Skip) -> None:
        """Count a document as left out that was counted as kept before."""
        self._kept[item.url] -= 1
        self.skip(item)

    def check(self, share_max: float) -> None:
        """Raise `DataError` if more than this share of the source's files is lost."""
        lost = {item.url: item.reason for item in self.source.left_out}
        lost_documents: Counter[str] = Counter()
        for item, count in self.documents.items():
            if item.reason not in _LOSES_NOTHING:
                lost_documents[item.url] += count
                if lost_documents[item.url] > self._kept[item.url]:
                    lost[item.url] = item.reason
        lost = {url: why for url, why in lost.items() if url not in self.source.incidental}
        # Several paths may name the same file.
        files = len({file.url for file in self.source.files} | set(lost))
        number = len(lost)
        if number <= share_max * files:
            return
        examples = ", ".join(f"{url} ({lost[url]})" for url in sorted(lost)[:EXAMPLES])
        more = f" and {len(lost) - EXAMPLES} more" if len(lost) > EXAMPLES else ""
        raise DataError(
            f"source {self.source.spec.name}: {number} of {files} files are left out: {examples}{more}; "
            f"expected at most a share of {share_max:g}, or --allow-left-out {_above(number / files)}"
        )

    def lines(self) -> Iterator[str]:
        """The lines of `left-out.jsonl`, in the order of the files."""
        name = self.source.spec.name
        for item in self.source.left_out:
            yield json.dumps({"source": name, "file": item.url, "reason": item.reason})
        for item, count in sorted(
            self.documents.items(), key=lambda each: (each[0].url, each[0].reason)
        ):
            yield json.dumps(
                {"source": name, "file": item.url, "reason": item.reason, "documents": count}
            )


def count_by_reason(losses: Sequence[SourceLosses]) -> dict[str, int]:
    """Documents and whole files that were left out, by reason."""
    counts: Counter[str] = Counter()
    for each in losses:
        counts.update(item.reason for item in each.source.left_out)
        for item, count in each.documents.items():
            counts[item.reason] += count
    return dict(sorted(counts.items()))


def _above(share: float) -> float:
    """The share rounded up to two digits, so that the printed value works as the argument."""
    return min(1.0, int(share * 100 + 1) / 100)
