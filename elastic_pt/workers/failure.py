"""Why a worker ended: finds one cause in the evidence. Agent process.

    exit code, error file, hang, OOM counter ─► Evidence ─► root_cause ─► WorkerFailure

torch elastic's `record` wraps the worker's function and writes the error file. It holds the exception and its
traceback, and has priority over the exit code.

A failure comes from the surroundings or from the program. The surroundings may change before the next attempt:
space, I/O, the store, memory, the device, the network, a signal from outside. The program is a function of state,
data and code, so it fails again. Only failures of the program may end a run (`membership.decision.budgets`).
"""

import json
import math
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from elastic_pt.workers.channel import ORPHANED_EXIT_CODE
from elastic_pt.workers.watchdog import Hang

_MESSAGE_CHARACTERS_MAX: Final = 500
_TRACEBACK_CHARACTERS_MAX: Final = 16 * 1024
_CUT: Final = "… (cut)\n"

# torch's own types, and gloo's plain RuntimeError if its text is about a connection. An OSError or an error of this
# project with the same words is about the bucket or a file.
_COLLECTIVE_TYPES: Final = re.compile(r"(torch\.distributed\.)?Dist\w*Error$")
_MAYBE_COLLECTIVE_TYPE: Final = "RuntimeError"
_COLLECTIVE_WORDS: Final = re.compile(
    r"gloo|nccl|ProcessGroup|Connection (closed|reset|refused)|Broken pipe|Socket ?(Timeout|closed)",
    re.IGNORECASE,
)
# Exceptions of the surroundings, by name, at any place in a chain of direct causes ("raise ... from").
_SURROUNDINGS_TYPES: Final = re.compile(
    r"(\w+\.)*(OSError|IOError|EnvironmentError|FileNotFoundError|FileExistsError|PermissionError"
    r"|NotADirectoryError|IsADirectoryError|BlockingIOError|InterruptedError|ChildProcessError"
    r"|ProcessLookupError|EOFError|MemoryError|\w*(Connect\w*|Timeout|TimedOut|BrokenPipe)Error|timeout"
    r"|gaierror|herror|SSLError|ConfigError|StoreError|NotFound|AccessDenied|OutOfMemoryError|AcceleratorError)$"
)
# torch raises a plain RuntimeError for most of them.
_SURROUNDINGS_WORDS: Final = re.compile(
    r"out of memory|not enough memory|can't allocate|cannot allocate|No space left|Disk quota|Input/output error"
    r"|Read-only file system|Stale file handle|Too many open files|Resource temporarily unavailable|unable to (mmap|open)"
    r"|CUDA (driver )?error|CUDNN_STATUS|CUBLAS_STATUS|CUDA-capable device|ECC error|NVML",
    re.IGNORECASE,
)
# Wrong indices fail at every attempt: a token beyond the vocabulary, an index beyond a tensor.
_PROGRAM_WORDS: Final = re.compile(
    r"device-side assert|illegal (memory access|address)", re.IGNORECASE
)
_NO_EVIDENCE: Final = (1, ORPHANED_EXIT_CODE)
"""Exit codes that prove nothing without an error file: Python's own (there may have been no room or memory for the
file), and the code of a worker whose channel to the agent broke."""
_DIRECT_CAUSE: Final = "\nThe above exception was the direct cause of the following exception:\n"
_CONTEXT: Final = "\nDuring handling of the above exception, another exception occurred:\n"
_EXCEPTION_LINE: Final = re.compile(r"^([A-Za-z_][\w.]*)(?:: (.*))?$", re.MULTILINE)
_CRASHES: Final = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
# Text that differs between nodes and between attempts: UUIDs, names from Python's tempfile (eight characters after a
# known prefix or `tmp`), addresses, hashes, and numbers.
_VARYING: Final = re.compile(
    r"\b[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b"
    r"|(?<=elastic_pt-)[a-z0-9_]{8}\b|(?<=\bworkers-)[a-z0-9_]{8}\b|(?<=\bpymp-)[a-z0-9_]{8}\b"
    r"|(?<=/tmp)[a-z0-9_]{8}\b|[a-z0-9_]{8}(?=/attempt_)"
    r"|\b(0x)?(?=[a-fA-F]*\d)[0-9a-fA-F]{6,}\b|0x[0-9a-fA-F]+|\d+"
)


class FailureCause(StrEnum):
    """The cause of a worker's end, from root to symptom: of several failures the first in this order counts."""

    OOM = "oom"
    """The kernel killed it because memory ran out."""
    SIGNAL = "signal"
    EXCEPTION = "exception"
    EXIT = "exit"
    """It exited with a code and recorded no exception."""
    HANG = "hang"
    """The watchdog killed it."""
    COLLECTIVE = "collective"
    """A collective operation failed because another worker was gone."""


@dataclass(frozen=True)
class WorkerFailure:
    """Why a worker ended."""

    rank: int
    cause: FailureCause
    exit_code: int | None
    """Negative for a signal; None if the agent killed it."""
    message: str = ""
    """One line: the exception, or the watchdog's cause."""
    traceback: str = ""
    """The exception's traceback; only its end if it is long."""
    stacks: str = ""
    """Python stacks of all threads, for a hang or a fatal signal that Python could still handle."""
    step: int | None = None
    """Steps of the run that it had done; None if unknown."""
    signature: str = ""
    """Equal for equal failures of the program: the exception without its numbers and addresses, the exit code, or
    the signal of a crash. Empty for failures of the surroundings."""

    @property
    def surroundings(self) -> bool:
        """Whether the surroundings caused it, so that a later attempt may succeed."""
        return not self.signature

    @property
    def collateral(self) -> bool:
        """Whether it is only a consequence of the loss of another worker."""
        return self.cause is FailureCause.COLLECTIVE

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        match self.cause:
            case FailureCause.OOM:
                what = f"out of memory{at} (cgroup oom_kill)"
            case FailureCause.SIGNAL:
                what = f"killed by {_signal_name(-(self.exit_code or 0))}{at}"
            case FailureCause.EXCEPTION:
                what = f"raised {self.message}{at and f' (step {self.step})'}"
            case FailureCause.EXIT:
                what = f"exited with {self.exit_code}{at}"
            case FailureCause.HANG:
                what = self.message
            case FailureCause.COLLECTIVE:
                what = f"lost the others: {self.message}{at and f' (step {self.step})'}"
        return f"worker {self.rank} {what}"


@dataclass(frozen=True)
class RecordedError:
    """The content of a worker's error file."""

    message: str
    """`Type: text`."""
    traceback: str
    recorded_s: float
    """When it was written, on the machine's wall clock; only the order within this node matters."""


@dataclass(frozen=True)
class Evidence:
    """All evidence about one worker after its generation has ended on this node."""

    rank: int
    exit_code: int | None = None
    """None if it ran until the agent killed it because another worker had ended."""
    error: RecordedError | None = None
    hang: Hang | None = None
    oom_killed: bool = False
    stacks: str = ""
    step: int | None = None


def root_cause(evidence: Iterable[Evidence]) -> WorkerFailure:
    """The failure that caused the others. At least one worker must have failed by itself."""
    order = list(FailureCause)
    found = [(each, failure) for each in evidence if (failure := classify(each)) is not None]
    return min(
        found,
        key=lambda pair: (
            order.index(pair[1].cause),
            math.inf if pair[0].error is None else pair[0].error.recorded_s,
        ),
    )[1]


def classify(evidence: Evidence) -> WorkerFailure | None:
    """One worker's failure; None if it did not fail by itself."""
    error, exit_code = evidence.error, evidence.exit_code
    message = traceback = signature = ""
    if error is not None:
        cause = FailureCause.COLLECTIVE if _is_collective(error) else FailureCause.EXCEPTION
        message, traceback = _one_line(error.message), _bounded(error.traceback)
        if cause is FailureCause.EXCEPTION and not _of_surroundings(error):
            signature = _VARYING.sub("#", message)
    elif exit_code is not None and exit_code < 0:
        oom = evidence.oom_killed and exit_code == -signal.SIGKILL
        cause = FailureCause.OOM if oom else FailureCause.SIGNAL
        if _aborted_by_native_thread(exit_code, evidence.stacks):
            cause, message = FailureCause.COLLECTIVE, "aborted by a native thread"
        elif -exit_code in _CRASHES:
            signature = _signal_name(-exit_code)
    elif exit_code is not None:
        cause = FailureCause.EXIT
        signature = "" if exit_code in _NO_EVIDENCE else f"exit {exit_code}"
    elif evidence.hang is not None:
        cause, message = FailureCause.HANG, str(evidence.hang)
    else:
        return None
    return WorkerFailure(
        evidence.rank,
        cause,
        exit_code,
        message,
        traceback,
        _bounded(evidence.stacks),
        evidence.step,
        signature,
    )


def read_error_file(path: Path) -> RecordedError | None:
    """The recorded error; None if there is none, or if the worker was killed while it wrote the file."""
    try:
        recorded = json.loads(path.read_text(errors="replace"))["message"]
        traceback = str(recorded["extraInfo"]["py_callstack"])
        return RecordedError(str(recorded["message"]), traceback, path.stat().st_mtime)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_collective(error: RecordedError) -> bool:
    kind = error.message.partition(":")[0]
    return bool(_COLLECTIVE_TYPES.match(kind)) or (
        kind == _MAYBE_COLLECTIVE_TYPE and bool(_COLLECTIVE_WORDS.search(error.message))
    )


def _of_surroundings(error: RecordedError) -> bool:
    """Whether the exception, or one that it was raised `from`, is about the surroundings."""
    kind, _, text = error.message.partition(": ")
    chain = [(kind, text)]
    # Only `raise ... from` names a cause; an exception that was being handled need not be one.
    *causes, _ = error.traceback.rpartition(_CONTEXT)[2].split(_DIRECT_CAUSE)
    chain += [line for part in causes for line in _EXCEPTION_LINE.findall(part)]
    if _PROGRAM_WORDS.search(error.message):
        return False
    return any(
        _SURROUNDINGS_TYPES.match(kind)
        or (kind.endswith("RuntimeError") and _SURROUNDINGS_WORDS.search(text))
        for kind, text in chain
    )


def _aborted_by_native_thread(exit_code: int, stacks: str) -> bool:
    """Whether a thread without Python frames called abort(), as NCCL's watchdog does when it loses a peer.

    Python's fault handler marks the thread that received a fatal signal as current, if that is a Python thread.
    """
    return exit_code == -signal.SIGABRT and "Aborted" in stacks and "Current thread" not in stacks


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _one_line(text: str) -> str:
    """One bounded line that can be written as UTF-8: an exception's text may hold lone surrogates."""
    clean = text.encode("utf-8", "backslashreplace").decode()
    return " ".join(clean.split())[:_MESSAGE_CHARACTERS_MAX]


def _bounded(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= _TRACEBACK_CHARACTERS_MAX:
        return text
    return _CUT + text[-_TRACEBACK_CHARACTERS_MAX:]
