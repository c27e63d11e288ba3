"""The table of faults is complete and names tests that exist; tests name faults that are in it."""

import ast
import re
from pathlib import Path

import pytest

from elastic_pt.chaos.scenario import shipped

ROOT = Path(__file__).parents[2]
FAULTS = 52
INVARIANTS = 10
SUITES = [
    path
    for folder in ("tests", "chaos_tests")
    for path in sorted((ROOT / folder).rglob("test_*.py"))
]


def rows() -> dict[str, list[str]]:
    """The cells of each row of the page, by number."""
    lines = (ROOT / "docs" / "faults.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| [FI]\d", line)]
    found = {number: rest for number, *rest in cells}
    assert len(found) == len(cells), "a number has two rows"
    return found


def docstrings_of(path: Path) -> dict[str, str]:
    """The docstring of each test of a file, by name."""
    return {
        node.name: ast.get_docstring(node) or ""
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_fault_and_invariant_has_its_row() -> None:
    """Rows are numbered in order without gaps, and each says what holds it, or that nothing does yet."""
    wanted = [f"I{n + 1}" for n in range(INVARIANTS)] + [f"F{n + 1}" for n in range(FAULTS)]
    assert list(rows()) == wanted
    for number, cells in rows().items():
        assert len(cells) == (3 if number.startswith("F") else 2), number
        assert re.search(r"::|scenario:", cells[-1]) or cells[-1].startswith("not yet"), number
        if number.startswith("F"):
            assert "`scenario:" in cells[-1] or "No scenario: " in cells[-1], number


def test_the_table_names_the_scenarios_of_each_row_and_no_others() -> None:
    """A row names exactly the scenarios that say that they check it."""
    for number, cells in rows().items():
        if number.startswith("I"):  # invariants hold in every scenario
            continue
        named = set(re.findall(r"`scenario:([a-z0-9-]+)`", cells[-1]))
        assert named == {each.name for each in shipped() if number in each.rows}, number


@pytest.mark.parametrize(("number", "cells"), rows().items())
def test_every_test_that_is_named_exists(number: str, cells: list[str]) -> None:
    """Whoever renames or removes a test is told which promise it held."""
    for path, name in re.findall(r"`([\w/.]+)::(\w+)`", cells[-1]):
        assert (ROOT / path).is_file(), f"{number}: {path}"
        assert name in docstrings_of(ROOT / path), f"{number}: {path}::{name}"


@pytest.mark.parametrize("path", SUITES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_number_in_a_test_is_in_the_table_and_the_table_names_the_test(path: Path) -> None:
    """A test that begins with the numbers of faults or invariants stands in their rows."""
    table = rows()
    for name, sentence in docstrings_of(path).items():
        for number in re.findall(r"\b[FI]\d+\b", sentence.partition(":")[0]):
            assert number in table, f"{path.name}::{name}: {number} is no row of docs/faults.md"
            held = f"{path.relative_to(ROOT)}::{name}"
            assert f"`{held}`" in table[number][-1], f"docs/faults.md, {number}: expected {held}"
