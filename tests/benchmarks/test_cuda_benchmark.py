"""The parts of `benchmarks/cuda` that need no GPU: the list of wheels, the data, the results, the parts' names."""

import importlib
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.cuda import wheels
from benchmarks.cuda.__main__ import LIMITS_S
from benchmarks.cuda.report import Report, print_table, read_results, write_results
from benchmarks.cuda.sizes import SIZES
from benchmarks.synthetic import write_random_tokens
from elastic_pt.data.cache import ShardCache
from elastic_pt.data.manifest import read_manifest
from elastic_pt.data.shards import TokenReader
from elastic_pt.store.open import open_store


def test_wheels_leave_out_torch_and_cuda() -> None:
    """The list holds what a worker imports, and neither torch, its libraries, nor the large packages of no use here."""
    needed = wheels.needed()
    assert {"pydantic", "pydantic-core", "aiohttp", "structlog", "numpy"} <= needed
    assert not needed & {"torch", "triton", "pyarrow", "matplotlib", "pillow", "pytest"}
    # The binding to NVML is one file, and its library comes with the driver.
    assert {name for name in needed if name.startswith("nvidia")} == {"nvidia-ml-py"}


def test_wheels_hold_every_dependency_of_pyproject() -> None:
    """Each dependency in pyproject.toml is in the list unless it is left out by name: the installed metadata may be old."""
    names = {wheels.normal(Requirement(text).name) for text in wheels.dependencies()}
    assert names - wheels._LEFT_OUT <= wheels.needed()
    assert {"tenacity", "tomlkit"} <= names


def test_random_tokens_are_prepared_data(tmp_path: Path) -> None:
    """The synthetic data set reads like one that `prepare` wrote, and the same seed gives the same tokens."""
    first, second = (
        read_manifest(open_store(write_random_tokens(tmp_path / name, 97, 500)))
        for name in ("a", "b")
    )
    assert first.fingerprint == second.fingerprint
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    reader = TokenReader(first, open_store(f"file://{tmp_path / 'a'}"), cache=cache)
    assert reader.stream(0, "train", 0, 500).max() < 97


def test_rows_are_kept_although_a_case_fails(tmp_path: Path) -> None:
    """Each row is in the file at once, a failed case is a row too, and the table shows both."""
    write_results(tmp_path, {"machine": {"device": "cpu"}, "rows": []})
    report = Report(tmp_path, "speed")
    report.row("good", "1 ms", step_s=0.001)
    with report.attempt("bad"):
        raise ValueError("no memory")
    rows = read_results(tmp_path)["rows"]
    assert [(row["case"], row["failed"]) for row in rows] == [("good", False), ("bad", True)]
    print_table(tmp_path)
    table = (tmp_path / "table.txt").read_text()
    assert "1 ms" in table
    assert "FAILED: ValueError: no memory" in table


def test_every_part_and_size_exists() -> None:
    """Each part of the command line is a module with `run`, and its limit leaves it below nine minutes."""
    for part, limit_s in LIMITS_S.items():
        assert callable(importlib.import_module(f"benchmarks.cuda.{part}").run)
        assert limit_s < 540
    parameters = [
        12 * shape.layers * shape.width**2 + SIZES["full"].vocabulary * shape.width
        for shape in SIZES["full"].speed
    ]
    assert [round(count / 1e6, -1) for count in parameters] == [120, 350, 1010]
