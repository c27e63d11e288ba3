"""The sources of prepared data, and how much a run reads of each: rows, epochs, the realised mixture."""

from dataclasses import dataclass

from elastic_pt.report.reads import Reads


@dataclass(frozen=True)
class ReadUpTo:
    """What is read of a source in the first steps."""

    step: int
    rows: int
    share: float | None
    """Of all rows that are read; null before the first step."""
    epochs: float


@dataclass(frozen=True)
class SourceReads:
    """A source, and how much of it is read."""

    name: str
    weight: float
    documents: int
    tokens: int
    rows: int
    held_out_documents: int
    held_out_tokens: int
    read: tuple[ReadUpTo, ...]
    """Up to the present step, and up to a later one."""


def sources_of(reads: Reads, until: int) -> list[SourceReads]:
    """Each source, with what is read of it up to the run's present step and up to step `until`."""
    plan = reads.plan
    moments = [(step, plan.rows_read(step)) for step in dict.fromkeys((reads.step, until))]
    return [
        SourceReads(
            name=source.name,
            weight=source.weight,
            documents=source.documents,
            tokens=source.tokens("train"),
            rows=plan.rows_per_source[number],
            held_out_documents=source.held_out_documents,
            held_out_tokens=source.tokens("held_out"),
            read=tuple(
                ReadUpTo(
                    step,
                    int(rows[number]),
                    int(rows[number]) / int(rows.sum()) if step else None,
                    int(rows[number]) / plan.rows_per_source[number],
                )
                for step, rows in moments
            ),
        )
        for number, source in enumerate(reads.manifest.sources)
    ]


@dataclass(frozen=True)
class IgnoredRows:
    """Tokens that the run leaves out, because their blocks are damaged."""

    source: str
    tokens: tuple[int, int]
    """The first one's place in the stream, and the place after the last one."""
    file: str
    rows: tuple[int, int] | None
    """The first and the last row that have some of them; None if they are in no whole row."""
    first_step: int
    """The first step without them."""


def ignored_rows(reads: Reads) -> list[IgnoredRows]:
    """What the run leaves out, with its rows."""
    numbers = {source.name: number for number, source in enumerate(reads.manifest.sources)}
    found = []
    for each in reads.ignored:
        span = each.span
        rows = reads.rows_holding(numbers[span.source], "train", range(*span.tokens))
        of_rows = (rows[0], rows[-1]) if rows else None
        found.append(IgnoredRows(span.source, span.tokens, span.file, of_rows, each.first_step))
    return found
