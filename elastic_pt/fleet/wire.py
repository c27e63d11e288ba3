"""Starts and asks the process that disturbs the frames of one node."""

import json
import selectors
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

from elastic_pt.errors import UnexpectedError
from elastic_pt.fleet.forwarder import Disturbance
from elastic_pt.workers.forking import die_with_parent

_MODULE: Final = "elastic_pt.fleet.forwarder"
_ANSWER_TIMEOUT_S: Final = 20.0
_END_TIMEOUT_S: Final = 5.0


class Wire:
    """A running forwarder between two interfaces. The kernel kills it when the thread that made it ends."""

    def __init__(
        self, prefix: Sequence[str], ends: tuple[str, str], disturbance: Disturbance, seed: int
    ) -> None:
        """Returns when frames pass. `prefix` enters the namespace of the interfaces. Raises `UnexpectedError`."""
        options = [*ends, str(seed), json.dumps(asdict(disturbance))]
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-P", "-m", _MODULE, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=die_with_parent,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def counts(self) -> dict[str, int]:
        """Frames that have arrived, and those that were `lost`, `duplicated` and `flipped`. Raises `UnexpectedError`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer says it
        return self._answer()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, int]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(_ANSWER_TIMEOUT_S) else b""
        if not line:
            raise UnexpectedError(
                f"the forwarder of frames gave no answer within {_ANSWER_TIMEOUT_S:g} s, "
                f"exit code {self._process.poll()}"
            )
        counts: dict[str, int] = json.loads(line)
        return counts
