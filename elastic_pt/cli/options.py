"""Arguments and options that several commands share."""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError

from elastic_pt.config import Url, broken_scheme
from elastic_pt.errors import ConfigError, NoRun

if TYPE_CHECKING:
    from collections.abc import Callable

    from elastic_pt.report.status import Run

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended."""

RunUrl = Annotated[
    str,
    typer.Argument(
        metavar="RUN_URL", help="The run directory: a path or a URL such as s3://bucket/run."
    ),
]
ConfigOrRunUrl = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG|RUN_URL",
        help="A TOML file, or the URL of a run whose configuration is used.",
        show_default=False,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDR",
        help="Address at which peers reach this node. Default: that of the default route.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override one key of the configuration. May be given several times.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
AsJsonLines = Annotated[
    bool, typer.Option("--json", help="Print one JSON object a line, for programs.")
]
AsJsonList = Annotated[bool, typer.Option("--json", help="Print a JSON list, for programs.")]
Step = Annotated[
    int | None,
    typer.Option(
        "--step",
        metavar="N",
        help="The checkpoint of this step, instead of the newest usable one.",
        show_default=False,
    ),
]
DataUrl = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="URL",
        help="Where the prepared data is now, if not at the run's data.url.",
        show_default=False,
    ),
]


def print_json(value: Any) -> None:
    """Print `value` as JSON. A command with `--json` prints nothing else on standard output."""
    typer.echo(json.dumps(value, indent=1))


def wait_for_run(open_run: "Callable[[], Run]", follow_s: float | None) -> "Run":
    """Open a run. With `follow_s`, wait for one that is not there yet, and look again after so many seconds.

    Says so once on standard error. Ctrl-C ends the wait.
    """
    told = False
    while True:
        try:
            return open_run()
        except NoRun as error:
            if follow_s is None:
                raise
            if not told:
                text = f"waiting for the run: {error}; looks again every {follow_s:g} s"
                typer.echo(text, err=True)
            told = True
        time.sleep(follow_s)


def absolute_url(text: str, name: str) -> str:
    """Return a URL unchanged and a plain path as file://. Errors call the value `name`."""
    try:
        url: str = TypeAdapter(Url).validate_python(text)
    except ValidationError as error:
        raise ConfigError(f"{name} = {text!r}: {error.errors()[0]['ctx']['error']}") from error
    return url


def is_config_file(text: str) -> bool:
    """Whether CONFIG|RUN_URL is a configuration file: the file exists, or its name ends with .toml."""
    return "://" not in text and (Path(text).is_file() or text.endswith(".toml"))


def require_new_directory(out: Path) -> None:
    """Refuse an --out that `export` cannot create, before anything is read."""
    # `Path` turns `//` into `/`, so any URL looks broken here.
    if broken_scheme(str(out)):
        raise ConfigError(
            f"--out {out}: is a URL; expected a local directory, which you can copy afterwards"
        )
    if out.is_symlink() or out.is_mount():
        raise ConfigError(
            f"--out {out}: is a symbolic link or a mount point, which `export` cannot replace; "
            "expected a new directory, for example below it"
        )
    if out.exists() and (not out.is_dir() or out.resolve() == Path.cwd() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists already; expected a new or empty directory")
    parent = next(each for each in out.absolute().parents if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--out {out}: cannot be created in {parent}; expected a directory that this user may write to"
        )
