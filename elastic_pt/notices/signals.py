"""What the signals of Kubernetes, Slurm and service managers mean. They come to the agent's main thread.

    SIGTERM   Kubernetes: the pod is deleted, drained or preempted. `preStop` runs first, and shares the grace of
              `terminationGracePeriodSeconds` (on GKE Spot 15 s, whatever the pod asks for). No preStop is needed here.
              Slurm: preempted or cancelled; SIGKILL follows after GraceTime. systemd: the service stops.
    SIGUSR1   Slurm's `--signal=USR1@60`: the time limit comes, some 60 seconds from now. With `B:` only the batch
              script gets it, and has to pass it on.
    SIGINT    somebody at a terminal.

All of them ask the node to leave. None tells how long there is: `elastic.leave_timeout_s` should be below that time.
"""

import signal
from collections.abc import Mapping
from typing import Final

LEAVE_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ENDING_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
"""The second one of these ends the agent at once. A warning (SIGUSR1) is followed by one of them and does not count."""
_SUPERVISORS: Final = {"KUBERNETES_SERVICE_HOST": "kubernetes", "SLURM_JOB_ID": "slurm"}


def supervisor(environment: Mapping[str, str]) -> str:
    """Who starts this process and tells it by a signal when its machine goes; empty where nobody is known to."""
    return next((name for key, name in _SUPERVISORS.items() if environment.get(key)), "")


def leave_reason(number: int) -> str:
    """What the log says of a node that leaves on this signal; nothing of an ordinary stop."""
    return "" if number in ENDING_SIGNALS else signal.Signals(number).name
