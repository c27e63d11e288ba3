"""Errors of libraries reach the user at once, as one line that names what to fix, and never with exit code 1."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import assert_one_line_mistake, elastic_pt

from elastic_pt.cli import setup

SOON_S = 15.0
"""Far below the 30 s and more for which requests to a store are retried."""


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An AWS environment for this test only; returns its configuration file."""
    import os

    for name in [name for name in os.environ if name.startswith("AWS_") or "CA_BUNDLE" in name]:
        monkeypatch.delenv(name)
    config, credentials = tmp_path / "config", tmp_path / "credentials"
    config.write_text("")
    credentials.write_text("")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    return config


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", ["AWS_ENDPOINT_URL", "localhost:9000", "expected"]),
        ("AWS_ENDPOINT_URL_S3", "127.0.0.1", ["AWS_ENDPOINT_URL_S3", "expected"]),
        ("AWS_ENDPOINT_URL", "ftp://host", ["AWS_ENDPOINT_URL", "expected"]),
        ("AWS_ENDPOINT_URL", "https://", ["AWS_ENDPOINT_URL", "expected"]),
        ("AWS_ENDPOINT_URL", "http://[::1", ["AWS_ENDPOINT_URL", "http://[::1", "expected"]),
        ("AWS_ENDPOINT_URL", "http://host:port", ["AWS_ENDPOINT_URL", "expected"]),
        (
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "/nowhere/token",
            ["AWS_WEB_IDENTITY_TOKEN_FILE", "/nowhere/token", "expected"],
        ),
        ("AWS_CA_BUNDLE", "/nowhere/ca.pem", ["AWS_CA_BUNDLE", "/nowhere/ca.pem", "expected"]),
        (
            "AWS_SECRET_ACCESS_KEY",
            "wJalrEXAMPLE\n",
            ["AWS_SECRET_ACCESS_KEY", "line end", "expected"],
        ),
        ("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE\r\n", ["AWS_ACCESS_KEY_ID", "expected"]),
        ("AWS_PROFILE", "nobody", ["nobody", "settings"]),
    ],
)
@pytest.mark.parametrize("command", ["status", "log", "digest", "run"])
def test_wrong_aws_settings_are_named_at_once(
    command: str,
    name: str,
    value: str,
    parts: list[str],
    aws: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wrong setting is refused with exit code 2 in one line, without a retry, and no secret is shown."""
    monkeypatch.setenv(name, value)
    began_s = time.monotonic()
    result = elastic_pt(command, "s3://bucket/run")
    assert time.monotonic() - began_s < SOON_S
    assert_one_line_mistake(result, *parts)
    if "KEY" in name:
        assert value.strip() not in result.err.replace(name, "")


def test_broken_aws_file_is_named_at_once(aws: Path) -> None:
    """An invalid AWS configuration file is named in the error."""
    aws.write_text("[profile x\nnonsense")
    began_s = time.monotonic()
    result = elastic_pt("status", "s3://bucket/run")
    assert time.monotonic() - began_s < SOON_S
    assert_one_line_mistake(result, "config")


def test_missing_credentials_are_reported_at_once(aws: Path) -> None:
    """Without credentials there is no retry, and the exit code is that of the store (3)."""
    began_s = time.monotonic()
    result = elastic_pt("status", "s3://bucket/run")
    assert time.monotonic() - began_s < SOON_S
    assert_one_line_mistake(result, "redentials", exit_code=3)


SIGN_IN = "sso_account_id = 123456789012\nsso_role_name = x\nregion = us-east-1\n"
SESSION = "[sso-session s]\nsso_region = us-east-1\nsso_start_url = https://example.com/start\n"
OLD_SIGN_IN = "sso_region = us-east-1\nsso_start_url = https://example.com/start\n"


@pytest.mark.parametrize(
    "settings",
    [f"sso_session = s\n{SIGN_IN}{SESSION}", SIGN_IN + OLD_SIGN_IN],
    ids=["session", "old"],
)
def test_expired_sign_in_is_reported_at_once(aws: Path, settings: str) -> None:
    """An expired login is one error line, without a traceback of the library."""
    aws.write_text(f"[default]\n{settings}")
    began_s = time.monotonic()
    result = elastic_pt("status", "s3://bucket/run")
    assert time.monotonic() - began_s < SOON_S
    assert_one_line_mistake(result, "SSO Token", "check the credentials", exit_code=3)


def test_missing_certificate_file_is_not_a_missing_object(
    aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a file that the AWS settings name is missing, the error says that, and not that an object is missing."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    aws.write_text("[default]\nca_bundle = /nowhere/ca.pem\nregion = us-east-1\n")
    assert_one_line_mistake(elastic_pt("status", "s3://bucket/run"), "the files that they name")


@pytest.mark.parametrize("host", ["127.0.0.1:9", "no-such-host.invalid:9000"])
@pytest.mark.parametrize("command", ["status", "log", "storage-check"])
def test_unreachable_server_is_reported_at_once(
    command: str, host: str, aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says at once that the server refuses connections or that its name is unknown."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    began_s = time.monotonic()
    result = elastic_pt(command, "s3://bucket/run")
    assert time.monotonic() - began_s < SOON_S
    assert_one_line_mistake(result, host, "expected a server", exit_code=3)


def test_config_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    """A byte order mark at the start of a configuration is ignored."""
    path = tmp_path / "run.toml"
    path.write_bytes(b'\xef\xbb\xbf[run]\nurl = "run"\n[data]\nurl = "data"\n')
    assert elastic_pt("config", path).exit_code == 0


@pytest.mark.parametrize("command", ["status", "run", "config", "log"])
def test_argument_that_is_not_utf8_is_refused(command: str) -> None:
    """An argument that is not UTF-8 gives one line and exit code 2."""
    result = subprocess.run(
        [sys.executable, "-m", "elastic_pt", command, b"runs/\xff"], capture_output=True, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr == b"error: argument 'runs/\\udcff': expected UTF-8 text\n"


def test_unexpected_error_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug gives one line, an event with its traceback, and exit code 8, so a supervisor may restart it."""

    def broken(*_: object) -> None:
        raise KeyError("nobody expected this")

    monkeypatch.setattr(setup, "load_config", broken)
    result = elastic_pt("config", "run.toml")
    assert result.exit_code == 8
    assert result.out == ""
    event, line = result.err.splitlines()
    assert line.startswith("error: unexpected KeyError")
    assert "unexpected_error" in event
    assert "Traceback" in event
