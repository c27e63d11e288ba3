"""Rows of the dashboard Run about time and money."""

from dashboards.layout import Row
from dashboards.panels import Limits, Query, lines, ranking, stat, with_runbooks

FAULT_STATES = "detect|agree|start|restore|recompute"
"""The buckets of goodput that a fault fills."""
FAULTS = 'cause!~"joined|left|barred"'
"""The matcher of changes that nobody planned."""
_ALL = "sum(rate(@time_seconds_total[$__rate_interval]))"
LEFT = "(max by (run) (@steps_planned) - max by (run) (@step))"
_GAINED = "(max by (run) (@step) - min_over_time(max by (run) (@step)[$__range:$__interval]) > 0)"
"""New steps of the visible range."""
_SEEN_S = "(time() - min_over_time(timestamp(max by (run) (@step))[$__range:$__interval]))"
"""How long the run has been there in the visible range."""
TIME_LEFT = f"{LEFT} * on (run) {_SEEN_S} / on (run) {_GAINED}"
"""With interruptions: a step takes as long as in the visible range."""
COST_LEFT = (
    f"{LEFT} * on (run) sum by (run) (increase(@cost_usd_total[$__range])) / on (run) {_GAINED}"
)
"""A step costs as much as in the visible range."""
NO_PRICE = "no price (telemetry.price_per_hour)"


def badput() -> Row:
    """Node time and money that brought no new step."""
    return Row(
        "What am I paying for and getting nothing?",
        [
            with_runbooks(
                lines(
                    "Where the time of all nodes goes",
                    "Which share of the node-seconds is productive, and what is the rest spent on?",
                    "percentunit",
                    Query(
                        f'sum(rate(@time_seconds_total{{state="productive"}}[$__rate_interval])) / {_ALL}',
                        "productive",
                    ),
                    Query(
                        'sum by (state) (rate(@time_seconds_total{state!="productive"}[$__rate_interval]))'
                        f" / scalar({_ALL})",
                        "{{state}}",
                    ),
                    stacked=True,
                    low=0,
                    high=1,
                    width=16,
                ),
                "GoodputBurn",
            ),
            ranking(
                "Time without new steps",
                "Which bucket of goodput costs most node time in the visible range?",
                "s",
                Query(
                    'sum by (state) (increase(@time_seconds_total{state!="productive"}[$__range])) > 0',
                    "{{state}}",
                ),
            ),
            lines(
                "Price per hour",
                "What do all nodes cost per hour, and how much of that goes into new steps?",
                "currencyUSD",
                Query("3600 * sum(rate(@cost_usd_total[$__rate_interval]))", "all"),
                Query(
                    "3600 * sum(rate(@cost_usd_total[$__rate_interval]))"
                    ' * sum(rate(@time_seconds_total{state="productive"}[$__rate_interval]))'
                    f" / {_ALL}",
                    "for new steps",
                ),
                none=NO_PRICE,
                low=0,
            ),
            lines(
                "Price per million tokens",
                "What does a million trained tokens cost now?",
                "currencyUSD",
                Query(
                    "1e6 * sum by (run) (rate(@cost_usd_total[$__rate_interval]))"
                    " / (max by (run) (rate(@tokens_total[$__rate_interval])) > 0)"
                ),
                none=NO_PRICE,
                low=0,
            ),
            ranking(
                "Money without new steps",
                "What did each bucket of goodput cost in the visible range, at the nodes' mean price?",
                "currencyUSD",
                Query(
                    'sum by (state) (increase(@time_seconds_total{state!="productive"}[$__range]))'
                    " * scalar(sum(increase(@cost_usd_total[$__range])) / sum(increase(@node_seconds_total[$__range])))"
                    " > 0",
                    "{{state}}",
                ),
                none=NO_PRICE,
                decimals=2,
            ),
        ],
    )


def preemption() -> Row:
    recovered = 'sum by (run) (increase(@recovery_seconds_count{cause!="start"}[$__rate_interval]))'
    return Row(
        "What did the last preemption cost?",
        [
            stat(
                "Last recovery",
                "How long did the run stand still after the last change of members, until its first new step?",
                "s",
                'last_over_time((sum by (run) (increase(@recovery_seconds_sum{cause!="start"}[$__rate_interval]))'
                f" / ({recovered} > 0))[$__range:$__interval])",
                limits=Limits(60, 300),
                none="no change yet",
                decimals=1,
            ),
            stat(
                "Steps done again",
                "How many steps were lost by the changes in the visible range?",
                "none",
                "round(sum by (run) (increase(@lost_steps_total[$__range])))",
            ),
            stat(
                "Node time lost to faults",
                "How much node time went into detecting, agreeing, starting, restoring and repeating steps?",
                "s",
                f'sum by (run) (increase(@time_seconds_total{{state=~"{FAULT_STATES}"}}[$__range]))',
            ),
            stat(
                "Price of that time",
                "What did that time cost, at the nodes' mean price?",
                "currencyUSD",
                f'sum by (run) (increase(@time_seconds_total{{state=~"{FAULT_STATES}"}}[$__range]))'
                " * on (run) sum by (run) (increase(@cost_usd_total[$__range]))"
                " / on (run) sum by (run) (increase(@node_seconds_total[$__range]))",
                none=NO_PRICE,
                decimals=2,
            ),
            stat(
                "Node time for each change",
                "What does one change of members cost on average, in node time?",
                "s",
                f'sum by (run) (increase(@time_seconds_total{{state=~"{FAULT_STATES}"}}[$__range]))'
                " / on (run) (sum by (run) (increase(@changes_total[$__range])) > 0)",
                none="no change yet",
            ),
            stat(
                "Notices",
                "How many notices that a machine will be taken away came in the visible range?",
                "none",
                "round(sum by (run) (increase(@notices_total[$__range])))",
            ),
        ],
    )


def end() -> Row:
    """Forecasts."""
    return Row(
        "When will it finish, and for how much?",
        [
            with_runbooks(
                lines(
                    "Steps",
                    "How far is it? A step down is work that is done again.",
                    "none",
                    Query("max by (run) (@step)"),
                    low=0,
                ),
                "NoProgress",
            ),
            lines(
                "Time left, without interruptions",
                "How long would the rest take at the present time of a step, if nothing interrupted it?",
                "s",
                Query(
                    f"{LEFT} * on (run) max by (run) (rate(@step_seconds_sum[$__rate_interval]))"
                    " / on (run) max by (run) (rate(@step_seconds_count[$__rate_interval]))"
                ),
                low=0,
            ),
            lines(
                "Cost to the end",
                "Does the forecast get better? The remaining steps, at the price of a step in as long before as the range is.",
                "currencyUSD",
                Query(COST_LEFT),
                none=NO_PRICE,
                low=0,
                decimals=2,
            ),
        ],
    )
