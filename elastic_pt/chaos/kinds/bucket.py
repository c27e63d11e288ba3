"""Faults of the bucket as the nodes see it. The run of faults itself reads the bucket directly.

All strike the requests of all nodes, whichever node is named. `share` is the part of the requests that is struck.
"""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

from elastic_pt.chaos.kinds.kind import TROUBLE, Action, Evidence, Kind, Need, Strike
from elastic_pt.chaos.s3_faults import (
    ACCESS_DENIED,
    CONFLICT,
    EXPIRED_TOKEN,
    INTERNAL_ERROR,
    LOST_ANSWER,
    SLOW_DOWN,
    Bandwidth,
    Cut,
    Delay,
    FlipBit,
    Hang,
    HideNewest,
    Reset,
    S3Fault,
    Truncate,
)

if TYPE_CHECKING:
    from elastic_pt.chaos.arena import Arena

_SOME: Final = {"share": 0.5}


def _strike(make: Callable[[Strike], S3Fault], methods: Collection[str], key: str) -> Action:
    def act(arena: "Arena", strike: Strike) -> None:
        share = strike.parameters.get("share", 1.0)
        arena.strike_bucket(strike.number, make(strike), methods=methods, key=key, share=share)

    return act


def _told_by(*events: str, sample: str) -> Evidence:
    return Evidence(
        events=frozenset(events),
        metrics=frozenset({sample}),
        names_node=False,
        may=TROUBLE,
    )


_RETRIED: Final = _told_by(
    "store_retry", sample='elastic_pt_store_requests_total{result="transient"}'
)
_DENIED: Final = _told_by(
    *("upload_failed", "commit_delayed", "turn_failed", "account_not_written", "worker_failed"),
    sample='elastic_pt_store_requests_total{result="denied"}',
)


def _kind(
    name: str,
    meaning: str,
    fault: S3Fault | Callable[[Strike], S3Fault],
    evidence: Evidence = _RETRIED,
    *,
    methods: Collection[str] = (),
    key: str = "*",
    parameters: Mapping[str, Any] | None = None,
) -> Kind:
    return Kind(
        name,
        meaning,
        strike=_strike(fault if callable(fault) else lambda _: fault, methods, key),
        heal=lambda arena, strike: arena.mend_bucket(strike.number),
        met=lambda arena, strike: arena.requests_struck(strike.number),
        needs=frozenset({Need.BUCKET}),
        parameters=parameters or {},
        evidence=evidence,
    )


OF_BUCKET: Final = (
    _kind("bucket_away", "no request to the bucket gets an answer: connections are closed", Cut()),
    _kind("hanging_bucket", "requests to the bucket get no answer and no end", Hang()),
    _kind("throttled", "the bucket answers 503 SlowDown", SLOW_DOWN, parameters={"share": 0.8}),
    _kind(
        "server_errors", "the bucket answers 500 InternalError", INTERNAL_ERROR, parameters=_SOME
    ),
    _kind("denied", "the bucket answers 403 AccessDenied", ACCESS_DENIED, _DENIED),
    _kind("expired_credentials", "the bucket answers 400 ExpiredToken", EXPIRED_TOKEN, _DENIED),
    _kind(
        "conflicts",
        "writes are answered 409 ConditionalRequestConflict and not carried out",
        CONFLICT,
        methods=["PUT"],
        parameters=_SOME,
    ),
    _kind(
        "lost_responses",
        "writes are carried out, and their answers are lost",
        LOST_ANSWER,
        methods=["PUT", "POST"],
        parameters=_SOME,
    ),
    _kind(
        "truncated_answers",
        "answers end in the middle",
        Truncate(),
        methods=["GET"],
        parameters=_SOME,
    ),
    _kind(
        "reset_answers",
        "connections are reset in the middle of an answer",
        Reset(in_answer=True),
        parameters=_SOME,
    ),
    _kind(
        "slow_bucket",
        "each request takes `seconds` longer",
        lambda strike: Delay(strike.parameters["seconds"]),
        _told_by(sample='elastic_pt_store_request_seconds{above="0.1"}'),
        parameters={"seconds": 1.0},
    ),
    _kind(
        "narrow_bucket",
        "bodies of requests and answers pass at `bytes_per_s`, those of all nodes together",
        lambda strike: Bandwidth(int(strike.parameters["bytes_per_s"])),
        _told_by(sample='elastic_pt_store_request_seconds{above="0.1"}'),
        parameters={"bytes_per_s": 200_000},
    ),
    _kind(
        "stale_listing",
        "listings lack their three newest keys",
        HideNewest(3),
        Evidence(silent="a listing cannot show what it lacks, and nothing depends on it"),
    ),
    _kind(
        "bucket_bit_flips",
        "a bit flips in what is read of checkpoints, on its way from the bucket",
        FlipBit(),
        Evidence(
            events=frozenset({"checkpoint_bytes_wrong", "commit_failed"}),
            names_node=False,
            may=TROUBLE,
        ),
        key="*/ckpt/*",
        parameters={"share": 0.1},
    ),
)
