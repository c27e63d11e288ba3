"""What the signals of Kubernetes, Slurm and service managers mean. The agent's main thread handles them.

    SIGTERM   Kubernetes: the pod is deleted, drained or preempted. `preStop` runs first, and shares the grace of
              `terminationGracePeriodSeconds` (on GKE Spot 15 s, even if the pod requests more). No preStop is needed here.
              Slurm: preempted or cancelled; SIGKILL follows after KillWait. systemd: the service stops.
    SIGUSR1   Slurm's `--signal=USR1@60`: the time limit is about 60 seconds away. With `B:` only the batch script
              gets it, and must forward it.
    SIGINT    a user at a terminal.

All of them ask the node to leave. None says how much time is left: `elastic.leave_timeout_s` should be below that
time.
"""

import signal
from collections.abc import Mapping
from typing import Final

LEAVE_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ENDING_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
"""The second one of these ends the agent at once. SIGUSR1 is a warning before one of them and does not count."""
_SUPERVISORS: Final = {"KUBERNETES_SERVICE_HOST": "kubernetes", "SLURM_JOB_ID": "slurm"}


def supervisor(environment: Mapping[str, str]) -> str:
    """The supervisor that signals this process before its machine is taken away; empty if none is known."""
    return next((name for key, name in _SUPERVISORS.items() if environment.get(key)), "")


def leave_reason(number: int) -> str:
    """The reason in the log for a node that leaves after this signal; empty for an ordinary stop."""
    return "" if number in ENDING_SIGNALS else signal.Signals(number).name
