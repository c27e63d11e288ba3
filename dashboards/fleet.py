"""Fleet: node by node, over all selected runs."""

from dashboards.layout import Board, Row
from dashboards.panels import (
    ANY,
    Column,
    Limits,
    Query,
    label_table,
    lines,
    node_table,
    ranking,
    stat,
    with_runbooks,
)

_COMPUTE = (
    'sum by (node) (rate(@step_phase_seconds_sum{phase="compute"}[$__range]))'
    ' / sum by (node) (rate(@step_phase_seconds_count{phase="compute"}[$__range]))'
)


def board() -> Board:
    """The dashboard for whoever looks after the machines."""
    return Board(
        "elastic-pt-fleet",
        "Which runs are there, which nodes do they have, and is one of the nodes bad?",
        [_now(), _nodes(), _time(), _machine(), _events(), _gpus()],
        all_runs=True,
    )


def _now() -> Row:
    return Row(
        "Now",
        [
            with_runbooks(
                stat(
                    "Agents",
                    "How many agents answer for each run?",
                    "none",
                    "count by (run) (@clock_seconds)",
                    width=6,
                ),
                "MetricsAbsent",
            ),
            stat(
                "Members",
                "How many nodes train for each run?",
                "none",
                'max by (run) (@nodes{state="active"})',
                width=6,
            ),
            stat(
                "Node time",
                "How much node time did each run take in the visible range?",
                "s",
                "sum by (run) (increase(@node_seconds_total[$__range]))",
                width=6,
            ),
            stat(
                "Price per hour",
                "What do the nodes of each run cost per hour?",
                "currencyUSD",
                "3600 * sum by (run) (rate(@cost_usd_total[$__rate_interval]))",
                none="no price (telemetry.price_per_hour)",
                width=6,
                decimals=2,
            ),
        ],
    )


def _nodes() -> Row:
    return Row(
        "Which node is bad?",
        [
            node_table(
                "Nodes",
                "How does each node do in the visible range? A click on a column sorts by it.",
                [
                    Column("step", "max by (node) (@step)"),
                    Column(
                        "goodput",
                        'sum by (node) (increase(@time_seconds_total{state="productive"}[$__range]))'
                        " / sum by (node) (increase(@time_seconds_total[$__range]))",
                        "percentunit",
                        Limits(0.9, 0.7),
                        1,
                    ),
                    Column("computing per step", _COMPUTE, "s", decimals=3),
                    Column(
                        "failed workers",
                        'round(sum by (node) (increase(@worker_failures_total{cause!="collective"}[$__range])))',
                        limits=Limits(1, 3),
                    ),
                    Column("generations", "max by (node) (@generations_total)"),
                    Column(
                        "age of snapshot",
                        "time() - max by (node) (@snapshot_timestamp_seconds)",
                        "s",
                    ),
                    Column(
                        "clock ahead by",
                        "max by (node) (@clock_seconds - timestamp(@clock_seconds))",
                        "s",
                        decimals=2,
                    ),
                    Column("memory", "max by (node) (@process_resident_memory_bytes)", "bytes"),
                    Column(
                        "up since",
                        "1000 * max by (node) (@process_start_time_seconds)",
                        "dateTimeFromNow",
                    ),
                ],
            ),
            label_table(
                "Software",
                "Do all nodes run the same versions on the same kind of device?",
                "max by (run, node, version, torch, device, numerics, run_id) (@run_info)",
                ("run", "node", "version", "torch", "device", "numerics", "run_id"),
                width=24,
            ),
        ],
    )


def _time() -> Row:
    return Row(
        "What do the nodes do?",
        [
            lines(
                "Goodput since the agent started",
                "Which node spends least of its time on new steps?",
                "percentunit",
                Query(
                    'sum by (node) (@time_seconds_total{state="productive"})'
                    " / sum by (node) (@time_seconds_total)",
                    "{{node}}",
                ),
                low=0,
                high=1,
            ),
            ranking(
                "Time without new steps by node",
                "Which node spent most time in the visible range without a new step?",
                "s",
                Query(
                    'sum by (node) (increase(@time_seconds_total{state!="productive"}[$__range])) > 0',
                    "{{node}}",
                ),
            ),
            lines(
                "Nodes by state",
                "Who trains, who waits, and who is kept out?",
                "none",
                Query("max by (state) (@nodes)", "{{state}}"),
                stacked=True,
                low=0,
            ),
        ],
    )


def _machine() -> Row:
    return Row(
        "Are the machines well?",
        [
            lines(
                "CPU of the agents",
                "Does an agent need much CPU? Its workers are other processes, and not in here.",
                "percentunit",
                Query(
                    "sum by (node) (rate(@process_cpu_seconds_total[$__rate_interval]))", "{{node}}"
                ),
                low=0,
                width=6,
            ),
            lines(
                "Memory of the agents",
                "Does an agent's memory grow? It includes the states that it holds for its workers and others.",
                "bytes",
                Query("max by (node) (@process_resident_memory_bytes)", "{{node}}"),
                low=0,
                width=6,
            ),
            lines(
                "Open files of the agents",
                "Does an agent leak files or connections?",
                "percentunit",
                Query("max by (node) (@process_open_fds / @process_max_fds)", "{{node}}"),
                limits=Limits(0.5, 0.9),
                low=0,
                width=6,
            ),
            with_runbooks(
                lines(
                    "Clock ahead of Prometheus",
                    "Is a node's clock wrong? The figure contains the time that the scrape took.",
                    "s",
                    Query("max by (node) (@clock_seconds - timestamp(@clock_seconds))", "{{node}}"),
                    width=6,
                ),
                "ClockSkew",
            ),
        ],
    )


def _events() -> Row:
    return Row(
        "Do people and programs hear of it?",
        [
            lines(
                "Events that did not reach the bucket",
                "Are the last words of a node lost?",
                "none",
                Query(
                    "sum by (node) (increase(@events_dropped_total[$__rate_interval]))", "{{node}}"
                ),
                limits=ANY,
                bars=True,
            ),
            lines(
                "Events that the webhook refused",
                "Does the chat not hear what it should?",
                "none",
                Query(
                    "sum by (node) (increase(@webhook_failures_total[$__rate_interval]))",
                    "{{node}}",
                ),
                limits=ANY,
                bars=True,
            ),
            with_runbooks(
                lines(
                    "Sources of notices",
                    "How many sources of notices answer each node? With 0 it is preempted unannounced.",
                    "none",
                    Query(
                        "sum by (node) (@notice_source_up) or 0 * max by (node) (@clock_seconds)",
                        "{{node}}",
                    ),
                    low=0,
                ),
                "NoticeSourceDown",
            ),
        ],
    )


def _gpus() -> Row:
    none = "no GPU that NVML knows"
    return Row(
        "GPUs by node",
        [
            lines(
                "Mean utilization",
                "Which node's GPUs are idle?",
                "percentunit",
                Query("avg by (node) (@gpu_utilization_ratio)", "{{node}}"),
                none=none,
                low=0,
                high=1,
            ),
            lines(
                "Hottest GPU",
                "Which node has a problem with cooling?",
                "celsius",
                Query("max by (node) (@gpu_temperature_celsius)", "{{node}}"),
                limits=Limits(80, 90),
                none=none,
            ),
            lines(
                "Power of all GPUs",
                "How much power does each node's set of GPUs draw?",
                "watt",
                Query("sum by (node) (@gpu_power_watts)", "{{node}}"),
                none=none,
                stacked=True,
                low=0,
            ),
        ],
        collapsed=True,
    )
