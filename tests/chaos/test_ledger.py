"""What the history of a run must tell, on histories that are written by hand."""

from pathlib import Path
from typing import Any

import pytest

from elastic_pt.chaos.directory import Objection, check_ledger
from elastic_pt.checkpoint.history import StepHistory, write_history
from elastic_pt.config import TrainSection
from elastic_pt.runlog.records import Commit, Stop
from elastic_pt.store.open import open_store
from tests.chaos.made_up import checkpoint, generation, log_of, member

TRAIN = TrainSection(steps=2, global_batch=8, micro_batch=1)
LOG = log_of(
    (1.0, generation(1, member("node-0"))),
    (2.0, Commit((checkpoint(2),), "history")),
    (3.0, Stop("completed", 2)),
)


def line(step: int, loss: float) -> dict[str, Any]:
    """A line of the history."""
    told = {"z_loss": 0.0, "gradient_norm": 1.0, "learning_rate": 0.1, "sources": {}, "skipped": ""}
    return {"step": step, "rows": [8 * step - 8, 8 * step], "loss": loss, **told}


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (line(2, 5.5), ""),
        (line(2, 5.6), "line 2 of the history: {'loss': 5.6"),
        (line(2, 5.5) | {"rows": [0, 8]}, "step 2 of rows 0 to 8, expected step 2 of rows 8 to 16"),
    ],
)
def test_history_tells_what_the_undisturbed_run_tells(
    second: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """Its rows, and the same loss for each step."""
    store, history = open_store(f"file://{tmp_path}"), StepHistory()
    for each in (line(1, 5.75), second):
        history.add(each)
    write_history(store, "history", history.through(2))
    undisturbed = {1: line(1, 5.75), 2: line(2, 5.5)}
    if told:
        with pytest.raises(Objection) as objection:
            check_ledger(store, LOG, TRAIN, undisturbed)
        assert told in str(objection.value)
    else:
        assert check_ledger(store, LOG, TRAIN, undisturbed) == "2 steps, 16 rows, each once"
