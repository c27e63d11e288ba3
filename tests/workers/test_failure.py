"""From the evidence about workers to one cause."""

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

from elastic_pt.workers.failure import (
    Evidence,
    FailureCause,
    RecordedError,
    WorkerFailure,
    classify,
    read_error_file,
    root_cause,
)
from elastic_pt.workers.heartbeat import WorkerPhase
from elastic_pt.workers.watchdog import Hang

STOPPED = Hang(True, 2.13, 2.0, 12, WorkerPhase.COMPUTE, "T")
GLOO = "RuntimeError: [/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:21126"
NATIVE_ABORT = "Fatal Python error: Aborted\n\nThread 0x00007f (most recent call first):\n  File"
OWN_ABORT = NATIVE_ABORT.replace("Thread 0x", "Current thread 0x")


def error(message: str, recorded_s: float = 0.0) -> RecordedError:
    """An exception with a short traceback."""
    return RecordedError(message, f"Traceback (most recent call last):\n{message}", recorded_s)


def chained(
    *messages: str, joint: str = "direct cause of the following exception"
) -> RecordedError:
    """An exception that was raised from others, as Python prints it: the first one first."""
    above = {
        "direct cause of the following exception": "The above exception was the direct cause of "
        "the following exception:",
        "context": "During handling of the above exception, another exception occurred:",
    }[joint]
    parts = [
        f'Traceback (most recent call last):\n  File "x.py", line 1\n{each}' for each in messages
    ]
    return RecordedError(messages[-1], f"\n\n{above}\n\n".join(parts), 0.0)


@pytest.mark.parametrize(
    "evidence",
    [
        Evidence(0, -9),
        Evidence(0, -9, oom_killed=True),
        Evidence(0, -7),
        Evidence(0, None, hang=STOPPED),
        Evidence(0, 1, error("OSError: [Errno 28] No space left on device")),
        Evidence(
            0, 1, error("FileNotFoundError: [Errno 2] No such file or directory: 'manifest.json'")
        ),
        Evidence(0, 1, error("PermissionError: [Errno 13] Permission denied: '/data'")),
        Evidence(0, 1, error("TimeoutError: timed out")),
        Evidence(0, 1, error("ConnectionResetError: [Errno 104] Connection reset by peer")),
        Evidence(0, 1, error("MemoryError: ")),
        Evidence(
            0, 1, error("ConfigError: data.cache = '/tmp/x': expected a directory of your own")
        ),
        Evidence(0, 1),
        Evidence(0, 75),
        Evidence(0, 1, error("MemoryError")),
        Evidence(0, 1, error("NotFound: read of s3://b/data: missing")),
        Evidence(0, 1, error("AccessDenied: read of s3://b/data: 403")),
        Evidence(0, 1, error("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")),
        Evidence(0, 1, error("AcceleratorError: CUDA error: uncorrectable ECC error encountered")),
        Evidence(
            0,
            1,
            error(
                "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"
            ),
        ),
        Evidence(
            0, 1, error("RuntimeError: unable to mmap 4096 bytes: Cannot allocate memory (12)")
        ),
        Evidence(
            0,
            1,
            chained(
                "OSError: [Errno 5] Input/output error", "elastic_pt.errors.DataError: shard: EIO"
            ),
        ),
        Evidence(
            0,
            1,
            chained(
                "botocore.exceptions.EndpointConnectionError: Could not connect",
                "elastic_pt.errors.StoreError: no answer",
                "elastic_pt.errors.DataError: the manifest cannot be read",
            ),
        ),
    ],
)
def test_failures_of_the_surroundings_are_recognised(evidence: Evidence) -> None:
    """Failures of space, I/O, store, memory, device and network, and signals, may be gone at the next attempt."""
    failure = classify(evidence)
    assert failure is not None
    assert failure.surroundings
    assert not failure.signature


@pytest.mark.parametrize(
    "evidence",
    [
        Evidence(0, 1, error("ValueError: rows do not match")),
        Evidence(0, 1, error("AssertionError")),
        Evidence(
            0, 1, error("RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")
        ),
        Evidence(
            0, 1, error("DataError: shard-0: corrupt, its SHA-256 is not that of the manifest")
        ),
        Evidence(0, 1, error("KeyError: 'OSError'")),
        Evidence(0, 1, error("AcceleratorError: CUDA error: device-side assert triggered")),
        Evidence(0, 1, error("RuntimeError: CUDA error: an illegal memory access was encountered")),
        Evidence(0, 1, error("ValueError: the text says: No space left on device")),
        Evidence(
            0, 1, chained("FileNotFoundError: no cache", "ValueError: bad rows", joint="context")
        ),
        Evidence(0, -11),
        Evidence(0, 3),
    ],
)
def test_failures_of_the_program_are_recognised(evidence: Evidence) -> None:
    """Other exceptions, crashes and exit codes are failures of the program. So are errors of the surroundings that
    were only raised while another error was handled."""
    failure = classify(evidence)
    assert failure is not None
    assert not failure.surroundings


@pytest.mark.parametrize(
    ("evidence", "cause", "text", "signature"),
    [
        (
            Evidence(3, -9, step=12),
            "signal",
            "worker 3 killed by SIGKILL at step 12",
            "",
        ),
        (Evidence(3, -9), "signal", "worker 3 killed by SIGKILL", ""),
        (Evidence(3, -11, step=0), "signal", "worker 3 killed by SIGSEGV at step 0", "SIGSEGV"),
        (Evidence(3, -50), "signal", "worker 3 killed by signal 50", ""),
        (
            Evidence(2, -9, oom_killed=True, step=5),
            "oom",
            "worker 2 out of memory at step 5 (cgroup oom_kill)",
            "",
        ),
        (Evidence(2, -11, oom_killed=True), "signal", "worker 2 killed by SIGSEGV", "SIGSEGV"),
        (
            Evidence(1, 1, error("ValueError: bad row 17 at 0x7f3a\nin shard 3"), step=12),
            "exception",
            "worker 1 raised ValueError: bad row 17 at 0x7f3a in shard 3 (step 12)",
            "ValueError: bad row # at # in shard #",
        ),
        (
            Evidence(1, None, error("ValueError: killed while it was ending"), hang=STOPPED),
            "exception",
            "worker 1 raised ValueError: killed while it was ending",
            "ValueError: killed while it was ending",
        ),
        (Evidence(1, 3, step=1), "exit", "worker 1 exited with 3 at step 1", "exit 3"),
        (
            Evidence(0, None, hang=STOPPED, step=12),
            "hang",
            "worker 0 wrote no heartbeat for 2.1 s at step 12 (stopped)",
            "",
        ),
        (
            Evidence(2, 1, error(GLOO), step=9),
            "collective",
            f"worker 2 lost the others: {GLOO} (step 9)",
            "",
        ),
        (
            Evidence(2, 1, error("DistBackendError: NCCL error: remote process exited")),
            "collective",
            "worker 2 lost the others: DistBackendError: NCCL error: remote process exited",
            "",
        ),
        (
            Evidence(2, -6, stacks=NATIVE_ABORT),
            "collective",
            "worker 2 lost the others: aborted by a native thread",
            "",
        ),
        (Evidence(2, -6, stacks=OWN_ABORT), "signal", "worker 2 killed by SIGABRT", "SIGABRT"),
        (
            Evidence(2, 1, error("StoreError: s3://b/k: Connection reset by peer")),
            "exception",
            "worker 2 raised StoreError: s3://b/k: Connection reset by peer",
            "",
        ),
        (
            Evidence(2, 1, error("RuntimeError: expected 3 rows, got 2")),
            "exception",
            "worker 2 raised RuntimeError: expected 3 rows, got 2",
            "RuntimeError: expected # rows, got #",
        ),
    ],
)
def test_failures_report_their_cause(
    evidence: Evidence, cause: str, text: str, signature: str
) -> None:
    """Each kind of end has one cause and one line that names it. It has a signature only if it may happen again."""
    failure = classify(evidence)
    assert failure is not None
    assert (failure.cause, str(failure), failure.signature) == (cause, text, signature)
    assert failure.collateral is (cause == "collective")


def test_a_worker_that_the_agent_killed_has_no_failure() -> None:
    """A worker that ran until the agent killed it did not fail, even if there was an OOM kill."""
    assert classify(Evidence(0, None, oom_killed=True, stacks="Thread 0x1", step=3)) is None


def test_the_root_cause_is_reported_not_its_consequences() -> None:
    """Of several failures the root cause counts; of two exceptions, the first."""
    collateral = Evidence(0, 1, error(GLOO, recorded_s=1.0))
    second = Evidence(1, 1, error("ValueError: second", recorded_s=3.0))
    first = Evidence(2, None, error("ValueError: first", recorded_s=2.0))
    crashed = Evidence(3, -11)
    hung = Evidence(4, None, hang=STOPPED)
    out_of_memory = Evidence(5, -9, oom_killed=True)
    idle = Evidence(6)
    everything = [idle, collateral, hung, second, first, crashed, out_of_memory]
    order = []
    while len(everything) > 1:
        rank = root_cause(everything).rank
        order.append(rank)
        everything = [each for each in everything if each.rank != rank]
    assert order == [5, 3, 2, 1, 4, 0]


def test_long_texts_keep_their_end() -> None:
    """Long texts keep their end, which has the error and the main thread. The message is one short line."""
    failure = classify(
        Evidence(
            0,
            1,
            RecordedError("ValueError: " + "word\n" * 9999, "x" * 99_999 + "the end", 0.0),
            stacks="y" * 99_999 + "main",
        )
    )
    assert failure is not None
    assert len(failure.message) == 500
    assert "\n" not in str(failure)
    for text, end in ((failure.traceback, "the end"), (failure.stacks, "main")):
        assert text.startswith("… (cut)\n")
        assert text.endswith(end)
        assert len(text) < 17_000


def test_the_error_file_of_torch_elastic_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error file of a worker has the exception and its whole traceback, with chained exceptions."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert read_error_file(path) is None
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ValueError("outer, füll") from inner
    except ValueError as outer:
        ErrorHandler().record_exception(outer)
    recorded = read_error_file(path)
    assert recorded is not None
    assert recorded.message == "ValueError: outer, füll"
    assert "KeyError: 'inner'" in recorded.traceback
    assert "test_failure.py" in recorded.traceback
    assert recorded.recorded_s == path.stat().st_mtime


@pytest.mark.parametrize("text", ["", '{"message": {"mess', '{"message": "plain"}', "[]", "{}"])
def test_a_torn_or_foreign_error_file_is_ignored(tmp_path: Path, text: str) -> None:
    """If a worker was killed while it wrote the file, there is no recorded error."""
    path = tmp_path / "error.json"
    path.write_text(text)
    assert read_error_file(path) is None


def test_a_failure_survives_json(tmp_path: Path) -> None:
    """The cause is written as plain text."""
    failure = WorkerFailure(1, FailureCause.OOM, -9)
    assert json.dumps({"cause": failure.cause}) == '{"cause": "oom"}'


def test_the_same_failure_has_one_signature_on_every_node() -> None:
    """Numbers, addresses, and the names of scratch and temporary directories are not part of a signature."""

    def signature(scratch: str, address: str) -> str:
        text = f"ValueError: {scratch}/workers-{scratch[-8:]}/0: row 17 at {address}"
        failure = classify(Evidence(0, 1, error(text)))
        assert failure is not None
        return failure.signature

    here = signature("/dev/shm/elastic_pt-a1b_2xyz", "0x7f12")
    there = signature("/dev/shm/elastic_pt-q9z0kk_w", "0x55aa")
    assert here == there
    assert here.startswith("ValueError: /dev/shm/elastic_pt-#/workers-#/#: row # at #")


def test_lone_surrogates_in_a_message_are_escaped() -> None:
    """A lone surrogate in an exception's text, for example from a file name, is replaced by its escape."""
    failure = classify(Evidence(0, 1, error("ValueError: bad name '\udcff'")))
    assert failure is not None
    for text in (failure.message, failure.signature, failure.traceback, str(failure)):
        text.encode("utf-8")
    assert "\\udcff" in failure.message
