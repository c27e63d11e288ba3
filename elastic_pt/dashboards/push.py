"""Push dashboards to a Grafana through its HTTP API. Again is the same: a dashboard is replaced by its UID."""

from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

import elastic_pt
from elastic_pt.dashboards.shipped import Dashboards
from elastic_pt.errors import ConfigError

TOKEN_VARIABLE: Final = "GRAFANA_TOKEN"
TIMEOUT_S: Final = 15.0
"""Of one request."""


def push(url: str, token: str, folder: str, dashboards: Dashboards) -> Iterator[str]:
    """Create or replace the dashboards in a folder, which is created if it is missing; yields the URL of each.

    `token` is that of a service account, or `user:password`. An empty `folder` is the top level.
    """
    grafana, failure = _connect(url, token)
    # An OSError is a connection that fails; the others are answers of something that is no Grafana.
    expected: tuple[type[Exception], ...] = (failure, OSError, ValueError, KeyError, TypeError)
    try:
        folder_uid = _folder(grafana, folder) if folder else ""
        for dashboard in dashboards.values():
            body = {
                "dashboard": dashboard | {"id": None},
                "folderUid": folder_uid,
                "overwrite": True,
                "message": f"elastic-pt {elastic_pt.__version__}",
            }
            answer: dict[str, Any] = grafana.dashboard.update_dashboard(body)
            yield f"{url.rstrip('/')}/d/{answer['uid']}"
    except expected as error:
        cause = getattr(error, "message", "") or _innermost(error) or type(error).__name__
        raise ConfigError(
            f"--url {url}: {cause}; expected a Grafana, and in {TOKEN_VARIABLE} a token that may write dashboards"
        ) from error


def _innermost(error: BaseException) -> str:
    """What an error says. The HTTP client wraps the operating system's words for a failed connection several times."""
    found, inner = str(error), error.__cause__ or error.__context__
    while inner is not None:
        if isinstance(inner, OSError):
            found = (inner.strerror or str(inner)).lower()
        inner = inner.__cause__ or inner.__context__
    return found


def _connect(url: str, token: str) -> tuple[Any, type[Exception]]:
    """The client, and what it raises."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url}: expected http://… or https://…")
    if parts.username or parts.password:
        # Everyone on the machine can read a command line.
        raise ConfigError(
            f"--url with a user or password: expected neither; put the token, or user:password, into {TOKEN_VARIABLE}"
        )
    if not token:
        raise ConfigError(
            f"{TOKEN_VARIABLE} is not set: expected a Grafana service account's token, or user:password"
        )
    try:
        from grafana_client import GrafanaApi
        from grafana_client.client import GrafanaException
    except ImportError as error:
        raise ConfigError(
            "grafana-client is not installed: expected pip install 'elastic-pt[grafana]'"
        ) from error
    user, colon, password = token.partition(":")
    prefix = f"{parts.path.strip('/')}/" if parts.path.strip("/") else ""
    root = f"{parts.scheme}://{parts.netloc}/{prefix}"
    credential = (user, password) if colon else token
    return GrafanaApi.from_url(root, credential, timeout=TIMEOUT_S), GrafanaException


def _folder(grafana: Any, title: str) -> str:
    """The UID of a folder at the top level."""
    for folder in grafana.folder.get_all_folders():
        if folder["title"] == title:
            return str(folder["uid"])
    return str(grafana.folder.create_folder(title)["uid"])
