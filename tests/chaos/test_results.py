"""The page with the results of a full run."""

import datetime
import json
from pathlib import Path

from chaos_tests.results import page, read_results, read_stock, stock_cell


def test_page_tells_costs_and_failures(tmp_path: Path) -> None:
    """Each scenario has one row, by name, with its worst recovery; a failed one names its oracles."""
    fault = {"kind": "kill_node", "recovery_s": 0.51, "lost_steps": 1}
    other = {"kind": "bucket_away", "recovery_s": None, "lost_steps": None}
    results = {
        "b": ([fault, {**fault, "recovery_s": 2.0}, other], [("digest", True)]),
        "a": ([other], [("digest", False), ("ledger", True)]),
    }
    for name, (faults, verdicts) in results.items():
        (tmp_path / name).mkdir()
        content = {
            "name": name,
            "rows": ["F4", "F6"],
            "passed": all(passed for _, passed in verdicts),
            "faults": faults,
            "verdicts": [{"oracle": oracle, "passed": passed} for oracle, passed in verdicts],
        }
        (tmp_path / name / "result.json").write_text(json.dumps(content))
    (tmp_path / "stock.json").write_text(
        json.dumps([{"name": "b", "outcome": "completed", "recovery_s": 20.9, "lost_steps": 2}])
    )
    stock = read_stock(tmp_path / "stock.json")
    text = page(read_results(tmp_path), stock, datetime.date(2026, 11, 28))
    assert text.splitlines()[-4:] == [
        "| `a` | F4, F6 | `bucket_away` | FAILED: digest | no pause | 0 |  |",
        "| `b` | F4, F6 | `kill_node`, `bucket_away` | passed | 2.0 s | 1 | 20.9 s, 2 lost |",
        "",
        "1 of 2 scenarios passed.",
    ]


def test_stock_that_never_trains_again_is_told_so() -> None:
    """It is stuck, it has ended, or it goes on and ends before its last step."""
    none = {"recovery_s": None, "lost_steps": None}
    assert stock_cell({"outcome": "stuck", **none}) == "stuck"
    assert stock_cell({"outcome": "ended", "recovery_s": 3.0, "lost_steps": 4}) == (
        "3.0 s, 4 lost, then ended"
    )
