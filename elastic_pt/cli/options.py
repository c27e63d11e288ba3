"""Arguments and options that several commands share."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError

from elastic_pt.config import Url, broken_scheme
from elastic_pt.errors import ConfigError

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
    """What a command says to a program: JSON on standard output, and nothing else there."""
    typer.echo(json.dumps(value, indent=1))


def absolute_url(text: str, name: str) -> str:
    """A URL as it is, a plain path as file://. `name` is what the error calls it."""
    try:
        url: str = TypeAdapter(Url).validate_python(text)
    except ValidationError as error:
        raise ConfigError(f"{name} = {text!r}: {error.errors()[0]['ctx']['error']}") from error
    return url


def is_config_file(text: str) -> bool:
    """Whether CONFIG|RUN_URL means a file: there is one, or its name ends like one."""
    return "://" not in text and (Path(text).is_file() or text.endswith(".toml"))


def require_new_directory(out: Path) -> None:
    """Refuse an --out that `export` could not make a directory of, before anything is read."""
    # As a path, `//` is one slash: any URL looks broken then.
    if broken_scheme(str(out)):
        raise ConfigError(
            f"--out {out}: a URL; expected a local directory, which can be copied then"
        )
    if out.is_symlink() or out.is_mount():
        raise ConfigError(
            f"--out {out}: a symbolic link or a mount point, which cannot be replaced by what is finished; "
            "expected a new directory, there or below it"
        )
    if out.exists() and (not out.is_dir() or out.resolve() == Path.cwd() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists already; expected a new or empty directory")
    parent = next(each for each in out.absolute().parents if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--out {out}: {parent} is no directory that this user may write to; expected one"
        )
