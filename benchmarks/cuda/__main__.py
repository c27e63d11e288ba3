"""Runs the parts one after the other, each in its own process with a time limit. `run.sh` starts it."""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Final

from benchmarks.cuda.report import Report, machine, print_table, read_results, write_results
from benchmarks.cuda.sizes import CPU_SLOWER, SIZES
from elastic_pt.chaos.processes import kill_all, mark_children
from elastic_pt.workers.forking import die_with_parent

LIMITS_S: Final = {
    "numerics": 90.0,
    "snapshot": 150.0,
    "digests": 300.0,
    "recovery": 200.0,
    "speed": 300.0,
}
"""The parts in order, and the maximum seconds of each. Short parts come first."""
_LOG_BYTES_MAX: Final = 200_000
_COPY_TIMEOUT_S: Final = 5.0


def main() -> None:
    """Parse the command line. Run all parts, or in a part's process only this part."""
    parser = argparse.ArgumentParser(prog="benchmarks/cuda/run.sh", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(LIMITS_S)}; default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--seconds", type=float, default=560.0, help="for all parts together")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(LIMITS_S):
        parser.error(f"{', '.join(sorted(unknown))}: expected one of {', '.join(LIMITS_S)}")
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    if options.work is not None:
        (part,) = options.parts
        importlib.import_module(f"benchmarks.cuda.{part}").run(options, Report(options.out, part))
        return
    results = read_results(options.out)
    results["machine"] = machine(options.device)
    write_results(options.out, results)
    # Exit normally on SIGTERM too, so that all started processes are ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    deadline_s = time.monotonic() + options.seconds
    scale = CPU_SLOWER if options.device == "cpu" else 1.0
    for part in [each for each in LIMITS_S if each in (options.parts or LIMITS_S)]:
        _run_part(part, options, min(scale * LIMITS_S[part], deadline_s - time.monotonic()))
        print_table(options.out)


def _run_part(part: str, options: argparse.Namespace, limit_s: float) -> None:
    """Run one part in its own process. Ends all its processes and stores the logs of its agents with the results."""
    report = Report(options.out, part)
    if limit_s < 1.0:
        report.row(
            "all", f"not started: no time left of {options.seconds:g} s (--seconds)", failed=True
        )
        return
    with tempfile.TemporaryDirectory(prefix=f"cuda-{part}-") as work, mark_children() as mark:
        command = [sys.executable, "-m", "benchmarks.cuda", part, "--work", work]
        command += ["--device", options.device, "--size", options.size, "--out", str(options.out)]
        started_s = time.monotonic()
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        assert child.stdout is not None
        copying = threading.Thread(
            target=_copy_output, args=(child.stdout, Path(work, "output.log")), daemon=True
        )
        copying.start()
        try:
            code = child.wait(limit_s)
            if code != 0:
                report.row("all", f"ended with exit code {code}; see its error above", failed=True)
        except subprocess.TimeoutExpired:
            report.row("all", f"ended after its limit of {limit_s:.0f} s", failed=True)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            kill_all(mark)
            copying.join(_COPY_TIMEOUT_S)
        print(f"{part}: {time.monotonic() - started_s:.0f} s", flush=True)
        _keep_logs(part, Path(work), options.out)


def _copy_output(stream: IO[bytes], path: Path) -> None:
    """Copy to this process's output, and to a file for the archive of logs."""
    with path.open("wb") as file:
        for line in stream:
            file.write(line)
            file.flush()
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


def _keep_logs(part: str, work: Path, out: Path) -> None:
    """Write the last lines of the part's output and of its agents' logs to one small archive."""
    with tarfile.open(out / f"{part}-logs.tar.gz", "w:gz") as archive:
        for path in sorted(work.rglob("*.log")):
            short = work / "short"
            short.write_bytes(path.read_bytes()[-_LOG_BYTES_MAX:])
            archive.add(short, arcname=str(path.relative_to(work)))


if __name__ == "__main__":
    main()
