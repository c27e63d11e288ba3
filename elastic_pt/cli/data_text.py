"""What the command `data` prints for people."""

import unicodedata
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from elastic_pt.report.damage import Problem
    from elastic_pt.report.mixture import IgnoredRows, ReadUpTo, SourceReads
    from elastic_pt.report.reads import Reads
    from elastic_pt.report.rows import ReadRow, ShownRow
    from elastic_pt.report.search import Found

_BORDER: Final = "│"
_JOINERS: Final = ("\u200c", "\u200d")
"""They join the characters of an emoji or a script, and nothing else."""
READINGS_SHOWN: Final = 10
"""Of a document, up to the present step and after it, besides the first one."""


def overview_lines(reads: "Reads", until: int, sources: "list[SourceReads]") -> list[str]:
    """The overview for people."""
    manifest = reads.manifest
    blocks = f"blocks of {manifest.block_tokens:,} tokens" if manifest.block_tokens else "no blocks"
    lines = [
        f"data         {reads.store.url}, schema {manifest.schema}, {blocks}",
        f"fingerprint  {manifest.fingerprint}",
        f"vocabulary   {manifest.vocab_size:,} tokens; a document ends with {manifest.end_token}",
        plan_line(reads),
        f"open         {reads.plan.open_tokens(reads.config.train.slots):,} tokens are read together by all slots",
        f"steps        {reads.step:,} done, told up to {until:,}",
        f"sources      {len(sources):,}: {sum(each.documents for each in sources):,} documents, "
        f"{manifest.tokens('train'):,} tokens; {sum(each.held_out_documents for each in sources):,} documents, "
        f"{manifest.tokens('held_out'):,} tokens held out",
    ]
    for each in sources:
        lines.append(
            f"source       {each.name}: weight {each.weight:.4g}; {each.documents:,} documents, {each.tokens:,} tokens, "
            f"{each.rows:,} rows; {each.held_out_documents:,} documents, {each.held_out_tokens:,} tokens held out"
        )
        lines += [f"  {_read_text(read)}" for read in each.read if read.step]
    return lines


def plan_line(reads: "Reads") -> str:
    """Whose plan it is."""
    batch, length = reads.config.train.global_batch, reads.config.data.sequence_length
    whose = "a new run" if reads.run_url is None else reads.run_url
    return (
        f"plan         of {whose}: {batch:,} rows of {length:,} tokens per step "
        f"({batch * length:,} tokens), order version {reads.order_version}"
    )


def _read_text(read: "ReadUpTo") -> str:
    share = "" if read.share is None else f" ({read.share:.4g} of all)"
    return f"up to step {read.step:,}: {read.rows:,} rows read{share}, {read.epochs:.4g} epochs"


def row_lines(row: "ShownRow") -> list[str]:
    """A row for people."""
    text = _BORDER.join(_token_text(piece.text) for piece in row.pieces)
    return [
        f"row          {row.source}:{row.row}, tokens {row.tokens[0]:,} to {row.tokens[1] - 1:,} of the source",
        *(f"file         {file}" for file in row.files),
        f"{_BORDER}{text}{_BORDER}",
    ]


def _token_text(text: str) -> str:
    if not text or text in _JOINERS:
        return ascii(text)[1:-1]
    # A mark would be drawn on the border before it.
    return "◌" * unicodedata.category(text[0]).startswith("M") + printable(text)


def printable(text: str) -> str:
    """A text whose characters do not steer a terminal; it keeps its lines."""
    return "".join(
        each if each.isprintable() or each == "\n" or each in _JOINERS else ascii(each)[1:-1]
        for each in text
    )


def step_lines(rows: "list[ReadRow]") -> list[str]:
    """The documents of a step for people: a line each."""
    lines = []
    for row in rows:
        for part in row.documents:
            begin = "" if part.begins else "…"
            lines.append(f"slot {row.slot}  {row.source}:{row.row}  {begin}{printable(part.text)}")
    return lines


def found_lines(found: "Found", step: int, until: int) -> list[str]:
    """A document that was found, for people: where it is, and when it was and will be read."""
    part = "document" if found.whole else "part of document"
    number = "of unknown number" if found.document is None else found.document
    where = f"{found.source} {part} {number}, {found.split.replace('_', '-')}"
    where += f" tokens {found.tokens[0]:,} to {found.tokens[1] - 1:,}"
    lines = [f"{where}: {printable(found.text)}"]
    if found.sha256 is not None:
        lines.append(f"  sha256 {found.sha256}")
    if found.split == "held_out":
        return [*lines, "  held out: no step trains on it"]
    if found.rows is None:
        return [*lines, "  in no whole row: no step reads it"]
    first, last = found.rows
    rows = f"row {found.source}:{first}" + (f" to {found.source}:{last}" if last > first else "")
    lines.append(
        f"  {rows}: read {found.read:,} times up to step {step:,}, {found.read_until:,} times up to step {until:,}"
    )
    earliest = found.readings[:1]
    past = [each for each in found.readings[1:] if each.step <= step][-READINGS_SHOWN:]
    coming = [each for each in found.readings[1:] if each.step > step][:READINGS_SHOWN]
    for which, some in (("first", earliest), ("past", past), ("next", coming)):
        lines += [
            f"    {which}: row {each.row} {'was' if each.step <= step else 'will be'} read "
            f"at step {each.step:,}, slot {each.slot}, epoch {each.epoch}"
            for each in some
        ]
    if more := found.read_until - len(earliest) - len(past) - len(coming):
        lines.append(f"    and {more:,} times more; --json lists more of them")
    return lines


def problem_line(problem: "Problem") -> str:
    """What `--verify` has found, for people."""
    block = "" if problem.block is None else f" block {problem.block}:"
    if problem.block is not None and problem.blocks > 1:
        block = f" blocks {problem.block} to {problem.block + problem.blocks - 1}:"
    rows = ""
    if problem.rows is not None:
        first, last = problem.rows
        rows = f"; in rows {problem.source}:{first} to {problem.source}:{last}"
    return f"{problem.file}:{block} {problem.problem}{rows}"


def ignored_line(ignored: "IgnoredRows") -> str:
    """Damaged tokens that the run leaves out, for people."""
    start, end = ignored.tokens
    rows = "in no whole row"
    if ignored.rows is not None:
        rows = f"in rows {ignored.source}:{ignored.rows[0]} to {ignored.source}:{ignored.rows[1]}"
    return (
        f"left out     {ignored.source} tokens {start:,} to {end - 1:,} from step {ignored.first_step:,} on: "
        f"damaged in {ignored.file}; {rows}"
    )
