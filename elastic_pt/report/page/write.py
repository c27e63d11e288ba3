"""Writes the report of a run to a file."""

import os
from pathlib import Path

from elastic_pt.errors import ConfigError
from elastic_pt.report.page.facts import read_facts
from elastic_pt.report.page.model import page_of
from elastic_pt.report.page.render import render
from elastic_pt.report.status import Run


def write_report(run: Run, path: Path, now_at_s: float) -> int:
    """Replace `path` by the page of a run, and return its size in bytes. Raises `ConfigError` if it cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    # Reading may take a minute: tell first that the file cannot be written.
    try:
        partial.touch()
        try:
            page = render(page_of(read_facts(run, now_at_s))).encode()
            partial.write_bytes(page)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out {path}: {error.strerror or error}; expected a file that this user may write"
        ) from error
    return len(page)
