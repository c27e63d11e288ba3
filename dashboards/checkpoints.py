"""Checkpoints and storage: how safe the state of a run is, what that costs, and how the bucket answers."""

from dashboards.layout import Board, Row
from dashboards.panels import ANY, Limits, Query, heatmap, lines, ranking, stat, with_runbooks


def board() -> Board:
    """The dashboard for whoever looks after the bucket."""
    return Board(
        "elastic-pt-checkpoints",
        "How safe is the state of the run, what does that cost, and how does the bucket answer?",
        [_now(), _states(), _cost(), _store()],
    )


def _now() -> Row:
    return Row(
        "Now",
        [
            stat(
                "Committed step",
                "Which step would a restart of all nodes begin from?",
                "none",
                "max by (run) (@checkpoint_committed_step)",
                none="no commit yet",
            ),
            with_runbooks(
                stat(
                    "Since the last commit",
                    "How old is the newest checkpoint in the bucket?",
                    "s",
                    "time() - max by (run) (@checkpoint_commit_timestamp_seconds)",
                    limits=Limits(1800, 3600),
                    none="no commit yet",
                ),
                "CommitTooOld",
            ),
            stat(
                "Steps between checkpoints",
                "How often does the run commit by plan?",
                "none",
                "max by (run) (@checkpoint_every_steps)",
            ),
            stat(
                "Checkpoints not finished",
                "How many checkpoints does the slowest node still upload, or wait for?",
                "none",
                "max by (run) (@checkpoints_pending)",
                limits=Limits(2, 4),
            ),
            with_runbooks(
                stat(
                    "Failures",
                    "How many checkpoints did not reach the bucket in the visible range?",
                    "none",
                    "round(sum by (run) (increase(@checkpoint_failures_total[$__range])))",
                    limits=ANY,
                ),
                "CommitTooOld",
            ),
            with_runbooks(
                stat(
                    "Failed checks",
                    "How many checkpoints or copies in memory were wrong when they were read?",
                    "none",
                    "round(sum by (run) (increase(@verify_failures_total[$__range])))",
                    limits=ANY,
                ),
                "VerifyFailed",
            ),
        ],
    )


def _states() -> Row:
    return Row(
        "How safe is the state?",
        [
            with_runbooks(
                lines(
                    "Steps behind the newest step",
                    "How far is each kind of state behind? The slowest node counts.",
                    "none",
                    Query("max(@step) - min(@snapshot_step)", "memory"),
                    Query("max(@step) - min(@mirror_step)", "mirrors"),
                    Query("max(@step) - max(@checkpoint_committed_step)", "bucket"),
                    low=0,
                ),
                "StepsAtRisk",
            ),
            with_runbooks(
                lines(
                    "Steps at risk",
                    "How many steps would be done again if one node, or all nodes, were lost now?",
                    "none",
                    Query("max by (loss) (@steps_at_risk)", "{{loss}}"),
                    low=0,
                ),
                "StepsAtRisk",
            ),
            with_runbooks(
                lines(
                    "Checkpoints",
                    "Are checkpoints committed, or do they fail, or get skipped for want of room?",
                    "none",
                    Query(
                        "sum(increase(@checkpoint_commits_total[$__rate_interval]))", "committed"
                    ),
                    Query("sum(increase(@checkpoint_failures_total[$__rate_interval]))", "failed"),
                    Query(
                        "sum(increase(@checkpoint_skips_total[$__rate_interval]))", "shards skipped"
                    ),
                    Query(
                        "sum(increase(@checkpoint_tidy_failures_total[$__rate_interval]))",
                        "not tidied",
                    ),
                    bars=True,
                ),
                "CommitTooOld",
            ),
            lines(
                "Age of snapshots",
                "How old is the newest state in each node's memory?",
                "s",
                Query("time() - max by (node) (@snapshot_timestamp_seconds)", "{{node}}"),
                low=0,
            ),
            lines(
                "Age of mirrored states",
                "How old is the newest state of each node that all its mirrors hold?",
                "s",
                Query("time() - max by (node) (@mirror_timestamp_seconds)", "{{node}}"),
                none="no mirrors",
                low=0,
            ),
            lines(
                "Snapshots without room",
                "Is there too little memory for states, on a node or on its mirror?",
                "none",
                Query(
                    "sum by (node) (increase(@snapshot_skips_total[$__rate_interval]))", "{{node}}"
                ),
                bars=True,
            ),
        ],
    )


def _cost() -> Row:
    return Row(
        "What does it cost the training?",
        [
            lines(
                "Time that checkpoints and snapshots block",
                "How long did the last checkpoint and the last snapshot hold up the workers of the slowest node?",
                "s",
                Query("max(@checkpoint_stage_seconds)", "checkpoint"),
                Query("max(@snapshot_seconds)", "snapshot"),
                low=0,
            ),
            lines(
                "Share of time lost to it",
                "Which share of all nodes' time waits for snapshots and checkpoints?",
                "percentunit",
                Query(
                    'sum by (run) (rate(@time_seconds_total{state="checkpoint_stall"}[$__rate_interval]))'
                    " / sum by (run) (rate(@time_seconds_total[$__rate_interval]))"
                ),
                limits=Limits(0.02, 0.05),
                low=0,
            ),
            lines(
                "Time to upload a shard",
                "How long did a worker's shard take to the bucket, over the hour before?",
                "s",
                Query(
                    "histogram_quantile(0.5, sum by (le) (rate(@checkpoint_upload_seconds_bucket[1h])))",
                    "median",
                ),
                Query(
                    "histogram_quantile(0.95, sum by (le) (rate(@checkpoint_upload_seconds_bucket[1h])))",
                    "95th percentile",
                ),
                low=0,
            ),
            lines(
                "Uploaded",
                "How many bytes of checkpoints go to the bucket per second?",
                "Bps",
                Query(
                    "sum by (node) (rate(@checkpoint_upload_bytes_total[$__rate_interval]))",
                    "{{node}}",
                ),
                stacked=True,
                low=0,
            ),
            lines(
                "Mirrored",
                "How many bytes of other nodes' states does each node copy per second?",
                "Bps",
                Query("sum by (node) (rate(@mirror_bytes_total[$__rate_interval]))", "{{node}}"),
                stacked=True,
                low=0,
            ),
            heatmap(
                "Uploads by duration",
                "Is the bucket evenly fast? Each cell counts shards.",
                "s",
                "sum by (le) (increase(@checkpoint_upload_seconds_bucket[$__rate_interval]))",
            ),
        ],
    )


def _store() -> Row:
    return Row(
        "How does the bucket answer?",
        [
            lines(
                "Requests by operation",
                "What do agents ask of the bucket, and how often? Reads of workers are not counted.",
                "reqps",
                Query(
                    "sum by (operation) (rate(@store_requests_total[$__rate_interval]))",
                    "{{operation}}",
                ),
                stacked=True,
                low=0,
            ),
            with_runbooks(
                lines(
                    "Share of requests that failed",
                    "Does the bucket refuse, fail or hang? `missing` and `exists` are answers, not errors.",
                    "percentunit",
                    Query(
                        'sum by (run) (rate(@store_requests_total{result=~"denied|transient|failed"}[$__rate_interval])'
                        " or 0 * rate(@store_requests_total[$__rate_interval]))"
                        " / sum by (run) (rate(@store_requests_total[$__rate_interval]))"
                    ),
                    limits=Limits(0.01, 0.1),
                    low=0,
                ),
                "StorageErrors",
            ),
            lines(
                "Requests by result",
                "How do requests end?",
                "reqps",
                Query(
                    "sum by (result) (rate(@store_requests_total[$__rate_interval]))", "{{result}}"
                ),
                low=0,
            ),
            lines(
                "95th percentile of a request by operation",
                "How slow is the bucket?",
                "s",
                Query(
                    "histogram_quantile(0.95, sum by (operation, le) (rate(@store_request_seconds_bucket[$__rate_interval])))",
                    "{{operation}}",
                ),
                limits=Limits(1, 10),
                low=0,
            ),
            lines(
                "Read and written",
                "How many bytes do agents read and write per second? Reads of workers are not counted.",
                "Bps",
                Query(
                    "sum by (direction) (rate(@store_bytes_total[$__rate_interval]))",
                    "{{direction}}",
                ),
                low=0,
            ),
            with_runbooks(
                ranking(
                    "Retries by operation",
                    "Which requests had to be repeated in the visible range?",
                    "none",
                    Query(
                        "round(sum by (operation) (increase(@store_retries_total[$__range])"
                        " or 0 * sum without (result) (increase(@store_requests_total[$__range]))))",
                        "{{operation}}",
                    ),
                    limits=Limits(10, 100),
                ),
                "StorageErrors",
            ),
        ],
    )
