"""Faults and recovery: what happened to the members, how fast the run went on, and what it cost."""

from dashboards.cost import FAULT_STATES, FAULTS
from dashboards.layout import Board, Row
from dashboards.panels import (
    ANY,
    Limits,
    Query,
    heatmap,
    label_table,
    lines,
    ranking,
    stat,
    with_runbooks,
)

_RECOVERIES = 'sum by (run, le) (increase(@recovery_seconds_bucket{cause!="start"}[$__range]))'


def board() -> Board:
    """The dashboard after a page."""
    return Board(
        "elastic-pt-faults",
        "What happened to the members of the run, how fast did it go on, and what did it cost?",
        [_counts(), _recovery(), _membership(), _workers(), _notices()],
    )


def _counts() -> Row:
    return Row(
        "In the visible range",
        [
            stat(
                "Faults",
                "How many nodes were lost or failed? The loss of all nodes at once counts once.",
                "none",
                f"round(sum by (run) (increase(@changes_total{{{FAULTS}}}[$__range])))",
                width=3,
            ),
            stat(
                "Planned changes",
                "How many nodes joined, left in good order or were kept out?",
                "none",
                'round(sum by (run) (increase(@changes_total{cause=~"joined|left|barred"}[$__range])))',
                width=3,
            ),
            stat(
                "Median recovery",
                "How long does half of the changes stop the run at most?",
                "s",
                f"histogram_quantile(0.5, {_RECOVERIES})",
                limits=Limits(60, 300),
                none="no change yet",
                width=3,
                decimals=1,
            ),
            stat(
                "95th percentile",
                "How long does nearly every change stop the run at most?",
                "s",
                f"histogram_quantile(0.95, {_RECOVERIES})",
                limits=Limits(120, 600),
                none="no change yet",
                width=3,
                decimals=1,
            ),
            stat(
                "Steps lost",
                "How many steps had to be done again?",
                "none",
                "round(sum by (run) (increase(@lost_steps_total[$__range])))",
                width=3,
            ),
            with_runbooks(
                stat(
                    "Quarantines",
                    "Was a node or a checkpoint put aside because it is bad?",
                    "none",
                    "round(sum by (run) (increase(@quarantines_total[$__range])))",
                    limits=ANY,
                    width=3,
                ),
                "NodeQuarantined",
            ),
            with_runbooks(
                stat(
                    "Fenced records",
                    "Did a node of an older generation try to write to the log?",
                    "none",
                    "round(sum by (run) (increase(@fenced_total[$__range])))",
                    limits=ANY,
                    width=3,
                ),
                "FencedWriter",
            ),
            stat(
                "Worker failures",
                "How many workers failed in the visible range?",
                "none",
                "round(sum by (run) (increase(@worker_failures_total[$__range])))",
                width=3,
            ),
        ],
    )


def _recovery() -> Row:
    return Row(
        "How fast does it recover?",
        [
            ranking(
                "Mean recovery by cause",
                "Which kind of change stops the run longest?",
                "s",
                Query(
                    "sum by (cause) (increase(@recovery_seconds_sum[$__range]))"
                    " / (sum by (cause) (increase(@recovery_seconds_count[$__range])) > 0)",
                    "{{cause}}",
                ),
                limits=Limits(60, 300),
                none="no change yet",
                decimals=1,
            ),
            heatmap(
                "Recoveries by duration",
                "How long did each change stop the run? Each cell counts recoveries.",
                "s",
                "sum by (le) (increase(@recovery_seconds_bucket[$__rate_interval]))",
            ),
            lines(
                "Node time of faults by phase",
                "Which phase of a recovery costs most: detect, agree, start, restore, or repeat steps?",
                "percentunit",
                Query(
                    f'sum by (state) (rate(@time_seconds_total{{state=~"{FAULT_STATES}"}}[$__rate_interval]))'
                    " / scalar(sum(rate(@time_seconds_total[$__rate_interval])))",
                    "{{state}}",
                ),
                stacked=True,
                low=0,
            ),
            lines(
                "Steps lost",
                "How many steps does each change throw away?",
                "none",
                Query("sum by (run) (increase(@lost_steps_total[$__rate_interval]))"),
                bars=True,
            ),
            lines(
                "Steps done again",
                "How much of the work repeats earlier work?",
                "none",
                Query(
                    "max by (run) (increase(@steps_recomputed_total[$__rate_interval]))",
                ),
                bars=True,
            ),
            ranking(
                "Node time by phase",
                "What did all faults and changes cost in the visible range?",
                "s",
                Query(
                    f'sum by (state) (increase(@time_seconds_total{{state=~"{FAULT_STATES}|draining"}}[$__range]))',
                    "{{state}}",
                ),
            ),
        ],
    )


def _membership() -> Row:
    return Row(
        "Who trains?",
        [
            lines(
                "Changes by cause",
                "Why did the members change?",
                "none",
                Query("sum by (cause) (increase(@changes_total[$__rate_interval]))", "{{cause}}"),
                bars=True,
            ),
            with_runbooks(
                lines(
                    "Members and their limits",
                    "How many nodes train, and how many may?",
                    "none",
                    Query('max by (run) (@nodes{state="active"})', "members {{run}}"),
                    Query("max by (run) (@nodes_min)", "fewest {{run}}"),
                    Query("max by (run) (@nodes_max)", "most {{run}}"),
                    low=0,
                ),
                "CapacityLow",
            ),
            with_runbooks(
                lines(
                    "Nodes that do not train",
                    "Who joins, drains, rests, is quarantined or was lost?",
                    "none",
                    Query('max by (state) (@nodes{state!="active"})', "{{state}}"),
                    stacked=True,
                    low=0,
                ),
                "NodeQuarantined",
            ),
            with_runbooks(
                lines(
                    "Generation",
                    "How often do the members change?",
                    "none",
                    Query("max by (run) (@generation)"),
                ),
                "CrashLoop",
            ),
            lines(
                "Generations by node",
                "Which node took part in how many generations since its agent started?",
                "none",
                Query("@generations_total", "{{node}}"),
            ),
            lines(
                "Workers",
                "How many workers train together?",
                "none",
                Query("max by (run) (@world_size)"),
                low=0,
            ),
            label_table(
                "Why the newest generation began",
                "What does the log give as the reason of the newest generation?",
                "max by (run, generation, reason) (@generation_info)",
                ("run", "generation", "reason"),
                width=24,
            ),
        ],
    )


def _workers() -> Row:
    return Row(
        "What do the workers do, and which failed?",
        [
            with_runbooks(
                lines(
                    "What the workers do",
                    "How many workers are in each phase? They wait for the one that stays in another phase than the others.",
                    "none",
                    Query("sum by (phase) (@workers)", "{{phase}}"),
                    stacked=True,
                    low=0,
                    width=12,
                ),
                "NoProgress",
            ),
            with_runbooks(
                lines(
                    "Restarts without progress",
                    "How many generations in a row did nobody plan, and none did a new step or made a commit?",
                    "none",
                    Query("max by (run) (@restarts_without_progress)"),
                    low=0,
                    width=12,
                ),
                "CrashLoop",
            ),
            with_runbooks(
                lines(
                    "Failures of workers by cause",
                    "Why did workers fail? A failed collective has its cause on another node.",
                    "none",
                    Query(
                        "sum by (cause) (increase(@worker_failures_total[$__rate_interval]))",
                        "{{cause}}",
                    ),
                    bars=True,
                ),
                "CrashLoop",
            ),
            with_runbooks(
                ranking(
                    "Failures of workers by node",
                    "Which node's workers fail most, failed collectives left out?",
                    "none",
                    Query(
                        'round(sum by (node) (increase(@worker_failures_total{cause!="collective"}[$__range])))',
                        "{{node}}",
                    ),
                    limits=Limits(1, 3),
                ),
                "NodeQuarantined",
            ),
            with_runbooks(
                lines(
                    "Quarantines and fenced records",
                    "Was something put aside, or did an old generation write?",
                    "none",
                    Query(
                        "sum by (what) (increase(@quarantines_total[$__rate_interval]))",
                        "quarantine of a {{what}}",
                    ),
                    Query(
                        "sum by (node) (increase(@fenced_total[$__rate_interval]))",
                        "fenced {{node}}",
                    ),
                    bars=True,
                ),
                "FencedWriter",
                "VerifyFailed",
            ),
        ],
    )


def _notices() -> Row:
    return Row(
        "Are preemptions announced?",
        [
            lines(
                "Notices",
                "Which sources announce that machines will be taken away?",
                "none",
                Query(
                    "sum by (source, kind) (increase(@notices_total[$__rate_interval]))"
                    ' or on () 0 * label_replace(label_replace(count(@clock_seconds), "source", "no", "", ""), "kind", "source", "", "")',
                    "{{source}} {{kind}}",
                ),
                bars=True,
            ),
            lines(
                "Lead of the last notice",
                "How long did each node have to leave after its last notice? 0 is none yet.",
                "s",
                Query(
                    "max by (node) (@notice_lead_seconds) or 0 * max by (node) (@clock_seconds)",
                    "{{node}}",
                ),
                low=0,
            ),
            with_runbooks(
                lines(
                    "Sources that answer",
                    "Can each node hear of its preemption? Where no source answers, it comes unannounced.",
                    "none",
                    Query("count(@clock_seconds)", "nodes"),
                    Query("sum(@notice_source_up) or vector(0)", "sources that answer"),
                    Query("count(@notice_source_up == 0) or vector(0)", "sources that do not"),
                    low=0,
                ),
                "NoticeSourceDown",
            ),
        ],
    )
