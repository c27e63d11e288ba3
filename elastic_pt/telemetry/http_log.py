"""What aiohttp's server says of a request: an event of one line, where it would write a traceback between the events.

A malformed request is no event: it is answered with 400, and strangers may send as many as they like. Agent process.
"""

import logging
from typing import Final

import structlog
from aiohttp.http_exceptions import HttpProcessingError

_NAME: Final = "aiohttp.server"

log = structlog.get_logger("elastic_pt.http")


def http_logger() -> logging.Logger:
    """For the `logger` of a `web.AppRunner`."""
    logger = logging.Logger(_NAME, logging.WARNING)
    logger.addHandler(_AsEvents())
    return logger


class _AsEvents(logging.Handler):
    """Tells of defects, and of nothing else."""

    def emit(self, record: logging.LogRecord) -> None:
        """An event for an error in a handler of ours."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None or isinstance(error, HttpProcessingError | ConnectionError):
            return
        log.error("request_failed", cause=f"{type(error).__name__}: {error}")
