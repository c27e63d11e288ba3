"""What an agent does between its start and its part in the run."""

import os
import signal
from typing import Any

import pytest

from elastic_pt.agent.agent import await_platform


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_node_that_is_asked_to_leave_while_it_starts_has_left(number: signal.Signals) -> None:
    """F18: Before it takes part there is nothing to finish: it ends at once with code 0, as the first process too."""
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    class AskedMeanwhile:
        def wait(self, _: float) -> Any:
            os.kill(os.getpid(), number)
            return {}

    with pytest.raises(SystemExit) as ended:
        await_platform(AskedMeanwhile(), 1.0)  # type: ignore[arg-type]
    assert ended.value.code == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
