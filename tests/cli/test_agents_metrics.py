"""Real agents serve what happened to their run, in a form that Prometheus accepts."""

import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from command_line import Trained, elastic_pt
from prometheus_client.parser import text_string_to_metric_families

from elastic_pt.config import load_config
from elastic_pt.fleet.local import Fleet
from tests.services.fixtures import left_out

WAIT_S = 120.0
PROMTOOL = shutil.which("promtool")


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll until a condition holds."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.2)


def scrape(url: str) -> str:
    """What an agent serves now."""
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        return str(answer.read().decode())


def values(text: str) -> dict[tuple[str, ...], float]:
    """Every sample's value, by name and the values of its labels other than run, node and le."""
    return {
        (sample.name, *(v for k, v in sample.labels.items() if k not in ("run", "node"))): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_agents_count_what_happened_and_outlive_their_workers(
    prepared: Trained, tmp_path: Path
) -> None:
    """A node is killed: the other's counters rise on with new workers, and it alone has counted the loss and the recovery."""
    url = tmp_path / "run"
    config = load_config(
        prepared.config,
        [f"run.url={url}", "train.steps=1000000", "model.width=64", "elastic.join_window_s=3.0"],
    )
    with Fleet(config, tmp_path / "output") as fleet:
        fleet.start("a")
        fleet.start("b")
        until(lambda: any(url.glob("ckpt/*/manifest.json")), fleet.tail("a"))
        urls: dict[str, str] = {}
        text: dict[str, str] = {}

        def all_answer() -> bool:
            members = elastic_pt("status", url, "--json").json["members"]
            urls.update({each["node"]: each["metrics_url"] for each in members})
            return len(urls) == 2 and all(urls.values())

        def scraped(expected: dict[tuple[str, ...], float]) -> bool:
            """Whether a now serves at least these values, which do not all change in one moment."""
            text["a"] = scrape(urls["a"])
            found = values(text["a"])
            return all(found.get(name, 0) >= value for name, value in expected.items())

        whole = {
            ("elastic_pt_nodes", "active"): 2,
            ("elastic_pt_mirror_step",): 1,
            ("elastic_pt_checkpoint_committed_step",): 20,
        }
        until(all_answer, fleet.tail("b"))
        until(lambda: scraped(whole), "no members, mirrored step or commit")
        before = values(text["a"])
        text["b"] = scrape(urls["b"])
        fleet.kill("b")
        recovered = {("elastic_pt_recovery_seconds_count", "lost"): 1.0}
        until(lambda: scraped(recovered), fleet.tail("a"))
        after = values(text["a"])
    for node, each in text.items():
        for family in text_string_to_metric_families(each):
            for sample in family.samples:
                assert (sample.labels["run"], sample.labels["node"]) == (f"file://{url}", node)
    _agrees_with_the_faults(before, after)
    if PROMTOOL is None:
        left_out("promtool's check of the metrics of an agent")
    checked = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text["a"], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stderr


def _agrees_with_the_faults(
    before: dict[tuple[str, ...], float], after: dict[tuple[str, ...], float]
) -> None:
    assert after["elastic_pt_steps_total",] > before["elastic_pt_steps_total",] > 0
    assert after["elastic_pt_changes_total", "lost"] == 1
    assert after["elastic_pt_recovery_seconds_count", "lost"] == 1
    assert after["elastic_pt_changes_total", "left"] == 0
    assert after["elastic_pt_generation",] > before["elastic_pt_generation",]
    assert after["elastic_pt_nodes", "active"] == 1
    assert after["elastic_pt_world_size",] == 1
    assert sum(count for (name, *_), count in after.items() if name == "elastic_pt_workers") == 1
    assert after["elastic_pt_checkpoint_committed_step",] >= 20
    assert after["elastic_pt_steps_at_risk", "all"] >= 0
    assert after["elastic_pt_steps_at_risk", "node"] >= 0
    assert after["elastic_pt_store_requests_total", "create", "ok"] > 0
    assert after["elastic_pt_store_bytes_total", "written"] > 1000
    assert after["elastic_pt_checkpoint_upload_seconds_count",] > 0
    assert after["elastic_pt_mirror_bytes_total",] > 0
    assert after["elastic_pt_time_seconds_total", "productive"] > 0
    assert abs(after["elastic_pt_clock_seconds",] - time.time()) < WAIT_S
    assert after["process_cpu_seconds_total",] > 0
    assert not any(name.endswith("_created") for name, *_ in after)
