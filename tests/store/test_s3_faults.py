"""Faults of S3: lost responses, conflicts, throttling, hangs, expired credentials.

A proxy injects each fault at (method, which request) and forwards all other requests to a real server.
"""

import os
from collections.abc import Iterator

import pytest

from elastic_pt.chaos.s3_faults import (
    ACCESS_DENIED,
    CONFLICT,
    EXPIRED_TOKEN,
    INTERNAL_ERROR,
    LOST_ANSWER,
    SLOW_DOWN,
    Answer,
    Cut,
    Hang,
    HideNewest,
    Reset,
)
from elastic_pt.chaos.s3_proxy import FaultProxy
from elastic_pt.errors import AccessDenied, AlreadyExists, ConfigError, StoreError
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store
from elastic_pt.store.retry import Retry
from elastic_pt.store.s3 import PART_BYTES, S3Store

NO_SUCH_UPLOAD = Answer(404, "NoSuchUpload")


@pytest.fixture(
    params=[
        pytest.param("moto", marks=pytest.mark.moto),
        pytest.param("ceph", marks=pytest.mark.ceph),
    ]
)
def proxied(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Store, FaultProxy]]:
    """A store that sends its requests through the proxy, by the standard AWS variable for the endpoint."""
    bucket = request.getfixturevalue(f"{request.param}_url")
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield open_store(f"{bucket}/run", timeout_s=20.0), proxy


def test_create_succeeds_when_its_response_was_lost(proxied: tuple[Store, FaultProxy]) -> None:
    """The first attempt makes the second one fail; the bytes show that the object is ours."""
    store, proxy = proxied
    proxy.strike(LOST_ANSWER, methods=["PUT"], times=1)
    store.create("log/0", b"nonce 1")
    assert proxy.requests["PUT"] == 2
    assert store.read("log/0") == b"nonce 1"


def test_create_succeeds_when_a_500_follows_it(
    proxied: tuple[Store, FaultProxy],
) -> None:
    """An error after the object was created counts as a lost response."""
    store, proxy = proxied
    proxy.strike(Answer(500, "InternalError", carried_out=True), methods=["PUT"], times=1)
    store.create("log/0", b"nonce 1")
    assert store.read("log/0") == b"nonce 1"


def test_create_fails_when_response_and_race_were_lost(
    proxied: tuple[Store, FaultProxy],
) -> None:
    """Another writer's bytes never count as ours, whatever the responses were."""
    store, proxy = proxied
    store.create("log/0", b"theirs")
    proxy.strike(LOST_ANSWER, methods=["PUT"], times=1)
    with pytest.raises(AlreadyExists):
        store.create("log/0", b"ours")
    assert store.read("log/0") == b"theirs"


def test_conflict_is_retried(proxied: tuple[Store, FaultProxy]) -> None:
    """409 ConditionalRequestConflict means that the race is undecided, not that it is lost."""
    store, proxy = proxied
    conflict = proxy.strike(CONFLICT, methods=["PUT"], times=2)
    store.create("log/0", b"1")
    assert proxy.requests["PUT"] == 3
    assert conflict.struck == 2


@pytest.mark.parametrize("fault", [SLOW_DOWN, INTERNAL_ERROR], ids=lambda fault: fault.code)
def test_throttling_and_server_errors_are_retried(
    proxied: tuple[Store, FaultProxy], fault: Answer
) -> None:
    """Every operation retries after a few refusals, with one request per attempt."""
    store, proxy = proxied
    store.write("x", b"1234")
    before = dict(proxy.requests)
    for method in ("PUT", "GET", "HEAD", "DELETE"):
        proxy.strike(fault, methods=[method], times=2)
    store.write("x", b"12345")
    assert store.read("x") == b"12345"
    assert store.size("x") == 5
    store.delete("x")
    proxy.strike(fault, methods=["GET"], times=1)
    assert store.keys("") == []
    after = proxy.requests
    assert after["PUT"] - before["PUT"] == 3
    assert after["HEAD"] - before.get("HEAD", 0) == 3


def test_cut_connection_is_retried(proxied: tuple[Store, FaultProxy]) -> None:
    """A connection that is closed or reset during a read costs one attempt."""
    store, proxy = proxied
    store.write("x", b"1234")
    for fault in (Cut(), LOST_ANSWER, Reset(), Reset(in_answer=True)):
        proxy.strike(fault, methods=["GET"], times=1)
    assert store.read("x", 1, 3) == b"23"


def test_credentials_are_renewed_once(proxied: tuple[Store, FaultProxy]) -> None:
    """A refusal may mean that the token has just expired: one new session is opened at once, and only one in some seconds."""
    store, proxy = proxied
    store.write("x", b"1")
    proxy.strike(EXPIRED_TOKEN, methods=["GET"], times=1)
    assert store.read("x") == b"1"
    proxy.strike(ACCESS_DENIED, methods=["GET"], times=1)
    with pytest.raises(AccessDenied, match="reading x of s3://"):
        store.read("x")
    assert proxy.requests["GET"] == 3
    assert store.read("x") == b"1"


def test_only_the_failed_part_of_an_upload_is_retried(proxied: tuple[Store, FaultProxy]) -> None:
    """After one refused part, the others are not sent again. A lost response to the last request is not a failure."""
    store, proxy = proxied
    data = os.urandom(1000) * (5 * PART_BYTES // 2000)
    proxy.strike(SLOW_DOWN, methods=["PUT"], times=1)
    proxy.strike(LOST_ANSWER, methods=["PUT"], times=1)
    store.write("large", data)
    assert proxy.requests["PUT"] == 3 + 2
    assert store.read("large") == data
    proxy.strike(INTERNAL_ERROR, methods=["POST"], times=1)
    proxy.strike(LOST_ANSWER, methods=["POST"], times=1)
    store.write("large", data[::-1])
    assert store.read("large") == data[::-1]


def test_upload_succeeds_when_its_completion_response_was_lost(
    proxied: tuple[Store, FaultProxy],
) -> None:
    """The retry finds the upload gone; the nonce on the object shows that the first attempt completed it."""
    store, proxy = proxied
    data = bytes(5 * PART_BYTES // 2)
    sent = proxy.requests["POST"]
    # The first POST begins the upload.
    proxy.strike(LOST_ANSWER, methods=["POST"], after=1, times=1)
    proxy.strike(NO_SUCH_UPLOAD, methods=["POST"], after=1, times=1)
    store.write("large", data)
    assert proxy.requests["POST"] - sent == 3
    assert store.size("large") == len(data)


def test_aborted_upload_is_an_error(
    proxied: tuple[Store, FaultProxy],
) -> None:
    """An upload that is gone and was not completed is an error, even if an older object exists."""
    store, proxy = proxied
    store.write("large", b"old")
    proxy.strike(NO_SUCH_UPLOAD, methods=["POST"], after=1, times=1)
    with pytest.raises(StoreError):
        store.write("large", bytes(5 * PART_BYTES // 2))
    assert store.read("large") == b"old"


def test_libraries_do_not_retry(proxied: tuple[Store, FaultProxy]) -> None:
    """Our retry sees each refusal: s3fs and botocore add no attempts of their own."""
    store, proxy = proxied
    slept_s: list[float] = []
    ours = S3Store(store.url, retry=Retry(20.0, sleep=slept_s.append))
    for code in ("SlowDown", "InternalError"):
        proxy.strike(Answer(503, code), methods=["PUT"], times=3)
        ours.write("x", b"1")
    assert len(slept_s) == 6


def test_failed_upload_leaves_the_old_object(
    proxied: tuple[Store, FaultProxy],
) -> None:
    """A writer that fails during an upload has written nothing, and removes its parts."""
    store, proxy = proxied
    store.write("large", b"old")
    proxy.strike(ACCESS_DENIED, methods=["PUT"])
    with pytest.raises(AccessDenied):
        store.write("large", bytes(3 * PART_BYTES))
    assert store.read("large") == b"old"
    assert proxy.requests["DELETE"] == 1


@pytest.mark.parametrize("hanging", [False, True])
def test_request_fails_at_the_deadline_with_its_attempts(
    proxied: tuple[Store, FaultProxy], hanging: bool
) -> None:
    """A store that refuses or does not answer costs at most the deadline, and the error names it."""
    store, proxy = proxied
    impatient = open_store(store.url, timeout_s=1.0)
    proxy.strike(Hang() if hanging else SLOW_DOWN, methods=["PUT"])
    with pytest.raises(
        StoreError,
        match=r"creating log/0 of s3://.*: gave up after \d+ attempts in [12]\.\d s \(store.deadline_s = 1\)",
    ):
        impatient.create("log/0", b"1")


def test_stale_listing_affects_no_other_operation(proxied: tuple[Store, FaultProxy]) -> None:
    """A created object is found by its key, even if the listing is empty."""
    store, proxy = proxied
    store.create("log/0", b"1")
    listing = proxy.strike(HideNewest(), times=1)
    assert store.keys("log/") == []
    assert listing.struck == 1
    assert store.size("log/0") == 1
    assert store.read("log/0") == b"1"
    with pytest.raises(AlreadyExists):
        store.create("log/0", b"2")


def test_missing_bucket_is_a_config_error(
    proxied: tuple[Store, FaultProxy],
) -> None:
    """A mistyped bucket is a ConfigError that names it, not a missing object."""
    for use in (
        lambda store: store.write("x", b"1"),
        lambda store: store.create("x", b"1"),
        lambda store: store.read("x"),
        lambda store: store.keys(""),
    ):
        with pytest.raises(ConfigError, match="s3://no-such-bucket-here/run names a bucket"):
            use(open_store("s3://no-such-bucket-here/run", timeout_s=5.0))


def test_wrong_credentials_are_denied(
    proxied: tuple[Store, FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing credentials raise `AccessDenied` without waiting for the deadline."""
    store, _ = proxied
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDenied, match="check the credentials"):
        open_store(store.url).read("x")
