"""Messages of workers become numbers, from several threads at once."""

import sys
import threading
import time

from elastic_pt.agent.observation import Observation
from elastic_pt.telemetry.catalogue import Metrics
from elastic_pt.telemetry.goodput import Activity


def test_concurrent_messages_count_each_second_once() -> None:
    """The clock is read inside the lock, so every second counts once, in any order of threads."""
    switch_s = sys.getswitchinterval()
    failures: list[BaseException] = []

    def slow_clock() -> float:
        now_s = time.monotonic()
        # Gives another thread time to run in between.
        time.sleep(0)
        return now_s

    observation = Observation(Metrics(), slow_clock)

    def speak(name: str) -> None:
        try:
            for _ in range(300):
                observation.activity(name)
                observation.enter(Activity.SETTLE)
                observation.waits(paused=name == "train")
        except BaseException as error:
            failures.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=speak, args=(name,))
            for name in ("start", "restore", "train", "start")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch_s)
    assert failures == []
