"""`elastic-pt doctor` on buckets: each right, the server's clock, rules, and what cannot be reached.

The servers are real: a Ceph RGW with users that lack a right, and moto. A small server has a clock of its own.
"""

import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from elastic_pt.chaos.bucket import Bucket
from elastic_pt.chaos.ceph import Ceph
from elastic_pt.chaos.servers import free_port
from elastic_pt.config import ElasticSection
from elastic_pt.doctor import bucket
from elastic_pt.doctor.bucket import Speed, judge_latency, judge_rates
from elastic_pt.doctor.check import Check
from elastic_pt.doctor.machine import Needs
from elastic_pt.store.open import open_store
from elastic_pt.store.s3 import S3Store
from tests.services.fixtures import point_aws_at

OBJECTS = ("s3:PutObject", "s3:GetObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
ELASTIC = ElasticSection()
PAGE = Path(__file__).parents[2] / "docs" / "deployment" / "doctor.md"


def rules_of_the_page() -> dict[str, Any]:
    """The rules that the page gives to an operator, by their names."""
    found = re.search(r'^    \{"Rules".*?^    \]\}', PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return {rule["ID"]: rule for rule in json.loads(found[0])["Rules"]}


def examined(url: str) -> dict[str, Check]:
    """All checks of a bucket, by name."""
    store = open_store(url, timeout_s=5.0, patient=False)
    first = bucket.reached(store)
    checks = bucket.bucket_checks(store, first, None, ELASTIC, [])
    return {each.name: each for each in checks}


def bad(checks: dict[str, Check]) -> set[str]:
    for each in checks.values():
        assert bool(each.remedy) == (not each.ok), each
        assert "\n" not in each.found + each.expected + each.remedy
    return {each.name for each in checks.values() if not each.ok}


def as_owner(owned: Bucket) -> Any:
    return fsspec.filesystem(
        "s3",
        endpoint_url=owned.endpoint,
        key=owned.access_key,
        secret=owned.secret_key,
        skip_instance_cache=True,
    )


@pytest.fixture
def shared(
    ceph: Ceph, monkeypatch: pytest.MonkeyPatch
) -> tuple[Bucket, Callable[[list[str], list[str]], None]]:
    """A bucket, and a function that gives another user rights on its objects and on itself, and becomes that user."""
    mine, theirs = (ceph.create_bucket(f"doctor-{uuid.uuid4().hex[:12]}") for _ in range(2))

    def allow(on_objects: list[str], on_bucket: list[str]) -> None:
        user, arn = {"AWS": [f"arn:aws:iam:::user/{theirs.name}"]}, f"arn:aws:s3:::{mine.name}"
        statements = [
            {"Effect": effect, "Principal": user, "Action": actions, "Resource": resource}
            for effect, actions, resource in (
                ("Allow", on_objects, f"{arn}/*"),
                # Who wrote an object may read it, unless that is denied.
                ("Deny", [each for each in OBJECTS if each not in on_objects], f"{arn}/*"),
                ("Allow", on_bucket, arn),
            )
            if actions
        ]
        policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
        as_owner(mine).call_s3("put_bucket_policy", Bucket=mine.name, Policy=policy)
        point_aws_at(theirs.endpoint, theirs.access_key, theirs.secret_key, monkeypatch)

    return mine, allow


@pytest.mark.ceph
@pytest.mark.parametrize(
    ("lacks", "on_bucket", "expected"),
    [
        ("", ["s3:ListBucket"], set()),
        ("s3:DeleteObject", ["s3:ListBucket"], {"right_delete"}),
        ("s3:GetObject", ["s3:ListBucket"], {"right_get", "right_range"}),
        ("s3:AbortMultipartUpload", ["s3:ListBucket"], {"right_abort"}),
        ("", [], {"right_list"}),
    ],
    ids=["all", "no delete", "no get", "no abort", "no list"],
)
def test_each_right_is_tried(
    shared: tuple[Bucket, Callable[[list[str], list[str]], None]],
    lacks: str,
    on_bucket: list[str],
    expected: set[str],
) -> None:
    """A user who lacks a right learns which one, what the server said, and what to allow; the others are allowed."""
    owned, allow = shared
    allow([each for each in OBJECTS if each != lacks], on_bucket)
    store = open_store(f"{owned.url}/runs/a", timeout_s=5.0)
    checks = {each.name: each for each in bucket.rights(store, "scratch/")}
    assert bad(checks) == expected
    assert len(checks) == 8
    for name in expected:
        assert checks[name].found.startswith("denied: An error occurred (")
        assert (lacks or "s3:ListBucket") in checks[name].remedy


@pytest.mark.ceph
def test_a_trainer_that_may_not_delete_is_told_so(
    shared: tuple[Bucket, Callable[[list[str], list[str]], None]],
) -> None:
    """Without the right to delete all other checks are made, and little is left behind."""
    owned, allow = shared
    allow([each for each in OBJECTS if each != "s3:DeleteObject"], ["s3:ListBucket"])
    url = f"{owned.url}/runs/a"
    checks = examined(url)
    assert bad(checks) == {"lifecycle_rule", "right_delete"}
    assert {"create_once", "rate_up", "rate_down", "latency", "clock", "credentials"} <= set(checks)
    assert checks["lifecycle_rule"].found == "cannot be read: access denied"
    assert "s3:GetLifecycleConfiguration" in checks["lifecycle_rule"].remedy
    objects = as_owner(owned).find(owned.name, detail=True).values()
    assert 0 < sum(each["size"] for each in objects) < 8 * 2**20


@pytest.mark.ceph
def test_a_healthy_bucket_is_well_and_empty_afterwards(ceph_url: str) -> None:
    """The owner of a bucket with a rule finds nothing to mend, and no object or upload of the check remains."""
    name, filesystem = (
        ceph_url.removeprefix("s3://"),
        fsspec.filesystem("s3", skip_instance_cache=True),
    )
    put_rules(filesystem, name, "uploads")
    checks = examined(f"{ceph_url}/runs/a")
    assert bad(checks) == set()
    assert "fenced" in checks["create_once"].found
    assert checks["clock"].found == "as the store's, to a second"
    assert open_store(ceph_url).keys("") == []
    assert not filesystem.call_s3("list_multipart_uploads", Bucket=name).get("Uploads")


def put_rules(filesystem: Any, name: str, *kinds: str) -> None:
    filesystem.call_s3(
        "put_bucket_lifecycle_configuration",
        Bucket=name,
        LifecycleConfiguration={"Rules": [rules_of_the_page()[each] for each in kinds]},
    )


@pytest.mark.ceph
def test_rules_and_versions(ceph_url: str) -> None:
    """Versions that nothing removes, and uploads that nothing ends, are told; rules mend both."""
    name = ceph_url.removeprefix("s3://")
    filesystem, store = fsspec.filesystem("s3", skip_instance_cache=True), s3_store(ceph_url)

    def found() -> list[bool]:
        checks = bucket.lifecycle_rule(store), bucket.versioning(store)
        return [each is not None and each.ok for each in checks]

    assert found() == [False, True]
    filesystem.call_s3(
        "put_bucket_versioning", Bucket=name, VersioningConfiguration={"Status": "Enabled"}
    )
    assert found() == [False, False]
    put_rules(filesystem, name, "uploads")
    assert found() == [True, False]
    put_rules(filesystem, name, "uploads", "versions")
    assert found() == [True, True]


def s3_store(url: str) -> S3Store:
    store = open_store(f"{url}/runs/a", timeout_s=5.0)
    assert isinstance(store, S3Store)
    return store


@pytest.mark.ceph
@pytest.mark.parametrize("key", ["wrong", "unknown"])
def test_refused_credentials_are_one_line(
    ceph: Ceph, ceph_url: str, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """With a wrong secret or an unknown key each right would be refused: one check says so, with the server's code."""
    owned = ceph.create_bucket(f"doctor-{uuid.uuid4().hex[:12]}")
    access_key = owned.access_key if key == "wrong" else "nobody"
    point_aws_at(ceph.endpoint, access_key, "wrong-secret", monkeypatch)
    checks = examined(f"{owned.url}/run")
    assert bad(checks) == {"bucket"}
    assert set(checks) == {"bucket", "clock"}
    code = "SignatureDoesNotMatch" if key == "wrong" else "InvalidAccessKeyId"
    assert code in checks["bucket"].found
    assert "wrong-secret" not in str(checks)


@pytest.mark.ceph
def test_a_bucket_that_does_not_exist_is_one_line(ceph_url: str) -> None:
    """A misspelt bucket is the finding, and nothing else is tried."""
    checks = examined("s3://no-such-bucket-here/run")
    assert bad(checks) == {"bucket"}
    assert "does not exist" in checks["bucket"].found


def test_a_server_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens at the endpoint: told at once, with its address."""
    port = free_port()
    point_aws_at(f"http://127.0.0.1:{port}", "key", "secret", monkeypatch)
    began_s = time.monotonic()
    checks = examined("s3://bucket/run")
    assert bad(checks) == set(checks) == {"bucket"}
    assert str(port) in checks["bucket"].found
    assert time.monotonic() - began_s < 5


def test_a_store_that_can_only_be_read_is_told_once(tmp_path: Path) -> None:
    """A web server holds data, but no run: the first right that it lacks is the finding, and nothing else is tried."""
    handler = partial(QuietFiles, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        checks = examined(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
    assert bad(checks) == {"right_put"}
    assert set(checks) == {"bucket", "right_put"}


class QuietFiles(SimpleHTTPRequestHandler):
    """Serves a directory."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def skewed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server whose clock is an hour behind, and which refuses every request for that, as S3 does."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = b"<Error><Code>RequestTimeTooSkewed</Code><Message>skewed</Message></Error>"
            self.send_response_only(403)
            self.send_header("Date", formatdate(time.time() - 3600, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_aws_at(f"http://127.0.0.1:{server.server_port}", "key", "secret", monkeypatch)
    yield
    server.shutdown()


def test_a_clock_that_is_off_is_found_although_every_request_is_refused(skewed: None) -> None:
    """The refusal has the server's time: the cause is shown beside it."""
    checks = examined("s3://bucket/run")
    assert bad(checks) == {"bucket", "clock"}
    assert "RequestTimeTooSkewed" in checks["bucket"].found
    assert re.match(r"3,(599|600) s ahead of", checks["clock"].found)


@pytest.mark.moto
@pytest.mark.parametrize(
    ("variables", "renewed", "found"),
    [
        ({}, True, "env: renewed or permanent"),
        ({"AWS_SESSION_TOKEN": "a" * 20}, False, "env: temporary, and nothing renews them"),
        (
            {
                "AWS_SESSION_TOKEN": "a" * 20,
                "AWS_CREDENTIAL_EXPIRATION": "2099-01-01T00:00:00Z",
            },
            False,
            "env: temporary, and nothing renews them, until 2099-01-01T00:00:00Z",
        ),
    ],
    ids=["keys", "a session", "a session with its end"],
)
def test_credentials_that_end_are_told(
    moto_url: str,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    renewed: bool,
    found: str,
) -> None:
    """A session token in the environment ends during the run, and an agent cannot renew it."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check = bucket.credentials(s3_store(moto_url))
    assert (check.ok, check.found) == (renewed, found)


def test_a_directory_is_as_before(tmp_path: Path) -> None:
    """A place that does not exist yet is well, and does not exist afterwards; a directory with a file keeps it."""
    (tmp_path / "runs").mkdir()
    checks = examined(f"file://{tmp_path}/runs/new/a")
    assert bad(checks) == set()
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "runs" / "kept").touch()
    assert bad(examined(f"file://{tmp_path}/runs")) == set()
    assert (tmp_path / "runs" / "kept").exists()


def test_slow_requests_are_judged_by_the_takeover() -> None:
    """docs/assumptions.md: a request takes less than half of `elastic.takeover_s`; the slowest one counts."""
    assert judge_latency([0.01, 1.49], 3.0).ok
    check = judge_latency([0.01, 0.02, 1.5], 3.0)
    assert not check.ok
    assert check.found == "median 20 ms, slowest 1.5 s of 3 small requests"


def test_rates_are_judged_by_the_share_and_the_timeouts() -> None:
    """A share that is not uploaded within `settle_timeout_s`, or not read within `startup_timeout_s`, is too much."""
    needs = Needs(
        nodes=2,
        workers=1,
        ranks=2,
        threads=1,
        parameters=10**9,
        state_bytes=12 * 10**9,
        copies=1,
        on_gpu=False,
    )
    up, down = judge_rates(Speed(up=10.1e6, down=9.9e6), needs, ELASTIC)
    assert (up.ok, down.ok) == (True, False)
    assert "elastic.startup_timeout_s" in down.expected
    assert [each.ok for each in judge_rates(Speed(0.9e6, 1.1e6), None, ELASTIC)] == [False, True]
