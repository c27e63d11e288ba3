"""Commands to use before a run: `config` and `storage-check`."""

from pathlib import Path
from typing import Annotated, Final

import typer

from elastic_pt.cli.options import AsJson, Overrides, absolute_url, print_json
from elastic_pt.config import load_config, parse_config
from elastic_pt.errors import AccessDenied, ConfigError, NotFound

_PLACEHOLDERS: Final = """\
[run]
url = "s3://bucket/run"
[data]
url = "s3://bucket/data"
"""


def config(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG", help="A TOML file; without one, the defaults.", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print the effective configuration, with a sentence for every key.

    Without CONFIG it prints the defaults, with placeholders for run.url and
    data.url: a template.

    Examples:
    elastic-pt config > run.toml
    elastic-pt config run.toml --set train.steps=2000
    """
    if path is None:
        effective = parse_config(_PLACEHOLDERS, source="the defaults", overrides=overrides or [])
    else:
        effective = load_config(path, overrides or [])
    if as_json:
        print_json(effective.model_dump(mode="json"))
    else:
        typer.echo(effective.to_toml(comments=True).rstrip())


def storage_check(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="A directory of the store: a path or a URL.")
    ],
    as_json: AsJson = False,
) -> None:
    """Check whether a store is safe for a run of several nodes.

    Tries every operation on new keys. Twenty times, eight writers race to
    create one object. Removes everything that it created. The last line is
    fenced (exit code 0) or unfenced (exit code 2).

    Examples:
    elastic-pt storage-check s3://bucket/somewhere
    elastic-pt storage-check /mnt/shared
    """
    from elastic_pt.store.check import check_store
    from elastic_pt.store.open import open_store

    store = open_store(absolute_url(url, "URL"), patient=False)
    try:
        report = check_store(store)
    except (NotFound, AccessDenied) as error:
        if not store.url.startswith("file://"):
            raise
        raise ConfigError(
            f"URL = {url!r}: cannot be used: {error}; expected a directory that this user may create and write to"
        ) from error
    # The report ends with "<verdict>: <reason>".
    checks = report.lines[:-1]
    if as_json:
        print_json(
            {
                "url": store.url,
                "verdict": report.verdict,
                "reason": report.reason,
                "checks": checks,
            }
        )
    else:
        for line in (*checks, report.reason, report.verdict):
            typer.echo(line)
    if not report.fenced:
        raise typer.Exit(ConfigError.exit_code)
