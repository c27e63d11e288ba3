"""Run: an operator's first questions about a run, one row each."""

from dashboards import cost
from dashboards.layout import Board, Row
from dashboards.panels import Limits, Query, lines, ranking, stat, with_runbooks

_PER_STEP = (
    "(max by (run) (increase(@step_seconds_sum[$__range]))"
    " / max by (run) (increase(@step_seconds_count[$__range])))"
)


def board() -> Board:
    """The dashboard to open first."""
    return Board(
        "elastic-pt-run",
        "Is it learning, what does it cost for nothing, what would be lost now, and when will it end?",
        [
            _now(),
            _learning(),
            cost.badput(),
            cost.preemption(),
            _at_risk(),
            _which_node(),
            cost.end(),
        ],
    )


def _now() -> Row:
    return Row(
        "Now",
        [
            stat(
                "Progress",
                "What share of the planned steps is done?",
                "percentunit",
                "max by (run) (@step) / max by (run) (@steps_planned)",
                decimals=1,
            ),
            with_runbooks(
                stat(
                    "Loss",
                    "What was the mean cross-entropy per token of the last step?",
                    "suffix: nats",
                    "max by (run) (@loss)",
                    none="no step yet",
                    decimals=3,
                ),
                "LossNonFinite",
            ),
            with_runbooks(
                stat(
                    "Speed",
                    "How many tokens does the whole run train per second, pauses and repeated steps included?",
                    "si: tok/s",
                    "max by (run) (rate(@tokens_total[$__rate_interval]))",
                    decimals=1,
                ),
                "NoProgress",
            ),
            with_runbooks(
                stat(
                    "Goodput",
                    "Which share of all nodes' time in the visible range went into new steps?",
                    "percentunit",
                    'sum by (run) (increase(@time_seconds_total{state="productive"}[$__range]))'
                    " / sum by (run) (increase(@time_seconds_total[$__range]))",
                    limits=Limits(0.95, 0.8),
                    decimals=1,
                ),
                "GoodputBurn",
            ),
            stat(
                "Time left, with interruptions",
                "When will it finish, at the pace of the visible range with all its interruptions?",
                "s",
                cost.TIME_LEFT,
                none="no progress",
            ),
            stat(
                "Cost to the end",
                "What will the remaining steps cost, if a step costs as much as in the visible range?",
                "currencyUSD",
                cost.COST_LEFT,
                none=cost.NO_PRICE,
                decimals=2,
            ),
            with_runbooks(
                stat(
                    "Nodes that train",
                    "How many nodes are members that train or start?",
                    "none",
                    'max by (run) (@nodes{state="active"})',
                ),
                "CapacityLow",
            ),
            with_runbooks(
                stat(
                    "Lost if all nodes died",
                    "How much work would be done again if everything died now?",
                    "s",
                    f'max by (run) (@steps_at_risk{{loss="all"}}) * on (run) {_PER_STEP}',
                    limits=Limits(900, 3600),
                ),
                "CommitTooOld",
            ),
            with_runbooks(
                stat(
                    "Lost if one node died",
                    "How much work would be done again if the node that costs most died now?",
                    "s",
                    f'max by (run) (@steps_at_risk{{loss="node"}}) * on (run) {_PER_STEP}',
                    limits=Limits(120, 600),
                    none="more than 32 members",
                ),
                "StepsAtRisk",
            ),
            with_runbooks(
                stat(
                    "Since the last commit",
                    "How old is the newest checkpoint in the bucket, by the nodes' clocks?",
                    "s",
                    "time() - max by (run) (@checkpoint_commit_timestamp_seconds)",
                    limits=Limits(1800, 3600),
                    none="no commit yet",
                ),
                "CommitTooOld",
            ),
            stat(
                "Faults",
                "How many nodes were lost or failed in the visible range? The loss of all nodes at once counts once.",
                "none",
                f"round(sum by (run) (increase(@changes_total{{{cost.FAULTS}}}[$__range])))",
            ),
            stat(
                "Spent",
                "What did all nodes cost in the visible range?",
                "currencyUSD",
                "sum by (run) (increase(@cost_usd_total[$__range]))",
                none=cost.NO_PRICE,
                decimals=2,
            ),
        ],
    )


def _learning() -> Row:
    return Row(
        "Is it learning?",
        [
            with_runbooks(
                lines(
                    "Loss",
                    "Does the loss fall, and does the held-out loss fall with it?",
                    "suffix: nats",
                    Query("max by (run) (@loss)", "training {{run}}"),
                    Query("max by (run) (@held_out_loss)", "held out {{run}}"),
                    width=12,
                    decimals=3,
                ),
                "LossNonFinite",
            ),
            lines(
                "Gradient norm",
                "Is training stable? This is the norm before clipping; a gap is a step whose norm was not finite.",
                "none",
                Query("max by (run) (@gradient_norm)"),
                logarithmic=True,
                width=6,
                decimals=2,
            ),
            lines(
                "Learning rate",
                "Where in its schedule is the run?",
                "sci",
                Query("max by (run) (@learning_rate)"),
                width=6,
            ),
            lines(
                "Loss by source",
                "Is one source of the data harder than the others, or does one get worse?",
                "suffix: nats",
                Query("max by (source) (@source_loss)", "{{source}}"),
                none="the data have one unnamed source",
                decimals=3,
            ),
            lines(
                "Share of each source",
                "Does the realised mixture follow the plan?",
                "percentunit",
                Query(
                    "max by (source) (rate(@source_rows_total[$__rate_interval]))"
                    " / scalar(sum(max by (source) (rate(@source_rows_total[$__rate_interval]))))",
                    "{{source}}",
                ),
                stacked=True,
                low=0,
                high=1,
            ),
            lines(
                "Skipped and repeated steps",
                "Are steps thrown away because a number was not finite, or done again after a loss of state?",
                "none",
                Query(
                    "max by (run) (increase(@steps_skipped_total[$__rate_interval]))",
                    "skipped {{run}}",
                ),
                Query(
                    "max by (run) (increase(@steps_recomputed_total[$__rate_interval]))",
                    "repeated {{run}}",
                ),
                bars=True,
            ),
        ],
    )


def _at_risk() -> Row:
    return Row(
        "What would I lose if everything died now?",
        [
            with_runbooks(
                lines(
                    "Steps at risk",
                    "How many steps would be done again if one node, or all nodes, were lost now?",
                    "none",
                    Query("max by (loss) (@steps_at_risk)", "{{loss}}"),
                    Query("max(@checkpoint_every_steps)", "steps between checkpoints"),
                    low=0,
                ),
                "StepsAtRisk",
            ),
            with_runbooks(
                lines(
                    "Age of the newest states",
                    "How old is the state that a restart would begin from, in memory, on mirrors and in the bucket?",
                    "s",
                    Query(
                        "time() - min(@snapshot_timestamp_seconds)", "memory, oldest of all nodes"
                    ),
                    Query(
                        "time() - min(@mirror_timestamp_seconds)", "mirrors, oldest of all nodes"
                    ),
                    Query(
                        "time() - max by (run) (@checkpoint_commit_timestamp_seconds)",
                        "bucket {{run}}",
                    ),
                    low=0,
                ),
                "CommitTooOld",
            ),
            with_runbooks(
                lines(
                    "Checkpoints",
                    "Do commits go on at an even pace? A failure means that a checkpoint did not reach the bucket.",
                    "none",
                    Query(
                        "sum(increase(@checkpoint_commits_total[$__rate_interval]))", "committed"
                    ),
                    Query("sum(increase(@checkpoint_failures_total[$__rate_interval]))", "failed"),
                    bars=True,
                ),
                "VerifyFailed",
            ),
        ],
    )


def _which_node() -> Row:
    return Row(
        "Which node is bad?",
        [
            with_runbooks(
                ranking(
                    "Workers that failed",
                    "Whose workers failed in the visible range? A collective that failed has its cause on another node.",
                    "none",
                    Query(
                        'round(sum by (node) (increase(@worker_failures_total{cause!="collective"}[$__range])))',
                        "{{node}}",
                    ),
                    limits=Limits(1, 3),
                ),
                "NodeQuarantined",
                "CrashLoop",
            ),
            lines(
                "Computing time of a step against the median node",
                "Is one node slower than the others? All wait for the slowest.",
                "suffix: ×",
                Query(
                    'sum by (node) (rate(@step_phase_seconds_sum{phase="compute"}[$__rate_interval]))'
                    ' / sum by (node) (rate(@step_phase_seconds_count{phase="compute"}[$__rate_interval]))'
                    " / scalar(quantile(0.5,"
                    ' sum by (node) (rate(@step_phase_seconds_sum{phase="compute"}[$__rate_interval]))'
                    ' / sum by (node) (rate(@step_phase_seconds_count{phase="compute"}[$__rate_interval]))))',
                    "{{node}}",
                ),
                limits=Limits(1.2, 1.5),
                low=0,
                decimals=2,
            ),
            with_runbooks(
                lines(
                    "Nodes by state",
                    "Who trains, who waits, and who is kept out?",
                    "none",
                    Query("max by (state) (@nodes)", "{{state}}"),
                    stacked=True,
                    low=0,
                ),
                "CapacityLow",
                "NodeQuarantined",
            ),
        ],
    )
