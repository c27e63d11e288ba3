"""The events of a node: its agent's and its workers'. Agent process.

Standard error, the bucket, a local file if `telemetry.log_file` names one, and a webhook if the environment has its URL.
"""

import os
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import structlog

from elastic_pt.config import Config
from elastic_pt.errors import ElasticPtError
from elastic_pt.store.port import Store
from elastic_pt.telemetry.events import EventContext, EventOutput, configure_events
from elastic_pt.telemetry.log_file import LogFile
from elastic_pt.telemetry.redaction import Redactor, secrets_in, without_credentials
from elastic_pt.telemetry.shipping import EventSink
from elastic_pt.telemetry.webhook import Webhook, webhook_from
from elastic_pt.workers.channel import EVENTS_DROPPED

_NODE: Final = "{node}"
_CLOSE_TIMEOUT_S: Final = 10.0
"""For all sinks together."""
_OTHERS_TIMEOUT_S: Final = 5.0
"""Of these, for those that are not the bucket."""

log = structlog.get_logger("elastic_pt.agent.events")


class Events:
    """Configures the events of this process. As a context manager it reports what ends the agent, and closes the sinks."""

    def __init__(self, config: Config, store: Store, node: str, directory: str) -> None:
        """`directory` is the agent's, below `events/`. Raises `ConfigError` if the webhook's URL in the environment is malformed."""
        telemetry = config.telemetry
        self.context = EventContext(node, run=without_credentials(config.run.url))
        self.webhook = webhook_from(os.environ)
        """None if nobody is to be told."""
        self.shipped = EventSink(store, directory)
        self._dropped_by_workers = 0
        self._others: list[LogFile | Webhook] = []
        if telemetry.log_file:
            path = Path(telemetry.log_file.replace(_NODE, node))
            file = LogFile(
                path, lambda cause: log.warning("log_file_failed", path=str(path), cause=cause)
            )
            self._others.append(file)
        if self.webhook is not None:
            self._others.append(self.webhook)
        self._output = EventOutput(
            telemetry.log_level,
            telemetry.log_format,
            Redactor(secrets_in(os.environ)),
            (self.shipped, *self._others),
        )
        configure_events(self.context, self._output)

    @property
    def dropped(self) -> int:
        """Events that did not reach the bucket since the start."""
        return self.shipped.dropped + self._dropped_by_workers

    @property
    def webhook_failures(self) -> int:
        """Messages that the webhook did not take since the start."""
        return 0 if self.webhook is None else self.webhook.failures

    def hide(self, secret: str) -> None:
        """From now on, no event shows `secret` either."""
        redactor = Redactor([secret, *secrets_in(os.environ)])
        self._output = replace(self._output, redactor=redactor)
        configure_events(self.context, self._output)

    def relay(self, event: dict[str, Any]) -> None:
        """Pass a worker's event to the sinks. The worker has written it to standard error itself."""
        if event.get("event") == EVENTS_DROPPED:
            self._dropped_by_workers += event["count"]
        cleaned = self._output.redactor.clean(event)
        for sink in self._output.sinks:
            sink.take(cleaned)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        self._output = replace(self._output, standard_error=False)
        configure_events(self.context, self._output)
        if isinstance(error, ElasticPtError):
            log.error("agent_failed", kind=type(error).__name__, cause=str(error))
        elif error is not None and not isinstance(error, SystemExit | KeyboardInterrupt):
            log.error("agent_crashed", exc_info=error)
        self._close_sinks()

    def _close_sinks(self) -> None:
        """All at the same time. The bucket's is the last to end: it takes the failures of the others."""
        began_s = time.monotonic()
        for sink in self._others:
            sink.end()
        for sink in self._others:
            sink.close(max(0.0, began_s + _OTHERS_TIMEOUT_S - time.monotonic()))
        self.shipped.close(began_s + _CLOSE_TIMEOUT_S - time.monotonic())
