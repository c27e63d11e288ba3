"""Part `numerics`: the cost of exact against native arithmetic, alternating in one run (`benchmarks/exact.py`)."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from benchmarks.cuda.report import Report
from benchmarks.cuda.sizes import SIZES

_PAIRS: Final = 7
_EXACT: Final = Path(__file__).resolve().parent.parent / "exact.py"


def run(options: argparse.Namespace, report: Report) -> None:
    """Run the benchmark with one worker. Raises `CalledProcessError` with its output if it fails."""
    shape = SIZES[options.size].numerics
    config = shape.config(options.device)
    settings = {
        "data.sequence_length": shape.sequence_length,
        "model.layers": shape.layers,
        "model.width": shape.width,
        "model.heads": shape.heads,
        "model.kv_heads": shape.heads,
        "train.global_batch": config.train.global_batch,
        "train.micro_batch": shape.micro_batch,
    }
    with report.attempt(shape.name), tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "exact.json"
        # -P: do not search modules in the script's folder, because its `cuda` is not the CUDA library.
        command = [sys.executable, "-P", str(_EXACT), "--world-size", "1", "--pairs", str(_PAIRS)]
        command += ["--device", options.device, "--json", str(path)]
        for name, value in settings.items():
            command += ["--set", f"{name}={value}"]
        subprocess.run(command, check=True)
        found = json.loads(path.read_text(encoding="utf-8"))
        report.row(
            shape.name,
            f"exact / native {found['ratio']:.3f} (median of {len(found['ratios'])} pairs, "
            f"{min(found['ratios']):.3f} to {max(found['ratios']):.3f}); exact {found['exact_s'] * 1e3:.1f} ms, "
            f"native {found['native_s'] * 1e3:.1f} ms, of which the exact norm {found['norm_s'] * 1e3:.1f} ms",
            **found,
        )
