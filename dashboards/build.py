"""Writes dashboards/elastic_pt.json, the Grafana dashboard of one run. Tested to reproduce the committed file.

    python dashboards/build.py

Each node exports its own view of the run. What is the same everywhere (step, loss, tokens) is taken with
`max`; what belongs to a node (its time, its failures) is added up or shown per node.
"""

import json
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).with_name("elastic_pt.json")
ABSENT: dict[str, str] = {}
"""Metrics of the catalogue that are deliberately not on the dashboard, with the reason."""

_WIDTH = 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_JOB = '{job=~"$job"}'

Query = tuple[str, str]
"""PromQL, and the legend of its series."""


def stat(title: str, expression: str, unit: str, text: str) -> dict[str, Any]:
    """One number."""
    return {
        "type": "stat",
        "title": title,
        "description": text,
        "gridPos": {"w": 3, "h": 4},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none"},
        "targets": [_target("A", expression, "")],
    }


def series(
    title: str,
    unit: str,
    text: str,
    *queries: Query,
    stack: bool = False,
    logarithmic: bool = False,
) -> dict[str, Any]:
    """Lines over time."""
    custom = {
        "lineWidth": 1,
        "fillOpacity": 60 if stack else 0,
        "stacking": {"mode": "normal" if stack else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if logarithmic else {"type": "linear"},
    }
    return {
        "type": "timeseries",
        "title": title,
        "description": text,
        "gridPos": {"w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit, "custom": custom}, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list"}},
        "targets": [
            _target(chr(ord("A") + number), expression, legend)
            for number, (expression, legend) in enumerate(queries)
        ],
    }


def _target(reference: str, expression: str, legend: str) -> dict[str, Any]:
    return {
        "refId": reference,
        "datasource": _DATASOURCE,
        "expr": _expanded(expression),
        "legendFormat": legend,
    }


def _expanded(expression: str) -> str:
    """`@name` is short for a metric of this project with the selector of the job."""
    words = expression.split("@")
    parts = [words[0]]
    for word in words[1:]:
        end = next((i for i, c in enumerate(word) if not (c.isalnum() or c == "_")), len(word))
        parts.append(f"elastic_pt_{word[:end]}{_JOB}{word[end:]}")
    return "".join(parts)


PANELS = [
    stat("Step", "max(@step)", "none", "Steps done."),
    stat("Loss", "max(@loss)", "none", "Mean cross-entropy per token of the last step, in nats."),
    stat("Nodes", "max(@nodes)", "none", "Nodes of the newest generation."),
    stat("Workers", "max(@world_size)", "none", "World size of the newest generation."),
    stat(
        "Generation", "max(@generation)", "none", "Rises by one with every change of the members."
    ),
    stat(
        "Tokens per second",
        "max(rate(@tokens_total[$__rate_interval]))",
        "none",
        "Of the whole world: every node counts all tokens of a step it took part in.",
    ),
    stat(
        "Since the last commit",
        "time() - max(@checkpoint_commit_timestamp_seconds > 0)",
        "s",
        "If everything dies now, this much wall time is lost at most.",
    ),
    stat(
        "Steps not committed",
        "max(@step) - max(@checkpoint_committed_step)",
        "none",
        "Steps that a restart from the bucket would do again.",
    ),
    series("Loss", "none", "Is it learning?", ("max(@loss)", "loss")),
    series(
        "Gradient norm",
        "none",
        "Before clipping. Gaps are steps whose norm was not finite.",
        ("max(@gradient_norm)", "gradient norm"),
        logarithmic=True,
    ),
    series("Learning rate", "none", "Of the last step.", ("max(@learning_rate)", "learning rate")),
    series(
        "Membership",
        "none",
        "Who trains. A step down is a lost node, a step up one that was taken in.",
        ("max(@nodes)", "nodes"),
        ("max(@world_size)", "workers"),
        ("max(@generation)", "generation"),
    ),
    series(
        "Where the time goes",
        "percentunit",
        "Share of all nodes' time by state. Everything but productive is overhead.",
        (
            "sum by (state) (rate(@time_seconds_total[$__rate_interval]))"
            " / scalar(sum(rate(@time_seconds_total[$__rate_interval])))",
            "{{state}}",
        ),
        stack=True,
    ),
    series(
        "Failures",
        "none",
        "own: a worker of that node failed. collateral: it only noticed that another one was gone.",
        (
            "sum by (instance, cause) (increase(@worker_failures_total[$__rate_interval]))",
            "{{instance}} {{cause}}",
        ),
        ("max(increase(@generations_total[$__rate_interval]))", "generations"),
        ("max(increase(@steps_skipped_total[$__rate_interval]))", "skipped steps"),
    ),
    series(
        "Step time",
        "s",
        "Wall time of a step, and the part of it that waited for data, on the slowest node.",
        (
            "histogram_quantile(0.5, sum by (le) (rate(@step_seconds_bucket[$__rate_interval])))",
            "median",
        ),
        (
            "histogram_quantile(0.95, sum by (le) (rate(@step_seconds_bucket[$__rate_interval])))",
            "95th percentile",
        ),
        (
            "max(rate(@data_wait_seconds_total[$__rate_interval]) / rate(@steps_total[$__rate_interval]))",
            "data wait",
        ),
    ),
    series(
        "Checkpoint stage time",
        "s",
        "What the last checkpoint and the last snapshot held up the workers, by node. Upload goes on in the background.",
        ("@checkpoint_stage_seconds", "{{instance}} checkpoint"),
        ("@snapshot_seconds", "{{instance}} snapshot"),
    ),
    series(
        "Checkpoints",
        "none",
        "Commits should go on at an even pace; a failure means that a checkpoint did not reach the bucket.",
        ("sum(increase(@checkpoint_commits_total[$__rate_interval]))", "committed"),
        ("sum(increase(@checkpoint_failures_total[$__rate_interval]))", "failed"),
        ("sum(increase(@checkpoint_skips_total[$__rate_interval]))", "skipped"),
        ("sum(increase(@snapshot_skips_total[$__rate_interval]))", "snapshots skipped"),
        ("sum(increase(@checkpoint_tidy_failures_total[$__rate_interval]))", "not tidied"),
    ),
    series(
        "Notices",
        "none",
        "Notices that machines will be taken away, or may be. A source that does not answer reports none.",
        (
            "sum by (instance, source, kind) (increase(@notices_total[$__rate_interval]))",
            "{{instance}} {{source}} {{kind}}",
        ),
        ("count by (source) (@notice_source_up == 0)", "{{source}} does not answer"),
    ),
    series(
        "Lead of notices",
        "s",
        "Time that a node had to leave after its last notice.",
        ("@notice_lead_seconds > 0", "{{instance}}"),
    ),
]


def build() -> dict[str, Any]:
    """The dashboard as Grafana imports it; panels flow from left to right."""
    x = y = row_height = 0
    placed = []
    for number, panel in enumerate(PANELS, start=1):
        width, height = panel["gridPos"]["w"], panel["gridPos"]["h"]
        if x + width > _WIDTH:
            x, y, row_height = 0, y + row_height, 0
        position = {"x": x, "y": y, "w": width, "h": height}
        placed.append(panel | {"id": number, "datasource": _DATASOURCE, "gridPos": position})
        x, row_height = x + width, max(row_height, height)
    return {
        "uid": "elastic-pt",
        "title": "elastic_pt: one run",
        "tags": ["elastic_pt"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_DATASOURCE_VARIABLE, _JOB_VARIABLE]},
        "panels": placed,
    }


_DATASOURCE_VARIABLE = {
    "name": "datasource",
    "label": "Data source",
    "type": "datasource",
    "query": "prometheus",
}
_JOB_VARIABLE = {
    "name": "job",
    "label": "Job",
    "type": "query",
    "datasource": _DATASOURCE,
    "query": {"query": "label_values(elastic_pt_generation, job)", "refId": "job"},
    "refresh": 2,
    "multi": False,
    "includeAll": True,
    "current": {"text": "All", "value": "$__all"},
}


def text() -> str:
    """The bytes of the committed file."""
    return json.dumps(build(), indent=1) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(text())
