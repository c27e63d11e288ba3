"""How long processes of this machine waited for a processor. Only reads; the process of a chaos run.

A recovery takes longer beside other work. What it waited for a processor is no fault of the run, so it does not count.
"""

from pathlib import Path
from typing import Final

_PRESSURE: Final = Path("/proc/pressure/cpu")
_MICROSECONDS: Final = 1e6


def waited_s(pressure: Path = _PRESSURE) -> float | None:
    """Seconds since the machine has started in which a process was ready to run and had no processor.

    None if the kernel does not tell (no Linux, or no PSI).
    """
    try:
        some = pressure.read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return None
    return int(some.rpartition("total=")[2]) / _MICROSECONDS
