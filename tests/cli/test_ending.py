"""Signals end a command that must clean up as an exception does."""

import os
import signal

import pytest

from elastic_pt.cli.ending import ends_in_order

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_command_and_a_second_one_does_not_stop_its_cleaning(
    number: signal.Signals,
) -> None:
    """What `finally` says is done to its end, and handlers are as before."""
    before = [signal.getsignal(each) for each in SIGNALS]
    cleaned = []

    def command() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            for each in SIGNALS:
                os.kill(os.getpid(), each)
                cleaned.append(each)

    with pytest.raises(SystemExit) as caught, ends_in_order():
        command()
    assert caught.value.code == 128 + number
    assert cleaned == SIGNALS
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    """`nohup` lets a command go on when its terminal closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ends_in_order():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
