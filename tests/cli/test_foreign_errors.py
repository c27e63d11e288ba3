"""Errors of libraries reach a user as one line that names what to mend, at once, and never as exit code 1."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import assert_one_line_mistake, elastic_pt

from elastic_pt.cli import setup

SOON_S = 15.0
"""Far below the 30 s and more for which a store that may come back is tried again."""


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An AWS environment of the test's own; returns its configuration file."""
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
    """What cannot work is refused with exit code 2 in one line, without a retry, and secrets are not shown."""
    monkeypatch.setenv(name, value)
    began_s = time.monotonic()
    result = elastic_pt(command, "s3://bucket/run")
    assert time.monotonic() - began_s < SOON_S
    assert_one_line_mistake(result, *parts)
    if "KEY" in name:
        assert value.strip() not in result.err.replace(name, "")


def test_a_broken_aws_file_is_named_at_once(aws: Path) -> None:
    """A file that is no AWS configuration is told as such."""
    aws.write_text("[profile x\nnonsense")
    began_s = time.monotonic()
    result = elastic_pt("status", "s3://bucket/run")
    assert time.monotonic() - began_s < SOON_S
    assert_one_line_mistake(result, "config")


def test_no_credentials_at_all_are_told_at_once(aws: Path) -> None:
    """Without a login nothing is tried again and again; the exit code is that of the store."""
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
def test_an_expired_sign_in_is_told_at_once(aws: Path, settings: str) -> None:
    """A login that is over is one line, without the library's tracebacks."""
    aws.write_text(f"[default]\n{settings}")
    began_s = time.monotonic()
    result = elastic_pt("status", "s3://bucket/run")
    assert time.monotonic() - began_s < SOON_S
    assert_one_line_mistake(result, "SSO Token", "check the credentials", exit_code=3)


def test_missing_certificates_are_no_missing_object(
    aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the AWS settings name and that is not there is told as that, and not as an object that is missing."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    aws.write_text("[default]\nca_bundle = /nowhere/ca.pem\nregion = us-east-1\n")
    assert_one_line_mistake(elastic_pt("status", "s3://bucket/run"), "the files that they name")


@pytest.mark.parametrize("host", ["127.0.0.1:9", "no-such-host.invalid:9000"])
@pytest.mark.parametrize("command", ["status", "log", "storage-check"])
def test_a_server_that_nobody_can_reach_is_told_at_once(
    command: str, host: str, aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who types a command is told at once that nobody listens there or that the name is not known."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    began_s = time.monotonic()
    result = elastic_pt(command, "s3://bucket/run")
    assert time.monotonic() - began_s < SOON_S
    assert_one_line_mistake(result, host, "expected a server", exit_code=3)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    """A configuration that an editor has saved with a byte order mark is read like any other."""
    path = tmp_path / "run.toml"
    path.write_bytes(b'\xef\xbb\xbf[run]\nurl = "run"\n[data]\nurl = "data"\n')
    assert elastic_pt("config", path).exit_code == 0


@pytest.mark.parametrize("command", ["status", "run", "config", "log"])
def test_bytes_that_are_no_text_are_named(command: str) -> None:
    """An argument that is no UTF-8 is one line and exit code 2."""
    result = subprocess.run(
        [sys.executable, "-m", "elastic_pt", command, b"runs/\xff"], capture_output=True, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr == b"error: argument 'runs/\\udcff': expected UTF-8 text\n"


def test_what_nobody_expected_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is one line, an event with its traceback, and exit code 8: a supervisor may start it again."""

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
