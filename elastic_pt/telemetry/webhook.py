"""Tells a person the few things that one wants to know at night, through a chat's incoming webhook.

The URL comes from the environment variable ELASTIC_PT_WEBHOOK_URL: it is a secret, and the configuration is stored in the
bucket. The message is Slack's `{"text": ...}`, which Mattermost, Discord (`/slack` at the end of the URL) and others take.

    event ─► notification (pure) ─► bounded queue ─► thread ─► POST, a few attempts

The events are those of the node that appended the record, so exactly one node tells. A receiver that is down, slow or answers
with an error delays no caller; each outage is one event.
"""

import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

import structlog
from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from elastic_pt.errors import ConfigError

VARIABLE: Final = "ELASTIC_PT_WEBHOOK_URL"
_QUEUE_MESSAGES_MAX: Final = 20
_TEXT_CHARACTERS_MAX: Final = 2000
"""Discord refuses longer ones."""
_ATTEMPTS_MAX: Final = 4
_TIMEOUT_S: Final = 5.0
_INTERVAL_S: Final = 2.0
"""Shortest time between two messages; Slack allows one a second."""
_CLOSE_TIMEOUT_S: Final = 5.0
_FOREVER: Final = frozenset({400, 401, 403, 404, 410})
"""Answers that another attempt does not change."""

log = structlog.get_logger("elastic_pt.telemetry.webhook")


def notification(event: Mapping[str, Any]) -> str | None:
    """The message for an event, or None if it can wait until the morning. Pure."""
    name, step = event.get("event"), event.get("step")
    at_step = "" if step is None else f" at step {step}"
    reason = event.get("reason") or event.get("why") or event.get("cause") or "no reason given"
    look = True
    match name:
        case "stop" if reason == "completed":
            what, look = f"The run is complete{at_step}.", False
        case "stop" if str(reason).startswith("diverged"):
            what = f"The run has ended{at_step}, because training diverged: {reason}."
        case "stop":
            what = f"The run has ended{at_step}: {reason}."
        case "node_kept_out":
            what = f"Node {event.get('kept_out')} is quarantined for {_duration(event.get('seconds'))}: {reason}."
        case "checkpoint_quarantined":
            what = f"Checkpoint {event.get('directory')} is quarantined and will not be used: {reason}."
        case "below_minimum":
            what = f"The run has not trained for {_duration(event.get('seconds'))}: {reason}. Start more nodes."
        case _:
            return None
    run = event.get("run", "RUN_URL")
    lines = [f"elastic-pt: {what}", f"Run: {run} (told by node {event.get('node')})"]
    if look:
        lines.append(f"What happened: `elastic-pt log {run} --explain`")
    return "\n".join(lines)[:_TEXT_CHARACTERS_MAX]


def webhook_from(environment: Mapping[str, str]) -> "Webhook | None":
    """The webhook that the environment asks for. Raises `ConfigError` without the URL, which is a secret."""
    url = environment.get(VARIABLE, "").strip()
    if not url:
        return None
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or any(each.isspace() for each in url):
        raise ConfigError(
            f"environment variable {VARIABLE}: not a URL of a webhook (its value is secret and not shown); "
            "expected https://HOST/PATH"
        )
    return Webhook(url)


class Webhook:
    """A sink that posts `notification`s; a thread sends them."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._queue: queue.Queue[str | None] = queue.Queue(_QUEUE_MESSAGES_MAX)
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._closing = threading.Event()
        self.failures = 0
        """Messages that were given up since the start."""
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def take(self, event: Mapping[str, Any]) -> None:
        """Send a message if a person wants to know of this event; never blocks."""
        text = notification(event)
        if text is None:
            return
        try:
            self._queue.put_nowait(text)
        except queue.Full:
            self.failures += 1

    def end(self) -> None:
        """Ask the thread to send the remaining messages and to end; does not wait."""
        self._closing.set()
        with suppress(queue.Full):
            self._queue.put_nowait(None)

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Send the remaining messages, within a bounded time."""
        self.end()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("webhook_failed", cause="no answer before the agent's end")

    def _run(self) -> None:
        fails = False
        while (text := self._queue.get()) is not None:
            began_s = time.monotonic()
            try:
                self._deliver(text)
                fails = False
            except Exception as error:  # any error: the thread must go on
                self.failures += 1
                if not fails:
                    log.warning("webhook_failed", cause=_cause(error))
                fails = True
            self._closing.wait(max(0.0, began_s + _INTERVAL_S - time.monotonic()))

    def _deliver(self, text: str) -> None:
        """Post one message; raises the last error after a few attempts."""
        Retrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_attempt(_ATTEMPTS_MAX),
            wait=wait_random_exponential(multiplier=0.5, max=5.0),
            sleep=self._pause,
            reraise=True,
        )(self._post, text)

    def _pause(self, seconds: float) -> None:
        self._closing.wait(seconds)

    def _post(self, text: str) -> None:
        request = urllib.request.Request(
            self._url,
            data=json.dumps({"text": text}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with self._opener.open(request, timeout=_TIMEOUT_S):
            pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET, which tells nobody. Without a redirect it is an error."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _may_pass(error: BaseException) -> bool:
    return not (isinstance(error, urllib.error.HTTPError) and error.code in _FOREVER)


def _cause(error: Exception) -> str:
    """What went wrong, without the URL."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the receiver answered {error.code} {error.reason}"
    reason = getattr(error, "reason", None) or error
    return f"{type(error).__name__}: {reason}"


def _duration(seconds: object) -> str:
    if not isinstance(seconds, int | float):
        return "some time"
    if seconds >= 7200:
        return f"{seconds / 3600:.0f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
