"""The page with the results of a full run."""

import datetime
import json
from pathlib import Path

from chaos_tests.results import page, read_results


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
    text = page(read_results(tmp_path), datetime.date(2026, 11, 28))
    assert text.splitlines()[-4:] == [
        "| `a` | F4, F6 | `bucket_away` | FAILED: digest | no pause | 0 |",
        "| `b` | F4, F6 | `kill_node`, `bucket_away` | passed | 2.0 s | 1 |",
        "",
        "1 of 2 scenarios passed.",
    ]
