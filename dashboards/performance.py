"""Performance: how fast the steps are, and what they wait for."""

from dashboards.layout import Board, Row
from dashboards.panels import ANY, Limits, Query, heatmap, lines, stat, with_runbooks

_PEAK = "peak unknown (telemetry.peak_flops)"
_BUCKETS = "sum by (le) (rate(@step_seconds_bucket[$__rate_interval]))"


def board() -> Board:
    """The dashboard for whoever makes the run faster."""
    return Board(
        "elastic-pt-performance",
        "How fast are the steps, and what do they wait for?",
        [_now(), _speed(), _steps(), _waits(), gpu_row()],
    )


def _now() -> Row:
    return Row(
        "Now",
        [
            stat(
                "Speed of a step",
                "How many tokens per second does the last step give, its wait for checkpoints included?",
                "si: tok/s",
                "max by (run) (@tokens_per_second)",
                none="nothing trains",
                decimals=1,
            ),
            stat(
                "MFU",
                "Which share of the devices' peak does the model use, by 6N FLOPs per token?",
                "percentunit",
                'max by (run) (@mfu_ratio{formula="parameters"})',
                none=_PEAK,
                decimals=1,
            ),
            stat(
                "MFU with attention",
                "Which share of the peak is it by PaLM's formula, which counts attention and the output layer?",
                "percentunit",
                'max by (run) (@mfu_ratio{formula="palm"})',
                none=_PEAK,
                decimals=1,
            ),
            stat(
                "Time of a step",
                "How long does a step take on average in the visible range?",
                "s",
                "max by (run) (increase(@step_seconds_sum[$__range]))"
                " / max by (run) (increase(@step_seconds_count[$__range]))",
                decimals=2,
            ),
            stat(
                "Waits for data",
                "Which share of the steps' time waits for the batch?",
                "percentunit",
                'max by (run) (increase(@step_phase_seconds_sum{phase="data"}[$__range]))'
                " / max by (run) (increase(@step_seconds_sum[$__range]))",
                limits=Limits(0.02, 0.1),
                decimals=1,
            ),
            stat(
                "Waits for the slowest",
                "Which share of the nodes' time in steps waits for a slower worker?",
                "percentunit",
                'sum by (run) (increase(@time_seconds_total{state="straggler_wait"}[$__range]))'
                " / sum by (run) (increase(@step_seconds_sum[$__range]))",
                limits=Limits(0.05, 0.2),
                decimals=1,
            ),
        ],
    )


def _speed() -> Row:
    return Row(
        "How fast is it?",
        [
            lines(
                "Tokens per second",
                "How fast are single steps, and how fast is the run with all its interruptions?",
                "si: tok/s",
                Query("max by (run) (@tokens_per_second)", "last step {{run}}"),
                Query("max by (run) (rate(@tokens_total[$__rate_interval]))", "run {{run}}"),
                low=0,
            ),
            lines(
                "Rows per second",
                "How many sequences does the whole run train per second?",
                "si: rows/s",
                Query("max by (run) (rate(@samples_total[$__rate_interval]))"),
                low=0,
            ),
            lines(
                "Model FLOPs utilization",
                "How well are the devices used, by both usual formulas?",
                "percentunit",
                Query("max by (run, formula) (@mfu_ratio)", "{{formula}} {{run}}"),
                none=_PEAK,
                low=0,
            ),
            lines(
                "Tokens per second of one worker",
                "Does a larger world pay, or does each worker get slower?",
                "si: tok/s",
                Query("max by (run) (@tokens_per_second) / max by (run) (@world_size)"),
                low=0,
            ),
            lines(
                "Steps per hour",
                "How many steps does the run do per hour?",
                "none",
                Query("3600 * max by (run) (rate(@steps_total[$__rate_interval]))"),
                low=0,
                decimals=0,
            ),
            with_runbooks(
                lines(
                    "Skipped steps",
                    "Are steps without an update because a number was not finite?",
                    "none",
                    Query("max by (run) (increase(@steps_skipped_total[$__rate_interval]))"),
                    bars=True,
                ),
                "LossNonFinite",
            ),
        ],
    )


def _steps() -> Row:
    return Row(
        "What is a step made of?",
        [
            with_runbooks(
                lines(
                    "Time of a step",
                    "How long do steps take, and how much do they vary?",
                    "s",
                    Query(f"histogram_quantile(0.5, {_BUCKETS})", "median"),
                    Query(f"histogram_quantile(0.95, {_BUCKETS})", "95th percentile"),
                    Query(f"histogram_quantile(0.99, {_BUCKETS})", "99th percentile"),
                    low=0,
                ),
                "NoProgress",
            ),
            lines(
                "Mean time of a step by phase",
                "Which phase of a step takes longest, averaged over the nodes?",
                "s",
                Query(
                    "sum by (phase) (rate(@step_phase_seconds_sum[$__rate_interval]))"
                    " / sum by (phase) (rate(@step_phase_seconds_count[$__rate_interval]))",
                    "{{phase}}",
                ),
                stacked=True,
                low=0,
            ),
            heatmap(
                "Steps by duration",
                "Are there two kinds of steps, or single slow ones? Each cell counts steps.",
                "s",
                "sum by (le) (increase(@step_seconds_bucket[$__rate_interval]))",
            ),
            lines(
                "95th percentile by phase",
                "Which phase makes the slow steps slow?",
                "s",
                Query(
                    "histogram_quantile(0.95, sum by (phase, le) (rate(@step_phase_seconds_bucket[$__rate_interval])))",
                    "{{phase}}",
                ),
                low=0,
                width=12,
            ),
            lines(
                "Computing time of a step by node",
                "Is one node slower than the others?",
                "s",
                Query(
                    'sum by (node) (rate(@step_phase_seconds_sum{phase="compute"}[$__rate_interval]))'
                    ' / sum by (node) (rate(@step_phase_seconds_count{phase="compute"}[$__rate_interval]))',
                    "{{node}}",
                ),
                low=0,
                width=12,
            ),
        ],
    )


def _waits() -> Row:
    return Row(
        "What does it wait for?",
        [
            lines(
                "Wait for data by node",
                "Is the input too slow on one node? Seconds of waiting in each step.",
                "s",
                Query(
                    'sum by (node) (rate(@step_phase_seconds_sum{phase="data"}[$__rate_interval]))'
                    " / sum by (node) (rate(@steps_total[$__rate_interval]))",
                    "{{node}}",
                ),
                low=0,
                width=12,
            ),
            lines(
                "Wait for data by cause",
                "Is the store too slow, or this machine's disk and processor? Seconds of waiting in each step.",
                "s",
                Query(
                    "sum by (cause) (rate(@data_wait_seconds_total[$__rate_interval]))"
                    " / scalar(sum(rate(@steps_total[$__rate_interval])))",
                    "{{cause}}",
                ),
                stacked=True,
                low=0,
                width=12,
            ),
            lines(
                "Wait for the slowest worker by node",
                "Who waits? The node that waits least is the slow one. Seconds in each step.",
                "s",
                Query(
                    'sum by (node) (rate(@time_seconds_total{state="straggler_wait"}[$__rate_interval]))'
                    " / sum by (node) (rate(@steps_total[$__rate_interval]))",
                    "{{node}}",
                ),
                low=0,
                width=12,
            ),
            lines(
                "Lost within training, by bucket",
                "Which share of all nodes' time is lost while a generation trains?",
                "percentunit",
                Query(
                    'sum by (state) (rate(@time_seconds_total{state=~"data_wait|checkpoint_stall|straggler_wait|evaluation"}[$__rate_interval]))'
                    " / scalar(sum(rate(@time_seconds_total[$__rate_interval])))",
                    "{{state}}",
                ),
                stacked=True,
                low=0,
                width=12,
            ),
        ],
    )


def gpu_row() -> Row:
    """Collapsed: a run on CPUs has none of these series."""
    none = "no GPU that NVML knows"
    return Row(
        "GPUs",
        [
            lines(
                "Utilization",
                "Does each GPU work? This is the share of time in which any kernel ran.",
                "percentunit",
                Query("@gpu_utilization_ratio", "{{node}} {{gpu}}"),
                none=none,
                low=0,
                high=1,
            ),
            lines(
                "Memory in use",
                "How close is each GPU to running out of memory?",
                "percentunit",
                Query("@gpu_memory_used_bytes / @gpu_memory_total_bytes", "{{node}} {{gpu}}"),
                limits=Limits(0.95, 0.99),
                none=none,
                low=0,
                high=1,
            ),
            lines(
                "Power",
                "Does a GPU draw less than its peers, or more?",
                "watt",
                Query("@gpu_power_watts", "{{node}} {{gpu}}"),
                none=none,
                low=0,
            ),
            lines(
                "Temperature",
                "Does a GPU get too hot?",
                "celsius",
                Query("@gpu_temperature_celsius", "{{node}} {{gpu}}"),
                limits=Limits(80, 90),
                none=none,
            ),
            lines(
                "Reduced clocks",
                "Is a GPU slowed down, and why?",
                "none",
                Query("max by (node, gpu, reason) (@gpu_throttled)", "{{node}} {{gpu}} {{reason}}"),
                none=none,
                low=0,
            ),
            with_runbooks(
                lines(
                    "Errors",
                    "Does a GPU have uncorrected memory errors, or critical errors of the driver (Xid)?",
                    "none",
                    Query("@gpu_ecc_uncorrected_total", "{{node}} {{gpu}} memory"),
                    Query("@gpu_xid_errors_total", "{{node}} {{gpu}} Xid"),
                    limits=ANY,
                    none=none,
                    low=0,
                ),
                "GpuErrors",
            ),
        ],
        collapsed=True,
    )
