"""The command `dashboards`: bring the Grafana dashboards to a Grafana, or to files."""

import os
from pathlib import Path
from typing import Annotated

import typer

from elastic_pt.dashboards import Choices, export, push, shipped
from elastic_pt.dashboards.push import TOKEN_VARIABLE

Datasource = Annotated[
    str,
    typer.Option(
        "--datasource",
        metavar="UID",
        help="The UID of the Prometheus data source to begin with, instead of Grafana's default one.",
        show_default=False,
    ),
]
Docs = Annotated[
    str,
    typer.Option(
        "--docs",
        metavar="URL",
        help="Where docs/ can be read: the links to runbooks lead there.",
        show_default=False,
    ),
]


def dashboards() -> None:
    """Bring the Grafana dashboards to a Grafana, or to files.

    Examples:
    elastic-pt dashboards export --out grafana
    elastic-pt dashboards push --help
    """


def push_dashboards(
    url: Annotated[
        str, typer.Option("--url", metavar="URL", help="The Grafana.", show_default=False)
    ],
    folder: Annotated[
        str,
        typer.Option(
            "--folder",
            metavar="NAME",
            help="The folder, which is created if it is missing; '' is the top level.",
        ),
    ] = "elastic-pt",
    datasource: Datasource = "",
    docs: Docs = "",
) -> None:
    """Create or replace the dashboards in a Grafana through its HTTP API.

    The environment variable GRAFANA_TOKEN has the token of a service
    account that may write dashboards, or user:password. It needs the extra
    elastic-pt\\[grafana].

    Examples:
    elastic-pt dashboards push --url http://grafana:3000
    elastic-pt dashboards push --url https://grafana.example.com --folder Training --datasource prometheus
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    for address in push(url, token, folder, shipped(Choices(datasource, docs))):
        typer.echo(address)


def export_dashboards(
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Where the files are written.", show_default=False
        ),
    ],
    datasource: Datasource = "",
    docs: Docs = "",
) -> None:
    """Write the dashboards as JSON files, for Grafana's provisioning or its import.

    Examples:
    elastic-pt dashboards export --out /var/lib/grafana/dashboards
    """
    for path in export(out, Choices(datasource, docs)):
        typer.echo(path)
