"""A run that exists only as metrics: an agent's own registry, moved on by the test, and one server for all runs.

It does ten steps a second, commits after each twentieth, and nothing is wrong with it. Its attributes are its faults.
"""

import contextlib
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from prometheus_client import generate_latest

from elastic_pt.telemetry.catalogue import Metrics

_STEP_S: Final = 0.1
_EVERY_STEPS: Final = 20
_AGAIN_STEPS: Final = 5


class ToyRun:
    """One run, seen by its one agent that is scraped; `name` is its label `run`."""

    def __init__(self, name: str, now_s: float) -> None:
        self.name = name
        self.up = True
        """Whether its agent can be scraped."""
        self.step = 0
        self.bucket = "productive"
        self.stepping = True
        self.committing = True
        self.requests_fail = False
        self.clock_offset_s = 0.0
        self.crash_step = 0
        """The step at which each generation fails; 0 if none does."""
        self.metrics = Metrics(name, "node-0")
        self._frontier_step = 0
        self._now_s = now_s
        self._worked_s = 0.0
        metrics = self.metrics
        self.plan(1_000_000)
        metrics.checkpoint_every_steps.set(_EVERY_STEPS)
        metrics.notice_source_up.labels("file").set(1)
        metrics.nodes.labels("active").set(2)
        metrics.nodes.labels("quarantined").set(0)
        metrics.steps_at_risk.labels("node").set(1)
        metrics.generation.set(1)
        metrics.gpu_xid_errors.labels("0")
        # The catalogue's own refresh comes first, and sets this machine's clock.
        metrics.before_scrape(lambda: metrics.clock_seconds.inc(self.clock_offset_s))

    def plan(self, steps: int) -> None:
        """The run has this many steps, and does no more."""
        self._steps_planned = steps
        self.metrics.steps_planned.set(steps)

    def advance(self, now_s: float, unix_s: float) -> None:
        """What happens until `now_s`."""
        passed_s, self._now_s = now_s - self._now_s, now_s
        self.metrics.time_seconds.labels(self.bucket).inc(passed_s)
        result = "transient" if self.requests_fail else "ok"
        self.metrics.store_requests.labels("read", result).inc()
        self._worked_s += passed_s if self.stepping else 0.0
        while self._worked_s >= _STEP_S and self.step < self._steps_planned:
            self._worked_s -= _STEP_S
            self._do_step(unix_s)

    def _do_step(self, unix_s: float) -> None:
        metrics = self.metrics
        if self.step == self.crash_step > 0:
            self.step -= _AGAIN_STEPS
            metrics.restarts_without_progress.inc()
        self.step += 1
        if self.step > self._frontier_step:
            self._frontier_step = self.step
            metrics.restarts_without_progress.set(0)
        metrics.step.set(self.step)
        metrics.steps.inc()
        metrics.step_seconds.observe(_STEP_S)
        if self.committing and self.step % _EVERY_STEPS == 0:
            metrics.checkpoint_committed_step.set(self.step)
            metrics.checkpoint_commit_timestamp_seconds.set(unix_s)


class Exporter:
    """Serves what all runs that are up exposed when it was last updated. So a scrape never waits for a busy machine."""

    def __init__(self) -> None:
        self._text = b""
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                # Prometheus may have given up.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(exporter._text)

            def log_message(self, *_: object) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.target = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def update(self, runs: Iterable[ToyRun]) -> None:
        """From now on, serve these values."""
        lines = (
            line
            for run in runs
            if run.up
            for line in generate_latest(run.metrics.registry).splitlines(keepends=True)
            if not line.startswith(b"#")
        )
        self._text = b"".join(lines)

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()
