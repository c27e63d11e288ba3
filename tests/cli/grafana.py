"""A server on loopback with the part of Grafana's HTTP API that the push uses, as Grafana documents it.

    GET  /api/folders          folders at the top level
    POST /api/folders          {"title"}: a new folder
    POST /api/dashboards/db    {"dashboard", "folderUid", "overwrite"}: a new version; 412 if it exists and is not overwritten

It is no Grafana: it does not check the dashboards, and shows nothing.
"""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.services.json_server import JsonHandler, serving

TOKEN = "glsa_0123456789"
USER, PASSWORD = "admin", "of:colons"


class GrafanaApiServer:
    """What it holds. `status` is answered instead of anything else, if it is set."""

    def __init__(self) -> None:
        self.folders: list[dict[str, Any]] = [{"id": 1, "uid": "other", "title": "Other"}]
        self.dashboards: dict[str, dict[str, Any]] = {}
        self.status = 0
        self.url = ""

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """The status and the JSON of one request."""
        if self.status:
            return self.status, {"message": "you may not do this"}
        match method, path:
            case "GET", "/api/folders":
                return 200, self.folders
            case "POST", "/api/folders":
                folder = {"id": 7, "uid": f"folder{len(self.folders)}", "title": body["title"]}
                self.folders.append(folder)
                return 200, folder
            case "POST", "/api/dashboards/db":
                return self._save(body)
        return 404, {"message": "Not found"}

    def _save(self, body: dict[str, Any]) -> tuple[int, Any]:
        dashboard = body["dashboard"]
        known = self.dashboards.get(dashboard["uid"])
        if known is not None and not body["overwrite"]:
            message = "The dashboard has been changed by someone else"
            return 412, {"status": "version-mismatch", "message": message}
        if body["folderUid"] and body["folderUid"] not in [each["uid"] for each in self.folders]:
            return 400, {"message": "folder not found"}
        version = 1 if known is None else known["version"] + 1
        self.dashboards[dashboard["uid"]] = body | {"version": version}
        saved = {"id": 1, "uid": dashboard["uid"], "url": f"/d/{dashboard['uid']}/x"}
        return 200, saved | {"status": "success", "version": version, "slug": "x"}

    def accepts(self, authorization: str) -> bool:
        """Whether the credentials of a request are right."""
        basic = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        return authorization in (f"Bearer {TOKEN}", f"Basic {basic}")


@contextmanager
def grafana_api() -> Iterator[GrafanaApiServer]:
    """The server, until the end of the block."""
    held = GrafanaApiServer()

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            self._do(None)

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            self._do(json.loads(self.rfile.read(length)))

        def _do(self, body: Any) -> None:
            if held.accepts(self.headers.get("Authorization", "")):
                status, answer = held.answer(self.command, self.path.partition("?")[0], body)
            else:
                status, answer = 401, {"message": "Invalid API key"}
            self.write_json(status, answer)

    with serving(Handler) as held.url:
        yield held
