"""No secret leaves the process through an event."""

import io
import json
import string
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import structlog
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from elastic_pt.store.open import open_store
from elastic_pt.telemetry.events import EventContext, EventOutput, LogFormat, configure_events
from elastic_pt.telemetry.log_file import LogFile
from elastic_pt.telemetry.redaction import REDACTED, Redactor, secrets_in, without_credentials
from elastic_pt.telemetry.shipping import EventBuffer

# What tokens, keys and passwords consist of, with the characters that a URL, JSON and Python escape.
SECRETS = st.text(
    string.ascii_letters + string.digits + "+/=._~-!$%&'\"\\äß", min_size=8, max_size=48
)
TEXT = st.text(max_size=20)


def places_of(secret: str) -> st.SearchStrategy[Any]:
    """Texts that contain a secret whose value is known."""
    return st.tuples(TEXT, TEXT).map(lambda around: f"{around[0]}{secret}{around[1]}")


def nested(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Values of events with the leaf somewhere in them."""
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(st.one_of(inner, TEXT), min_size=1, max_size=3),
            st.tuples(inner, st.integers()),
            st.dictionaries(TEXT, inner, min_size=1, max_size=2),
            inner.map(lambda value: {"bytes": str(value).encode(errors="replace")}),
            inner.map(lambda value: ValueError(value)),
            inner.map(lambda value: {str(value): 1}),
        ),
        max_leaves=4,
    )


class Kept:
    """A sink that keeps events."""

    def __init__(self) -> None:
        self.events: list[Mapping[str, Any]] = []

    def take(self, event: Mapping[str, Any]) -> None:
        self.events.append(event)


@pytest.mark.parametrize("log_format", ["json", "text"])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), secret=SECRETS)
def test_a_known_secret_reaches_no_sink(
    tmp_path_factory: pytest.TempPathFactory,
    log_format: LogFormat,
    data: st.DataObject,
    secret: str,
) -> None:
    """Wherever a known secret is planted, in a value, in a name or in a traceback, no sink's output has it."""
    directory = tmp_path_factory.mktemp("events")
    value = data.draw(nested(places_of(secret)))
    store = open_store(f"file://{directory / 'run'}")
    bucket, file, out = EventBuffer(store, "a"), LogFile(directory / "log", print), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", out)
        output = EventOutput("debug", log_format, Redactor([secret]), (bucket, file))
        configure_events(EventContext("a", run=f"s3://b/{secret}"), output)
        log = structlog.get_logger("test")
        log.info("planted", value=value)
        try:
            raise RuntimeError(f"cannot read {value}")
        except RuntimeError:
            log.exception("planted")
    structlog.reset_defaults()
    bucket.flush()
    file.close()
    shipped = b"".join(store.read(key) for key in store.keys("events/")).decode()
    for text in (out.getvalue(), shipped, (directory / "log").read_text()):
        assert "planted" in text
        assert secret not in text
        for line in text.splitlines() if log_format == "json" else ():
            assert secret not in str(json.loads(line))


@settings(max_examples=100, deadline=None)
@given(
    secret=st.text(string.ascii_letters + string.digits + "._~-", min_size=8, max_size=40),
    place=st.sampled_from(
        [
            "https://user:{}@host/path",
            "s3://{}:secret@bucket/run",
            "https://{}@host/run.git",
            "https://host/a?X-Amz-Signature={}&X-Amz-Date=1",
            "https://host/a?x=1&X-Amz-Credential={}",
            "https://host/a?sv=1&sig={}",
            "GET /a?token={} HTTP/1.1",
            "Authorization: Bearer {}",
            "authorization: Basic {}",
            "{{'Authorization': 'Bearer {}', 'Accept': '*/*'}}",
            '{{"Authorization": "AWS4-HMAC-SHA256 Credential={}"}}',
            "headers={{'X-Amz-Security-Token': '{}'}}",
            '{{"password": "{}"}}',
            "AccountName=a;AccountKey={};EndpointSuffix=core",
            "s3://key:a/{}@bucket/run",
            "password: {}",
            "aws_secret_access_key = {}",
            "x-api-key: {}",
            "secret = '{}'",
            "elastic-pt run --api-token {} --node a",
            "['run', '--token', '{}']",
            "Set-Cookie: id=1; session={}; Path=/",
            "{{'token': 'a\\'{}'}}",
            "{{'token': \"a'{}\"}}",
            r'{{"body": "{{\"token\": \"a\\\"{}\"}}"}}',
            "password=it's{}",
            "password: <&{}",
            "DB_PASS={} GITHUB_PAT=x",
            "aws_access_key_id = {}",
            "https://host/a?next=%2Fb%3Ftoken%3D{}",
            "credentials={}",
            "imap auth={}",
            "user=a pass={}",
            "passwords: {}",
            "Server=a;Uid=b;Pwd={};",
            "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----",
            r"key: '-----BEGIN PRIVATE KEY-----\n{}",
        ]
    ),
)
def test_an_unknown_secret_is_found_by_its_place(secret: str, place: str) -> None:
    """Credentials in URLs, signed queries and Authorization headers are removed though nobody knows their value."""
    assume(secret not in f"cannot open {place}")
    text = f"cannot open {place.format(secret)}"
    assert secret not in Redactor().text(text)
    fields = {"Authorization": secret, "private_key": secret, "x-amz-signature": [secret]}
    assert secret not in str(Redactor().clean({"cause": [text], "headers": fields}))
    more = {
        "tokens": [secret],
        "db_passwords": secret,
        "credentials": {"a": secret},
        "pass": secret,
    }
    lists = {"auth": ("a", secret), "argv": ["run", "--api-token", secret, "--node", "a"]}
    assert secret not in str(Redactor().clean(more | lists))


def test_what_is_no_secret_stays() -> None:
    """Operators need addresses, keys and numbers: an event without a secret is unchanged."""
    event = {
        "event": "workers_start",
        "run": "s3://bucket/runs/first",
        "address": "http://[::1]:8080/status?x=1",
        "container": "abfs://container@account.dfs.core.windows.net/run",
        "key": "ckpt/0000000150-g3-5f0c/manifest.json",
        "tokens": 1000,
        "argv": ["run", "--token-count", "3", "--node", "a"],
        "author": "someone",
        "loss": 2.5,
        "members": ["a", "b"],
        "paused": None,
        "why": "a token beyond the vocabulary: expected token < 256",
        "signature": "ValueError in foo.py",
        "sources": {"signature": [7, "2.5"]},
        "error": "could not get credentials: profile 'x' is unknown; expected token == 256",
        "peers": ["http://10.0.0.1:9000/states", "http://10.0.0.2:9000/states"],
        "forward_pass": "a pass: 3 ms; key: ckpt/1; signature: (B, T); cache_key=7",
        "path": "/tmp/token/model.key",
    }
    assert Redactor(["0123456789abcdef", "short"]).clean(event) == event


def test_secrets_of_the_environment_are_known_by_name() -> None:
    """AWS keys with their ids, session tokens and the webhook's URL are secrets; short values and paths of files are none."""
    environment = {
        "AWS_ACCESS_KEY_ID": "AKIA0000",
        "AWS_SECRET_ACCESS_KEY": "wJalr/XUtnFEMI",
        "AWS_SESSION_TOKEN": "FwoGZXIvYXdz",
        "ELASTIC_PT_WEBHOOK_URL": "https://hooks.example/T0",
        "AZURE_STORAGE_CONNECTION_STRING": "AccountKey=abcdefgh",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
        "TOKENIZERS_PARALLELISM": "disabled-here",
        "PWD": "/home/someone",
        "AWS_ENDPOINT_URL": "http://storage:9000/a",
        "RUN": "abfs://container@account/run",
    }
    assert len(secrets_in(environment)) == 5
    redactor = Redactor(secrets_in(environment))
    told = redactor.text(
        f"{quote(environment['AWS_SECRET_ACCESS_KEY'], safe='')} AKIA0000 /var/run/token"
    )
    assert told == f"{REDACTED} {REDACTED} /var/run/token"


@pytest.mark.parametrize(
    "name",
    [
        "PRIVATE_KEY",
        "ENCRYPTION_KEY",
        "SSH_KEY",
        "DB_PASS",
        "MYSQL_PWD",
        "PGPASSWORD",
        "GITHUB_PAT",
        "AZURE_STORAGE_SAS",
        "SLACK_WEBHOOK",
    ],
)
def test_a_variable_with_a_secret_name_is_secret(name: str) -> None:
    """Its value is removed wherever it appears, without its name."""
    assert (
        Redactor(secrets_in({name: "hunter2hunter"})).text("is hunter2hunter") == f"is {REDACTED}"
    )


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("REDIS_URL", "redis://:hunter2%2Fhunter@cache:6379/0"),
        ("HTTPS_PROXY", "http://someone:hunter2/hunter@proxy:3128,http://a:b@proxy"),
        ("PIP_INDEX_URL", "https://hunter2%2Fhunter@packages.example/simple"),
    ],
)
def test_a_password_within_a_url_of_the_environment_is_secret(name: str, url: str) -> None:
    """The password alone is known, quoted or not; the address is no secret."""
    redactor = Redactor(secrets_in({name: url}))
    assert redactor.text("is hunter2/hunter at cache:6379") == f"is {REDACTED} at cache:6379"


def test_events_have_values_that_json_knows() -> None:
    """Any value becomes JSON, even one that has no text: an event never ends a run."""

    class Broken:
        def __str__(self) -> str:
            raise RuntimeError

    deep: list[Any] = []
    deep.append(deep)
    cleaned = Redactor().clean(
        {"nan": float("nan"), "b": b"\xff", "o": Broken(), 3: Path("/a"), "d": deep}
    )
    assert json.loads(json.dumps(cleaned, allow_nan=False))["3"] == "/a"
    assert "RuntimeError" in cleaned["o"]


def test_the_run_is_named_without_credentials() -> None:
    """The field `run` is the URL that an operator may copy, without user, password and query."""
    assert without_credentials("s3://key:secret@bucket/run?sig=1") == "s3://bucket/run"
    assert without_credentials("s3://a:b/c@bucket/run") == "s3://bucket/run"
    assert without_credentials("s3://a:b@c@bucket/run") == "s3://bucket/run"
    assert without_credentials("abfs://c@account/run") == "abfs://c@account/run"
    assert without_credentials("file:///a:b@c/run") == "file:///a:b@c/run"
