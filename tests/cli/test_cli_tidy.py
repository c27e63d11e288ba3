"""`elastic-pt tidy`: one line for each thing that it removes, and a total."""

import shutil
from pathlib import Path

from command_line import Trained, assert_one_line_mistake, elastic_pt

TORN = "ckpt/0000000150-g1-beef"


def test_each_removal_is_a_line_and_the_last_line_is_the_total(
    trained: Trained, tmp_path: Path
) -> None:
    """An attempt of a completed run goes, checkpoints stay, and a second call finds nothing."""
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    (run / TORN).mkdir()
    (run / TORN / "shard-00000.safetensors").write_bytes(b"half")
    total = "1 checkpoint directories with 1 files, and parts of 0 uploads; 3 checkpoints are kept"
    would = elastic_pt("tidy", run, "--dry-run")
    assert would.out.splitlines() == [f"would remove {TORN}: 1 files", f"would remove {total}"]
    done = elastic_pt("tidy", run)
    assert done.out.splitlines() == [f"removed {TORN}: 1 files", f"removed {total}"]
    assert not list((run / TORN).glob("*"))
    again = elastic_pt("tidy", run)
    assert again.out.splitlines() == [
        "removed " + total.replace("1 ch", "0 ch").replace("1 f", "0 f")
    ]
    digests = [elastic_pt("digest", each, "--json").json for each in (trained.run, run)]
    assert digests[0] == digests[1]


def test_a_place_without_a_run_is_a_mistake(tmp_path: Path) -> None:
    """The collector's cron job must not look well when its URL is wrong."""
    assert_one_line_mistake(elastic_pt("tidy", tmp_path / "nothing"), "no run there")
