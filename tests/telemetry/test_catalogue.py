"""The catalogue: what each event raises, what a scrape looks like, and how large it can become."""

import math
import re
import shutil
import subprocess
import time
from typing import Any

import pytest
from prometheus_client import generate_latest

from elastic_pt.telemetry.catalogue import Metrics, catalogue
from elastic_pt.telemetry.declaration import By
from elastic_pt.telemetry.flops import ModelFlops
from elastic_pt.telemetry.goodput import Bucket
from elastic_pt.telemetry.redaction import without_credentials
from tests.services.fixtures import left_out

PROMTOOL = shutil.which("promtool")
UNITS = ("seconds", "bytes", "ratio", "celsius", "watts")


def message(step: int = 1, **changes: Any) -> dict[str, Any]:
    """The report of a first worker about a step of 4 rows of 16 tokens on two workers."""
    return {
        "step": step,
        "world_size": 2,
        "loss": 2.5,
        "gradient_norm": 1.5,
        "learning_rate": 0.01,
        "rows": [4 * step - 4, 4 * step],
        "tokens": 64,
        "seconds": 0.5,
        "data_wait_s": 0.1,
        "skipped": "",
    } | changes


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """One sample as it is served."""
    return metrics.registry.get_sample_value(f"elastic_pt_{name}", labels)


def filled() -> Metrics:
    """Metrics with a value in every series that an agent can raise without a GPU."""
    metrics = Metrics("file:///run", "a", price_per_hour=2.0, flops=ModelFlops({"palm": 6.0}, 1e9))
    metrics.generation_starts(1, "start")
    metrics.step_done(message(sources={"web": [4, 2.5]}, phases={"data": 0.1}), again=False)
    metrics.account(dict.fromkeys(Bucket, 1.0), 15.0)
    for each in catalogue():
        collector = getattr(metrics, each.name)
        for child in [collector.labels(*each.labels) if each.labels else collector]:
            match each.kind:
                case "counter":
                    child.inc()
                case "gauge":
                    child.set(1)
                case "histogram":
                    child.observe(1)
    return metrics


def test_every_sample_has_run_and_node() -> None:
    """Any way of scraping can select one run and one node, in the metrics of the process too."""
    samples = [sample for family in filled().registry.collect() for sample in family.samples]
    assert {each.name.partition("_")[0] for each in samples} == {"elastic", "process"}
    assert {(each.labels["run"], each.labels["node"]) for each in samples} == {("file:///run", "a")}


def test_a_label_has_no_credentials() -> None:
    """Whoever reads a dashboard must not learn a password from the run's URL."""
    assert without_credentials("s3://key:secret@bucket/run?token=x") == "s3://bucket/run"
    assert without_credentials("file:///tmp/a run") == "file:///tmp/a run"


def test_promtool_accepts_every_metric() -> None:
    """Names, types and help texts follow Prometheus' conventions for all metrics, GPUs included."""
    if PROMTOOL is None:
        left_out("promtool's check of all metrics")
    checked = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=generate_latest(filled().registry), check=False
    )
    assert checked.returncode == 0


def test_names_and_texts_tell_units() -> None:
    """A reader finds the unit in the name, a sentence for each metric, and no metric twice."""
    names = [each.exposed_name for each in catalogue()]
    assert len(names) == len(set(names)) > 70
    for each in catalogue():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", each.name)
        assert each.text.endswith("."), each.name
        found = [unit for unit in UNITS if unit in each.name.split("_")]
        assert not found or each.unit in found or each.name == "tokens_per_second", each.name
        assert "rank" not in each.labels


def test_data_wait_has_a_cause_if_the_batch_was_late() -> None:
    """The wait of a step counts for its cause; a batch that was ready, and a worker of an earlier version, count for none."""
    metrics = Metrics()
    metrics.step_done(message(), again=False)
    assert value(metrics, "data_wait_seconds_total", cause="store") is None
    metrics.step_done(message(2, data_wait_cause="store"), again=False)
    metrics.step_done(message(3, data_wait_cause="local", data_wait_s=0.25), again=False)
    assert value(metrics, "data_wait_seconds_total", cause="store") == 0.1
    assert value(metrics, "data_wait_seconds_total", cause="local") == 0.25


def test_a_step_raises_what_it_reports() -> None:
    """Each number of a worker's report has its metric; a part that the report lacks counts as nothing."""
    metrics = Metrics()
    metrics.step_done(message(), again=False)
    assert value(metrics, "steps_total") == 1
    assert value(metrics, "tokens_total") == 64
    assert value(metrics, "samples_total") == 4
    assert value(metrics, "step_seconds_sum") == 0.5
    assert value(metrics, "loss") == 2.5
    assert value(metrics, "tokens_per_second") == 128
    assert value(metrics, "step_phase_seconds_count", phase="data") is None
    assert value(metrics, "held_out_loss") is None
    metrics.step_done(
        message(
            2,
            loss=None,
            skipped="loss is nan",
            phases={"data": 0.1, "compute": 0.4},
            checkpoint_stall_s=0.5,
            straggler_wait_s=0.2,
            held_out_loss=3.0,
            sources={"web": [3, 2.0], "code": [1, None]},
        ),
        again=False,
    )
    assert value(metrics, "steps_skipped_total") == 1
    assert math.isnan(value(metrics, "loss") or 0.0)
    assert value(metrics, "tokens_per_second") == 64
    assert value(metrics, "step_phase_seconds_sum", phase="compute") == 0.4
    assert value(metrics, "step_phase_seconds_sum", phase="checkpoint") == 0.5
    assert value(metrics, "held_out_loss") == 3.0
    assert value(metrics, "source_rows_total", source="web") == 3
    assert value(metrics, "source_loss", source="web") == 2.0


def test_steps_done_before_are_recomputed() -> None:
    """Steps that were done before count as recomputed, and as steps."""
    metrics = Metrics()
    for step, again in ((2, True), (3, True), (4, False), (4, True)):
        metrics.step_done(message(step), again=again)
    assert value(metrics, "steps_recomputed_total") == 3
    assert value(metrics, "steps_total") == 4


def test_a_scrape_always_finds_the_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape may come while a generation starts: the series of the new one is there before the old one goes."""
    metrics = Metrics()
    metrics.generation_starts(1, "started")
    family, found = metrics.generation_info, []
    remove = family.remove

    def look_and_remove(*labels: str) -> None:
        found.append([each.labels["generation"] for each in next(iter(family.collect())).samples])
        remove(*labels)

    monkeypatch.setattr(family, "remove", look_and_remove)
    metrics.generation_starts(2, "lost b")
    assert found == [["1", "2"]]
    assert value(metrics, "generation_info", generation="1", reason="started") is None
    assert value(metrics, "generation_info", generation="2", reason="lost b") == 1


def test_restarts_end_with_progress() -> None:
    """A new step or a newer commit ends a row of restarts; a step done again, or the known commit, does not."""
    metrics = Metrics()
    metrics.committed(20, 1.0)
    metrics.generation_starts(4, "lost b", 3)
    metrics.committed(20, 1.0)
    metrics.step_done(message(30), again=True)
    assert value(metrics, "restarts_without_progress") == 3
    metrics.step_done(message(31), again=False)
    assert value(metrics, "restarts_without_progress") == 0
    metrics.generation_starts(5, "lost c", 1)
    metrics.committed(25, 1.0)
    assert value(metrics, "restarts_without_progress") == 0


def test_what_has_ended_is_not_shown() -> None:
    """While nothing trains there is no speed, and after a start from the bucket no state in memory."""
    metrics = Metrics(flops=ModelFlops({"parameters": 1e6}, 1e9))
    metrics.step_done(message(), again=False)
    assert value(metrics, "mfu_ratio", formula="parameters") == pytest.approx(1e6 * 128 / 2e9)
    metrics.generation_ended()
    assert value(metrics, "tokens_per_second") is None
    assert value(metrics, "mfu_ratio", formula="parameters") is None
    assert value(metrics, "step") == 1
    for gauge in (metrics.snapshot_step, metrics.mirror_step):
        gauge.set(7)
    metrics.mirrors_change()
    assert value(metrics, "mirror_step") is None
    assert value(metrics, "snapshot_step") == 7
    metrics.mirror_step.set(7)
    metrics.states_lost()
    assert value(metrics, "snapshot_step") is None
    assert value(metrics, "mirror_step") is None


def test_time_goodput_and_cost_follow_the_ledger() -> None:
    """Seconds by state, their sum, the productive share and the price come from the same account."""
    metrics, seconds = Metrics(price_per_hour=3.6), dict.fromkeys(Bucket, 0.0)
    for _ in range(2):
        seconds[Bucket.AGREE] += 25.0
        seconds[Bucket.PRODUCTIVE] += 75.0
        metrics.account(seconds, sum(seconds.values()))
    assert value(metrics, "time_seconds_total", state="productive") == 150
    assert value(metrics, "node_seconds_total") == 200
    assert value(metrics, "cost_usd_total") == pytest.approx(0.2)
    # Within a step, only age and cost rise.
    metrics.account(seconds, 300)
    assert value(metrics, "time_seconds_total", state="productive") == 150
    assert value(metrics, "node_seconds_total") == 300
    assert value(metrics, "cost_usd_total") == pytest.approx(0.3)
    free = Metrics()
    free.account(seconds, 200)
    assert value(free, "cost_usd_total") is None
    assert value(free, "node_seconds_total") == 200


def test_a_scrape_outlives_a_value_that_cannot_be_read() -> None:
    """An error while a value is read costs that value, not the scrape."""
    metrics = Metrics()
    metrics.before_scrape(lambda: (_ for _ in ()).throw(RuntimeError("gone")))
    metrics.before_scrape(lambda: metrics.checkpoints_pending.set(2))
    assert value(metrics, "checkpoints_pending") == 2
    assert abs((value(metrics, "clock_seconds") or 0.0) - time.time()) < 60


def test_what_happened_to_the_run_is_counted_once() -> None:
    """A sum over nodes is right for these: exactly the node that appends a record counts it."""
    by = {each.name for each in catalogue() if each.by is By.APPENDER}
    assert by == {
        *("changes", "recovery_seconds", "lost_steps", "quarantines"),
        "checkpoint_commits",
    }
