"""`elastic-pt status --watch`: looks at a run again and again, and draws each look.

    thread:       LiveReader.look ─► newest Facts, or why the look failed
    main thread:  screen(facts, size) ─► terminal   (every half second: ages go on while the bucket hangs)
                                      └► a block of text per look, in a file or a pipe

Ends when the run has ended, or with Ctrl-C.
"""

import datetime
import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from rich.console import Console
from rich.live import Live

from elastic_pt.cli.live_screen import Size, screen
from elastic_pt.errors import ElasticPtError, RunFailed
from elastic_pt.report.live import Facts, LiveReader
from elastic_pt.report.status import State, open_run

_DRAW_S: Final = 0.5
_STORE_TIMEOUT_S: Final = 10.0
"""A request to the bucket is tried again for so long before the view says what is wrong."""


def watch_status(url: str, interval_s: float) -> None:
    """Show the run until it has ended. Raises `ConfigError` or `StoreError` if the first look fails, `RunFailed` if the run failed."""
    reader = LiveReader(open_run(url, _STORE_TIMEOUT_S))
    looks = _Looks(reader, reader.look(), interval_s)
    console = Console(highlight=False)
    if console.is_terminal:
        _draw(console, looks)
    else:
        _print(console, looks)
    status = looks.facts.status
    if status.state is State.FAILED:
        raise RunFailed(f"{status.reason}; `elastic-pt reopen RUN_URL --why TEXT` lets it continue")


class _Looks:
    """Looks at the run in a thread of its own, which ends with the process."""

    def __init__(self, reader: LiveReader, first: Facts, interval_s: float) -> None:
        self._reader, self._interval_s = reader, interval_s
        self._facts = first
        self._changed = threading.Event()
        self._changed.set()
        threading.Thread(target=self._look_on, name="look", daemon=True).start()

    @property
    def facts(self) -> Facts:
        """The newest facts, with the time of now."""
        now = datetime.datetime.now(datetime.UTC)
        return replace(self._facts, now=now, interval_s=self._interval_s)

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self._facts.status.state in (State.COMPLETED, State.FAILED)

    def wait(self, timeout_s: float | None) -> None:
        """Wait for the next look, at most so long."""
        self._changed.wait(timeout_s)
        self._changed.clear()

    def _look_on(self) -> None:
        pause = threading.Event()
        while not self.over:
            pause.wait(self._interval_s)
            try:
                self._facts = self._reader.look()
            except Exception as error:
                # Also an unexpected one: a view that silently stops would be worse than its text.
                known = isinstance(error, ElasticPtError)
                trouble = str(error) if known else f"unexpected {type(error).__name__}: {error}"
                self._facts = replace(self._facts, trouble=trouble)
            self._changed.set()


def _draw(console: Console, looks: _Looks) -> None:
    """Draw on the whole terminal; the last picture stays when the run has ended."""
    with Live(console=console, screen=True, auto_refresh=False, transient=True) as live:
        while not looks.over:
            size = Size(console.width, console.height, shows_only_ascii(os.environ, console))
            live.update(screen(looks.facts, size), refresh=True)
            looks.wait(_DRAW_S)
    last = Size(console.width, None, shows_only_ascii(os.environ, console))
    console.print(screen(looks.facts, last))


def _print(console: Console, looks: _Looks) -> None:
    """Print a block of text per look."""
    size = Size(console.width, None, shows_only_ascii(os.environ, console))
    while True:
        looks.wait(None)
        over = looks.over
        console.print(screen(looks.facts, size))
        console.file.flush()
        if over:
            return
        console.print()


def shows_only_ascii(environment: Mapping[str, str], console: Console) -> bool:
    """Whether the terminal may be unable to show more than ASCII. Python writes UTF-8 even in the C locale."""
    names = ("LC_ALL", "LC_CTYPE", "LANG")
    locale = next((environment[name] for name in names if environment.get(name)), "C")
    utf8 = locale.lower().replace("-", "").endswith("utf8") or ".utf8" in locale.lower().replace(
        "-", ""
    )
    return not utf8 or not console.encoding.lower().startswith("utf")
