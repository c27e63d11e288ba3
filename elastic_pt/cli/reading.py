"""Commands that read a run from its URL: `status`, `log`, `checkpoints`. None of them needs torch to start."""

import dataclasses
import json
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

if TYPE_CHECKING:
    from elastic_pt.report.status import MemberReport, RunStatus


def status(run_url: RunUrl, as_json: AsJson = False) -> None:
    """Show a run's state: live from its agents if one answers, else from its log.

    The state is new, running, paused (fewer nodes than elastic.nodes_min),
    down (no agent answers, not finished), completed or failed.

    Examples:
    elastic-pt status runs/first
    elastic-pt status s3://bucket/run --json
    """
    # The HTTP client is slow to import.
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
        lines.append(f"commit      step {status.commit.step}, {status.commit.age_s:.1f} s ago")
    lines += [_member_line("member", member) for member in status.members]
    lines += [_member_line("waits", member) for member in status.waiting]
    return lines


def _member_line(title: str, member: "MemberReport") -> str:
    phase = f"rests: {member.resting}" if member.resting else member.phase
    line = (
        f"{title:<11} {member.node}: {phase}, pid {member.pid} at {member.address}:{member.port}, "
        f"{member.workers} workers, {member.slots} slots"
    )
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
    as_json: AsJsonLines = False,
) -> None:
    """Print the run's log, one line per record, and check its hash chain.

    A record that was altered, moved or removed is an error with exit code 4.
    With --explain it prints each change of the members instead: which nodes were
    lost, failed, left or joined, how long it took to detect that and to agree,
    and each phase up to the first step. docs/recovery.md explains the output.

    Examples:
    elastic-pt log runs/first
    elastic-pt log runs/first --explain
    elastic-pt log s3://bucket/run --json | jq .kind
    """
    # As above.
    from elastic_pt.report.explanation import as_json as explanation_as_json
    from elastic_pt.report.explanation import explain
    from elastic_pt.report.status import describe, open_run, record_as_json, records

    found = records(open_run(absolute_url(run_url, "RUN_URL")))
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


def _print_paragraph(text: str) -> None:
    """Print with a bold heading, up to the first colon. Into a file or a pipe it is one line."""
    console = Console(highlight=False)
    paragraph = Text(text)
    paragraph.stylize("bold", 0, text.index(":"))
    console.print(paragraph, soft_wrap=not console.is_terminal)


def checkpoints(
    run_url: RunUrl,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte; exit code 4 if anything is wrong.")
    ] = False,
    as_json: AsJsonList = False,
) -> None:
    """List the committed checkpoints that are kept, newest first.

    Examples:
    elastic-pt checkpoints runs/first
    elastic-pt checkpoints s3://bucket/run --verify --json
    """
    # As above. To verify needs torch, to list does not.
    from elastic_pt.errors import CheckpointError
    from elastic_pt.report.status import open_run, read_checkpoints

    run = open_run(absolute_url(run_url, "RUN_URL"))
    entries = []
    for report in read_checkpoints(run):
        checkpoint = report.checkpoint
        entry: dict[str, Any] = {
            "step": checkpoint.step,
            "generation": checkpoint.generation,
            "directory": checkpoint.directory,
            "manifest_bytes": checkpoint.manifest_size,
            "manifest_sha256": checkpoint.manifest_sha256,
            "loss": checkpoint.loss,
            "quarantine": report.quarantine or None,
        }
        if verify:
            from elastic_pt.report.artifacts import problems_of

            entry["problems"] = problems_of(run, checkpoint)
        entries.append(entry)
    if as_json:
        print_json(entries)
    elif not entries:
        typer.echo("no checkpoint is committed yet")
    for entry in () if as_json else entries:
        loss = "" if entry["loss"] is None else f"  loss {entry['loss']:.4f}"
        verdict = "" if not verify else "  verified" if not entry["problems"] else "  UNUSABLE"
        held = f"  quarantined: {entry['quarantine']}" if entry["quarantine"] else ""
        typer.echo(f"step {entry['step']}{loss}  {entry['directory']}{verdict}{held}")
        for problem in entry.get("problems", ()):
            typer.echo(f"    {problem}")
    if any(entry.get("problems") for entry in entries):
        raise typer.Exit(CheckpointError.exit_code)
