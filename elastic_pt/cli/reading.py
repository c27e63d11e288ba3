"""Commands that read a run from its URL: `status`, `log`, `checkpoints`. None of them needs torch to start."""

import dataclasses
import datetime
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from elastic_pt.cli.options import (
    AsJson,
    AsJsonLines,
    AsJsonList,
    RunUrl,
    absolute_url,
    print_json,
)
from elastic_pt.cli.terminal_text import duration
from elastic_pt.errors import CheckpointError, ConfigError

_VERIFY_TRIES = 3
"""A run may remove all checkpoints while they are verified; then the newer ones are verified."""

if TYPE_CHECKING:
    from elastic_pt.report.checkpoints import CheckpointReport
    from elastic_pt.report.status import MemberReport, Run, RunStatus
    from elastic_pt.runlog.records import Record


def status(
    run_url: RunUrl,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", "-w", help="Show it again and again until the run has ended or Ctrl-C."
        ),
    ] = False,
    interval_s: Annotated[
        float,
        typer.Option(
            "--interval",
            metavar="SECONDS",
            min=0.5,
            max=3600.0,
            help="With --watch: seconds between two looks at the run.",
        ),
    ] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Show a run's state: live from its agents if one answers, else from its log.

    The state is new, running, paused (fewer nodes than elastic.nodes_min),
    down (no agent answers, not finished), completed or failed. With --watch
    it is a live view with progress, loss, speed, nodes and recent events.

    Examples:
    elastic-pt status runs/first
    elastic-pt status runs/first --watch
    elastic-pt status s3://bucket/run --json
    """
    if watch and as_json:
        raise ConfigError("--watch --json: expected one of the two; a script can call --json again")
    # The HTTP client is slow to import.
    if watch:
        from elastic_pt.cli.live import watch_status

        watch_status(absolute_url(run_url, "RUN_URL"), interval_s)
        return
    from elastic_pt.report.status import open_run, read_status

    found = read_status(open_run(absolute_url(run_url, "RUN_URL")))
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    for line in status_lines(found):
        typer.echo(line)


def status_lines(status: "RunStatus") -> list[str]:
    """A run's status for people."""
    steps = "" if status.steps is None else f" of {status.steps}"
    loss = "" if status.loss is None else f", loss {status.loss:.4f}"
    lines = [
        f"run         {status.url}",
        f"state       {status.state}"
        + (f" ({status.reason})" if status.reason not in ("", status.state) else ""),
        f"step        {status.step}{steps}{loss}",
        f"generation  {status.generation}, world size {status.world_size}",
    ]
    if status.state == "running" and status.step:
        risk = status.at_risk_steps
        lines.append(f"at risk     {risk.any_node} steps with any node, {risk.all} with all")
    if status.commit is not None:
        lines.append(f"commit      step {status.commit.step}, {duration(status.commit.age_s)} ago")
    if status.ignored_spans:
        lines.append(f"data        damaged spans left out: {status.ignored_spans}")
    lines += [_member_line("member", member) for member in status.members]
    lines += [_member_line("waits", member) for member in status.waiting]
    return lines


def _member_line(title: str, member: "MemberReport") -> str:
    phase = f"rests: {member.resting}" if member.resting else member.phase
    phase += f", leaves: {member.leaving}" if member.leaving else ""
    line = (
        f"{title:<11} {member.node}: {phase}, pid {member.pid} at {member.address}:{member.port}, "
        f"{member.workers} workers, {member.slots} slots"
    )
    line += f", zone {member.zone}" if member.zone else ""
    if member.slots:
        line += f", copy on {', '.join(member.mirrors)}" if member.mirrors else ", no copy"
    return line + (f", {member.metrics_url}" if member.metrics_url else "")


def log(
    run_url: RunUrl,
    explanations: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Explain why each generation began, and how long each phase of its recovery took.",
        ),
    ] = False,
    perfetto: Annotated[
        Path | None,
        typer.Option(
            "--perfetto",
            metavar="FILE",
            help="With --explain: write a trace that ui.perfetto.dev opens.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJsonLines = False,
) -> None:
    """Print the run's log, one line per record, and check its hash chain.

    A record that was altered, moved or removed is an error with exit code 4.
    With --explain it prints each change of the members instead: which nodes were
    lost, failed, left or joined, how long it took to detect that and to agree,
    and each phase up to the first step. docs/recovery.md explains the output.
    With --perfetto too it draws them on a time axis, a track per node.

    Examples:
    elastic-pt log runs/first
    elastic-pt log runs/first --explain
    elastic-pt log runs/first --explain --perfetto trace.json
    elastic-pt log s3://bucket/run --json | jq .kind
    """
    # As above.
    from elastic_pt.report.change import as_json as explanation_as_json
    from elastic_pt.report.explanation import explain
    from elastic_pt.report.status import describe, open_run, record_as_json, records

    if perfetto is not None and not explanations:
        raise ConfigError(f"--perfetto {perfetto}: draws explanations; expected --explain too")
    run = open_run(absolute_url(run_url, "RUN_URL"))
    found: Iterable[Record] = records(run)
    if perfetto is not None:
        found = list(found)
        _write_trace(run, found, perfetto)
    if not explanations:
        for record in found:
            typer.echo(json.dumps(record_as_json(record)) if as_json else describe(record))
        return
    explained = explain(found)
    for each in explained:
        if as_json:
            typer.echo(json.dumps(explanation_as_json(each)))
        else:
            _print_paragraph(str(each))
    if not explained and not as_json:
        typer.echo("nothing to explain: the members have not changed yet")


def _write_trace(run: "Run", found: "list[Record]", path: Path) -> None:
    """Write the trace, and say so on standard error: standard output may be JSON."""
    from elastic_pt.report.history import read_batches
    from elastic_pt.report.perfetto import steps_per_slice, trace_events

    per_slice = steps_per_slice(found)
    lines = (line for batch in read_batches(run.store, found) for line in batch.lines)
    try:
        with path.open("w") as file:
            separator = '{"displayTimeUnit": "ms", "traceEvents": [\n'
            for event in trace_events(found, lines, per_slice):
                file.write(separator + json.dumps(event))
                separator = ",\n"
            file.write("\n]}\n")
    except OSError as error:
        raise ConfigError(
            f"--perfetto {path}: {error.strerror or error}; expected a file that this user may write"
        ) from error
    thinned = f", {per_slice} steps a slice" if per_slice > 1 else ""
    typer.echo(f"trace: {path}, for https://ui.perfetto.dev{thinned}", err=True)


def _print_paragraph(text: str) -> None:
    """Print with a bold heading, up to the first colon. Into a file or a pipe it is one line."""
    console = Console(highlight=False)
    paragraph = Text(text)
    paragraph.stylize("bold", 0, text.index(":"))
    console.print(paragraph, soft_wrap=not console.is_terminal)


def checkpoints(
    run_url: RunUrl,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read every byte; exit code 4 if anything is wrong that is not quarantined already.",
        ),
    ] = False,
    subset: Annotated[
        str,
        typer.Option(
            "--subset",
            metavar="SHARE%",
            help="With --verify: read random blocks that make up this share of each checkpoint.",
        ),
    ] = "100%",
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            help="Choose the blocks of --subset by this number; by default each call reads other blocks.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJsonList = False,
) -> None:
    """List the committed checkpoints that are kept, newest first.

    A permanent one is never removed (checkpoint.keep_every_steps). With --subset,
    --verify checks all records, the size of every file and some of the blocks, so
    repeated calls find damage without reading everything each time. A checkpoint
    that the run removes during the check is not listed.

    Examples:
    elastic-pt checkpoints runs/first
    elastic-pt checkpoints s3://bucket/run --verify --json
    elastic-pt checkpoints s3://bucket/run --verify --subset 10%
    """
    # As above. To verify needs torch, to list does not.
    from elastic_pt.report.checkpoints import read_checkpoints
    from elastic_pt.report.status import open_run

    share = _share_of(subset)
    if not verify and (share < 1.0 or seed is not None):
        raise ConfigError("--subset and --seed choose what is verified; expected --verify too")
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
    run = open_run(absolute_url(run_url, "RUN_URL"))
    for _ in range(_VERIFY_TRIES):
        reports = read_checkpoints(run)
        entries = _checkpoint_entries(run, reports)
        if verify:
            entries = verified_entries(run, reports, entries, share, seed)
        if entries or not reports:
            break
    if as_json:
        print_json(entries)
    elif not entries:
        removed = f"newer commits have removed all {len(reports)} checkpoints during the check"
        typer.echo(removed if reports else "no checkpoint is committed yet")
    for entry in () if as_json else entries:
        typer.echo(checkpoint_line(entry))
        for problem in entry.get("problems", ()):
            typer.echo(f"    {problem}")
    if verify and share < 1.0 and entries and not as_json:
        typer.echo(f"repeat the choice of blocks with --seed {seed}")
    # A quarantined permanent checkpoint is never removed: it must not hide new damage from a daily job.
    if any(entry.get("problems") and not entry["quarantine"] for entry in entries):
        raise typer.Exit(CheckpointError.exit_code)


def _share_of(subset: str) -> float:
    found = re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?)%", subset.strip())
    share = float(found[1]) / 100 if found else 0.0
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"--subset {subset!r}: expected more than 0% and at most 100%, as in 10%")
    return share


def _checkpoint_entries(run: "Run", reports: "list[CheckpointReport]") -> list[dict[str, Any]]:
    """One entry per checkpoint, with the keys of the JSON."""
    from elastic_pt.report.checkpoints import checkpoint_bytes

    now = datetime.datetime.now(datetime.UTC)
    sizes = checkpoint_bytes(run, [report.checkpoint for report in reports])
    return [
        {
            "step": report.checkpoint.step,
            "generation": report.checkpoint.generation,
            "directory": report.checkpoint.directory,
            "age_s": report.age_s(now),
            "bytes": size,
            "permanent": report.checkpoint.permanent,
            "tiers": list(report.tiers),
            "manifest_bytes": report.checkpoint.manifest_size,
            "manifest_sha256": report.checkpoint.manifest_sha256,
            "loss": report.checkpoint.loss,
            "quarantine": report.quarantine or None,
        }
        for report, size in zip(reports, sizes, strict=True)
    ]


def verified_entries(
    run: "Run",
    reports: "list[CheckpointReport]",
    entries: list[dict[str, Any]],
    share: float,
    seed: int,
) -> list[dict[str, Any]]:
    """The entries with the problems of each, without those that a commit has removed during the check."""
    from elastic_pt.report.artifacts import verified
    from elastic_pt.report.checkpoints import read_checkpoints

    for report, entry in zip(reports, entries, strict=True):
        found = verified(run, report.checkpoint, share, seed)
        entry["problems"] = list(found.problems)
        entry["verified_share"] = round(found.share, 6)
        entry["seed"] = seed if share < 1.0 else None
    kept = {report.checkpoint.directory for report in read_checkpoints(run)}
    return [entry for entry in entries if entry["directory"] in kept]


def checkpoint_line(entry: dict[str, Any]) -> str:
    """The line of a checkpoint for people, from its JSON entry."""
    loss = "" if entry["loss"] is None else f"  loss {entry['loss']:.4f}"
    size = "size unknown" if entry["bytes"] is None else _size_text(entry["bytes"])
    permanent = "  permanent" if entry["permanent"] else ""
    verdict = ""
    if "problems" in entry:
        verified = f"  verified {100 * entry['verified_share']:.4g}%"
        verdict = "  UNUSABLE" if entry["problems"] else verified
    held = f"  quarantined: {entry['quarantine']}" if entry["quarantine"] else ""
    return (
        f"step {entry['step']}{loss}  {_age_text(entry['age_s'])} ago  {size}  "
        f"{', '.join(entry['tiers'])}{permanent}  {entry['directory']}{verdict}{held}"
    )


def _size_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _age_text(age_s: float) -> str:
    if age_s < 120:
        return f"{age_s:.0f} s"
    if age_s < 7200:
        return f"{age_s / 60:.0f} min"
    return f"{age_s / 3600:.0f} h" if age_s < 172_800 else f"{age_s / 86_400:.0f} days"
