"""`dashboards push` and `export`. The Grafana is a local server with the few endpoints of its documented API."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from command_line import Result, assert_one_line_mistake, elastic_pt
from grafana import PASSWORD, TOKEN, USER, GrafanaApiServer, grafana_api

ROOT = Path(__file__).parents[2]
FILES = sorted(path.name for path in (ROOT / "dashboards").glob("*.json"))
PUSH_TIMEOUT_S = 120.0
WHEEL_TIMEOUT_S = 120.0


class Push(Protocol):
    """Runs `dashboards push` in a process that has the extra `grafana`."""

    def __call__(self, *arguments: str, token: str = TOKEN) -> Result: ...


@pytest.fixture
def push(extras_python: str) -> Push:
    """The command, as a user of the extra runs it."""

    def run(*arguments: str, token: str = TOKEN) -> Result:
        command = [extras_python, "-m", "elastic_pt", "dashboards", "push", *arguments]
        done = subprocess.run(
            command,
            env=os.environ | {"GRAFANA_TOKEN": token},
            capture_output=True,
            text=True,
            timeout=PUSH_TIMEOUT_S,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def grafana(monkeypatch: pytest.MonkeyPatch) -> Iterator[GrafanaApiServer]:
    """A Grafana whose token is in the environment."""
    monkeypatch.setenv("GRAFANA_TOKEN", TOKEN)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with grafana_api() as server:
        yield server


def test_a_push_again_replaces_what_the_first_has_pushed(
    grafana: GrafanaApiServer, push: Push
) -> None:
    """Two pushes give one folder and five dashboards in their second version; the addresses are printed."""
    results = [push("--url", grafana.url) for _ in range(2)]
    assert [result.exit_code for result in results] == [0, 0], results
    assert results[0].out == results[1].out
    assert results[0].out.splitlines() == [f"{grafana.url}/d/{uid}" for uid in grafana.dashboards]
    assert [each["title"] for each in grafana.folders] == ["Other", "elastic-pt"]
    assert len(grafana.dashboards) == len(FILES)
    for pushed in grafana.dashboards.values():
        assert pushed["version"] == 2
        assert pushed["folderUid"] == grafana.folders[1]["uid"]


def test_what_is_pushed_is_what_is_committed(grafana: GrafanaApiServer, push: Push) -> None:
    """A push changes nothing but the choices of the user: the data source and the address of the pages.

    The Grafana has no service accounts here: it takes user:password, which may have colons too.
    """
    chosen = ["--datasource", "prom-1", "--docs", "https://example.com/docs/", "--folder", "Other"]
    assert push("--url", f"{grafana.url}/", *chosen, token=f"{USER}:{PASSWORD}").exit_code == 0
    for name in FILES:
        committed = json.loads((ROOT / "dashboards" / name).read_text())
        body = grafana.dashboards[committed["uid"]]
        assert body["folderUid"] == "other"
        variables = {each["name"]: each for each in body["dashboard"]["templating"]["list"]}
        assert variables["datasource"]["current"]["value"] == "prom-1"
        assert variables["docs"]["current"]["value"] == "https://example.com/docs"
        del committed["templating"], body["dashboard"]["templating"]
        assert body["dashboard"] == committed | {"id": None}


def test_secrets_on_the_command_line_are_refused(grafana: GrafanaApiServer) -> None:
    """Everyone on a machine can read its command lines; the refusal does not repeat the secret."""
    url = grafana.url.replace("//", "//admin:secret@")
    result = elastic_pt("dashboards", "push", "--url", url)
    assert_one_line_mistake(result, "--url", "expected neither", "GRAFANA_TOKEN")
    assert "secret" not in result.err
    assert grafana.dashboards == {}


def test_a_push_that_fails_is_one_line(grafana: GrafanaApiServer, push: Push) -> None:
    """A refusal, an error of the server, a wrong token and no server: one line that names the address."""
    for status in (403, 503):
        grafana.status = status
        result = push("--url", grafana.url)
        assert_one_line_mistake(result, grafana.url, "you may not do this", "expected a Grafana")
    grafana.status = 0
    result = push("--url", grafana.url, token="wrong")
    assert_one_line_mistake(result, grafana.url, "Unauthorized", "GRAFANA_TOKEN")
    result = push("--url", "http://127.0.0.1:1")
    refused = "--url http://127.0.0.1:1: connection refused; expected a Grafana"
    assert_one_line_mistake(result, refused)


def test_a_push_without_an_address_or_a_token_is_one_line(
    grafana: GrafanaApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address that is no URL, and no token: one line that names the option or the variable."""
    assert_one_line_mistake(elastic_pt("dashboards", "push", "--url", "grafana:3000"), "http://…")
    monkeypatch.delenv("GRAFANA_TOKEN")
    result = elastic_pt("dashboards", "push", "--url", grafana.url)
    assert_one_line_mistake(result, "GRAFANA_TOKEN is not set")


def test_a_missing_client_is_named(
    grafana: GrafanaApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """grafana-client is an extra: without it the push says how to install it, and export works."""
    monkeypatch.setitem(sys.modules, "grafana_client", None)
    result = elastic_pt("dashboards", "push", "--url", grafana.url)
    assert_one_line_mistake(result, "pip install 'elastic-pt[grafana]'")


def test_export_to_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A file where the directory should be is named."""
    (tmp_path / "file").touch()
    result = elastic_pt("dashboards", "export", "--out", tmp_path / "file")
    assert_one_line_mistake(result, str(tmp_path / "file"), "expected a directory")


def test_an_installed_wheel_has_the_dashboards(tmp_path: Path) -> None:
    """`export` works where the repository is not: the wheel has the files, not links."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("elastic_pt", "dashboards"):
        shutil.copytree(
            ROOT / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    subprocess.run(
        [sys.executable, "-c", build],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=WHEEL_TIMEOUT_S,
    )
    (wheel,) = tmp_path.glob("*.whl")
    installed, out = tmp_path / "installed", tmp_path / "out"
    zipfile.ZipFile(wheel).extractall(installed)
    shutil.rmtree(source)
    subprocess.run(
        [sys.executable, "-m", "elastic_pt", "dashboards", "export", "--out", str(out)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        timeout=WHEEL_TIMEOUT_S,
    )
    exported = {path.name: path.read_text() for path in out.iterdir()}
    committed = {name: (ROOT / "dashboards" / name).read_text() for name in FILES}
    assert exported == committed
    # The wheel has no code of dashboards/, which needs grafana-foundation-sdk.
    assert not (installed / "dashboards").exists()
