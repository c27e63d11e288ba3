"""The command `tidy`: removes what a run needs no more, for a role that may delete where its nodes may not."""

import time
from typing import Annotated, Any

import typer

from elastic_pt.cli.options import AsJson, RunUrl, absolute_url, print_json
from elastic_pt.cli.terminal_text import duration


def tidy(
    run_url: RunUrl,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove checkpoints that have expired, attempts that failed, and parts of uploads.

    It removes what agents remove with checkpoint.tidy = true, and also works
    after the end of a run. It never removes a checkpoint that the log keeps,
    or one that a node may still commit, so it may run at any time, beside the
    run and repeatedly: for example once an hour, by cron.

    Examples:
    elastic-pt tidy runs/first --dry-run
    elastic-pt tidy s3://bucket/run
    elastic-pt tidy s3://bucket/run --json
    """
    from elastic_pt.checkpoint.tidy import kept_directories, tidy_directories, tidy_uploads
    from elastic_pt.report.status import open_run

    def tell(line: str) -> None:
        if not as_json:
            typer.echo(line)

    run = open_run(absolute_url(run_url, "RUN_URL"))
    would = "would remove" if dry_run else "removed"
    directories, uploads = list[dict[str, Any]](), list[dict[str, Any]]()
    for each in tidy_directories(run.store, run.log, now_s=time.time, dry_run=dry_run):
        directories.append({"directory": each.directory, "files": each.files})
        tell(f"{would} {each.directory}: {each.files} files")
    for upload in tidy_uploads(run.store, run.log, dry_run=dry_run):
        uploads.append({"key": upload.key, "age_s": round(upload.age_s, 1)})
        tell(f"{would} parts of {upload.key}, begun {duration(upload.age_s)} ago")
    kept = sorted(kept_directories(run.log, run.log.view))
    tell(
        f"{would} {len(directories)} checkpoint directories with {sum(each['files'] for each in directories)} files, "
        f"and parts of {len(uploads)} uploads; {len(kept)} checkpoints are kept"
    )
    if as_json:
        print_json(
            {
                "url": run.store.url,
                "dry_run": dry_run,
                "directories": directories,
                "uploads": uploads,
                "kept": kept,
            }
        )
