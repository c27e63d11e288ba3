"""A server on loopback with the part of W&B's protocol that one run needs.

    POST /graphql RunResumeStatus    what the server holds of a run, so that the client goes on from there
    POST /graphql UpsertBucket       creates the run, or changes it
    POST /graphql CreateRunFiles     where files are uploaded to
    POST …/file_stream               lines of the history, in JSON
    PUT  /upload/…                   a file

It is no W&B: it was written from the requests of the client, and shows nothing.
"""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.services.json_server import JsonHandler, serving


class WandbServer:
    """One run, as far as the client has sent it."""

    def __init__(self) -> None:
        self.run_id = ""
        self.project = ""
        self.history: list[str] = []
        self.files: set[str] = set()
        self.accepts_key = True
        self.url = ""

    @property
    def losses(self) -> list[tuple[int, float]]:
        """The step and the loss of each line of the history."""
        lines = [json.loads(line) for line in self.history]
        return [(line["_step"], line["loss"]) for line in lines]

    def answer(self, path: str, body: Any) -> Any:
        """The JSON that answers a request."""
        if path.endswith("/file_stream"):
            self._append(body.get("files", {}).get("wandb-history.jsonl"))
        if path != "/graphql":
            return {}
        variables = body.get("variables", {})
        match body.get("operationName"):
            case "RunResumeStatus":
                return {"data": {"model": self._project() | {"bucket": self._resumable()}}}
            case "UpsertBucket":
                self.run_id = variables["name"] or self.run_id
                self.project = variables["project"] or self.project
                bucket = self._run() | {"project": self._project()}
                return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
            case "CreateRunFiles":
                self.files.update(variables["files"])
                files = [
                    {"name": name, "uploadUrl": f"{self.url}/upload/{name}"}
                    for name in variables["files"]
                ]
                created = {"runID": self.run_id, "uploadHeaders": [], "files": files}
                return {"data": {"createRunFiles": created}}
        return {"data": {}}

    def _append(self, chunk: dict[str, Any] | None) -> None:
        if chunk is not None:
            # The client numbers its lines: a line that is sent again replaces itself.
            self.history[chunk["offset"] :] = chunk["content"]

    def _project(self) -> dict[str, Any]:
        return {"id": "p", "name": self.project, "entity": {"id": "e", "name": "entity"}}

    def _run(self) -> dict[str, Any]:
        return {
            "id": "r",
            "name": self.run_id,
            "displayName": self.run_id,
            "historyLineCount": len(self.history),
            "config": "{}",
        }

    def _resumable(self) -> dict[str, Any] | None:
        if not self.run_id:
            return None
        return self._run() | {
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps(self.history[-1:]),
            "eventsTail": "[]",
            "tags": [],
            # The client takes a run without `t` for one that has not begun.
            "wandbConfig": '{"t": 1}',
        }


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """The server, until the end of the block."""
    held = WandbServer()

    class Handler(JsonHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            if self.headers.get("Content-Type", "").startswith("application/json"):
                self._answer(held.answer(self.path, json.loads(data)))
            else:
                self._answer({})

        do_PUT = do_POST

        def _answer(self, body: Any) -> None:
            self.write_json(200 if held.accepts_key else 401, body)

    with serving(Handler) as held.url:
        yield held
