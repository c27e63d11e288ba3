"""A real Prometheus and a real Alertmanager on loopback, each with a directory and a free port of its own.

    prometheus = start_prometheus(targets=["127.0.0.1:9105"], rule_files=[rules])     a fixture, see fixtures.py
    prometheus.query('max by (run) (elastic_pt_step)')                                [Sample(labels, value)]
    prometheus.wait_for("elastic_pt_step > 10", timeout_s=30.0)                       the samples, once there are any
    prometheus.alerts()                                                               [Alert(name, state, labels, …)]
    prometheus.rules()                                                                [Rule(name, kind, health, …)]

It scrapes each half second and evaluates each quarter. A test that needs hours of windows or `for:` scales the durations of a copy of
the rules, see `tests.monitoring.rules`.
"""

import json
import math
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from elastic_pt.chaos.servers import free_port, start, stop, wait_until

COMMANDS = ("prometheus", "promtool", "prometheus-alertmanager", "amtool")
SCRAPE_INTERVAL_S = 0.5
EVALUATION_INTERVAL_S = 0.25

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_REQUEST_TIMEOUT_S = 30.0
_POLL_INTERVAL_S = 0.1
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "GOMAXPROCS": "1"}

_ALERTMANAGER_CONFIGURATION = """\
route: {receiver: nobody, group_wait: 0s, group_interval: 1s}
receivers: [{name: nobody}]
"""


def missing_commands() -> list[str]:
    """The programs that are not installed here."""
    return [command for command in COMMANDS if shutil.which(command) is None]


@dataclass(frozen=True)
class Sample:
    """One series of an instant query's answer."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Series:
    """One series of a range query's answer: (Unix time, value) in order."""

    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Alert:
    """An alert that is pending or firing."""

    name: str
    state: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


@dataclass(frozen=True)
class Rule:
    """A rule as Prometheus has evaluated it."""

    name: str
    kind: str
    """`recording` or `alerting`."""
    health: str
    """`ok`, `err`, or `unknown` before the first evaluation."""
    error: str


class QueryError(RuntimeError):
    """Prometheus refused a query; its own words."""


@dataclass
class Prometheus:
    """A running Prometheus; `stop()` ends it."""

    home: Path
    scrape_configs: Sequence[Mapping[str, Any]]
    """As under `scrape_configs:` of its configuration."""
    rule_files: Sequence[Path] = ()
    alertmanager: str | None = None
    """The URL of an Alertmanager."""
    port: int = field(default_factory=free_port)
    _server: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process."""
        assert self._server is not None
        return self._server.pid

    def start(self) -> Self:
        """From an empty directory to a server that is ready."""
        self.home.mkdir(parents=True, exist_ok=True)
        # JSON is YAML.
        (self.home / "prometheus.yml").write_text(json.dumps(self._configuration(), indent=1))
        command = [
            "prometheus",
            f"--config.file={self.home}/prometheus.yml",
            f"--storage.tsdb.path={self.home}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--web.enable-lifecycle",
            "--log.level=warn",
        ]
        log = self.home / "prometheus.log"
        self._server = start(command, log, _ENVIRONMENT)
        try:
            wait_until("Prometheus", lambda: _answers(f"{self.url}/-/ready"), _START_TIMEOUT_S, log)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End it; without an effect if it has ended."""
        if self._server is not None:
            stop(self._server, _STOP_TIMEOUT_S)

    def query(self, expression: str, at_s: float | None = None) -> list[Sample]:
        """The answer of an instant query, now or at a Unix time; `QueryError` if the expression is wrong."""
        parameters = {"query": expression} | ({} if at_s is None else {"time": f"{at_s}"})
        data = self._get("/api/v1/query", parameters)
        if data["resultType"] == "scalar":
            return [Sample({}, float(data["result"][1]))]
        return [Sample(each["metric"], float(each["value"][1])) for each in data["result"]]

    def value(self, expression: str) -> float:
        """The only sample of an instant query; NaN if there is none."""
        samples = self.query(expression)
        assert len(samples) <= 1, f"{expression}: {samples}"
        return samples[0].value if samples else math.nan

    def query_range(
        self, expression: str, start_s: float, end_s: float, step_s: float
    ) -> list[Series]:
        """The answer of a range query between two Unix times."""
        parameters = {
            "query": expression,
            "start": f"{start_s}",
            "end": f"{end_s}",
            "step": f"{step_s}",
        }
        return [
            Series(each["metric"], tuple((float(at), float(value)) for at, value in each["values"]))
            for each in self._get("/api/v1/query_range", parameters)["result"]
        ]

    def series(self, selector: str, start_s: float, end_s: float) -> list[Mapping[str, str]]:
        """The labels of every series between two Unix times; a variable of a dashboard takes its values from them."""
        span = {"match[]": selector, "start": f"{start_s}", "end": f"{end_s}"}
        found: list[Mapping[str, str]] = self._get("/api/v1/series", span)
        return found

    def wait_for(self, expression: str, timeout_s: float) -> list[Sample]:
        """The samples of an expression as soon as it has any; `TimeoutError` after `timeout_s`."""
        samples: list[Sample] = []

        def has_samples() -> bool:
            samples[:] = self.query(expression)
            return bool(samples)

        self.wait_until(expression, has_samples, timeout_s)
        return samples

    def wait_until(self, what: str, ready: Callable[[], bool], timeout_s: float) -> None:
        """Return once `ready()`; `TimeoutError` with the active alerts after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while not ready():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not within {timeout_s:g} s: {what}; active: {self.alerts()}")
            time.sleep(_POLL_INTERVAL_S)

    def alerts(self) -> list[Alert]:
        """Every alert that is pending or firing."""
        return [
            Alert(each["labels"]["alertname"], each["state"], each["labels"], each["annotations"])
            for each in self._get("/api/v1/alerts", {})["alerts"]
        ]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {alert.name for alert in self.alerts() if alert.state == "firing"}

    def rules(self) -> list[Rule]:
        """Every rule, with what its last evaluation said."""
        return [
            Rule(rule["name"], rule["type"], rule["health"], rule.get("lastError", ""))
            for group in self._get("/api/v1/rules", {})["groups"]
            for rule in group["rules"]
        ]

    def targets(self) -> dict[str, str]:
        """Health of each scraped URL: `up`, `down` or `unknown`."""
        active = self._get("/api/v1/targets", {"state": "active"})["activeTargets"]
        return {each["scrapeUrl"]: each["health"] for each in active}

    def reload(self) -> None:
        """Read the configuration and the rule files again."""
        request = urllib.request.Request(f"{self.url}/-/reload", method="POST")
        urllib.request.urlopen(request, timeout=_REQUEST_TIMEOUT_S).close()

    def _get(self, path: str, parameters: Mapping[str, str]) -> Any:
        try:
            answer = _get_json(f"{self.url}{path}?{urllib.parse.urlencode(parameters)}")
        except urllib.error.HTTPError as error:
            text = json.load(error).get("error", "")
            raise QueryError(f"{parameters.get('query', path)}: {text}") from error
        return answer["data"]

    def _configuration(self) -> dict[str, Any]:
        # The timeout of a scrape is at most its interval, and a busy machine needs some time to answer.
        interval, evaluation = (
            f"{round(1000 * each)}ms" for each in (SCRAPE_INTERVAL_S, EVALUATION_INTERVAL_S)
        )
        configuration: dict[str, Any] = {
            "global": {
                "scrape_interval": interval,
                "scrape_timeout": interval,
                "evaluation_interval": evaluation,
            },
            "rule_files": [str(path) for path in self.rule_files],
            "scrape_configs": list(self.scrape_configs),
        }
        if self.alertmanager is not None:
            target = urllib.parse.urlsplit(self.alertmanager).netloc
            configuration["alerting"] = {
                "alertmanagers": [{"static_configs": [{"targets": [target]}]}]
            }
        return configuration


@dataclass
class Alertmanager:
    """A running Alertmanager without a cluster; `stop()` ends it."""

    home: Path
    configuration: str = _ALERTMANAGER_CONFIGURATION
    """Its configuration, as YAML."""
    port: int = field(default_factory=free_port)
    _server: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        """From an empty directory to a server that is ready."""
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "alertmanager.yml").write_text(self.configuration)
        command = [
            "prometheus-alertmanager",
            f"--config.file={self.home}/alertmanager.yml",
            f"--storage.path={self.home}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--cluster.listen-address=",
            "--log.level=warn",
        ]
        log = self.home / "alertmanager.log"
        self._server = start(command, log, _ENVIRONMENT)
        try:
            wait_until(
                "Alertmanager", lambda: _answers(f"{self.url}/-/ready"), _START_TIMEOUT_S, log
            )
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End it; without an effect if it has ended."""
        if self._server is not None:
            stop(self._server, _STOP_TIMEOUT_S)

    def firing(self) -> set[str]:
        """Names of the alerts that it would send."""
        alerts = _get_json(f"{self.url}/api/v2/alerts?active=true")
        return {alert["labels"]["alertname"] for alert in alerts}


def _get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=_REQUEST_TIMEOUT_S) as answer:
        return json.load(answer)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
