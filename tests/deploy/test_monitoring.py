"""The files of deploy/monitoring fit together, and Prometheus' own tools accept them."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.services.fixtures import left_out

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
PROMETHEUS = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
KUBERNETES = ROOT / "deploy" / "kubernetes"
JOB = yaml.safe_load((KUBERNETES / "base" / "job.yaml").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy, in which the rules may be missing: other tests check them."""
    copy = tmp_path / "monitoring"
    shutil.copytree(FOLDER, copy)
    for name in PROMETHEUS["rule_files"]:
        (copy / name).touch()
    (copy / "targets" / "run.json").write_text("[]")
    return copy


def accepted(*command: str | Path) -> str:
    """Run a checker; its output."""
    if shutil.which(str(command[0])) is None:
        left_out(f"checks with {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_the_configuration(folder: Path) -> None:
    """Prometheus can read its configuration and all files that it names."""
    text = accepted("promtool", "check", "config", folder / "prometheus.yml")
    assert "WARNING" not in text, text


def test_amtool_accepts_the_configuration(folder: Path) -> None:
    """Alertmanager can read its configuration."""
    assert "3 receivers" in accepted("amtool", "check-config", str(folder / "alertmanager.yml"))


def test_pages_and_tickets_are_routed(folder: Path) -> None:
    """A page is told within seconds and by a route of its own, which an operator can give another receiver."""
    configuration = yaml.safe_load((folder / "alertmanager.yml").read_text())
    (page,) = configuration["route"]["routes"]
    page["receiver"], configuration["route"]["receiver"] = "slack", "e-mail"
    chosen = folder / "chosen.yml"
    chosen.write_text(yaml.safe_dump(configuration))
    test = ("amtool", "config", "routes", "test", f"--config.file={chosen}")
    assert accepted(*test, "severity=page", "run=r").strip() == "slack"
    assert accepted(*test, "severity=ticket", "run=r").strip() == "e-mail"


def test_no_secret_is_in_a_file() -> None:
    """Passwords and webhooks are named by file or environment variable."""
    for path in FOLDER.rglob("*.y*ml"):
        for line in path.read_text().splitlines():
            key, colon, value = line.strip().removeprefix("- ").partition(":")
            if colon and re.search("password|secret|api_url|token", key, re.IGNORECASE):
                assert key.endswith("_file") or value.strip().startswith("${"), f"{path}: {line}"


def test_all_servers_listen_on_loopback_only() -> None:
    """Whoever starts the example opens no port to the network."""
    assert SERVICES.keys() == {"prometheus", "alertmanager", "grafana"}
    for name, service in SERVICES.items():
        assert service["network_mode"] == "host", name
        assert "ports" not in service
    for name in ("prometheus", "alertmanager"):
        (address,) = (
            each.partition("=")[2] for each in SERVICES[name]["command"] if "web.listen" in each
        )
        assert address.startswith("127.0.0.1:")
    assert SERVICES["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert "--cluster.listen-address=" in SERVICES["alertmanager"]["command"]


def test_images_are_pinned() -> None:
    """Each image has a version of three numbers."""
    for name, service in SERVICES.items():
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"]), name


def test_each_mount_is_there_and_read_only() -> None:
    """Each folder that a container sees is a folder of this repository; what a container writes is a volume."""
    for name, service in SERVICES.items():
        for mount in service["volumes"]:
            source = mount.partition(":")[0]
            if source.startswith("."):
                assert (FOLDER / source).is_dir(), f"{name}: {mount}"
                assert mount.endswith(":ro"), f"{name}: {mount}"
            else:
                assert source in COMPOSE["volumes"], f"{name}: {mount}"


def test_servers_know_each_other() -> None:
    """Each server asks the others where they listen, and finds its files where they are mounted."""
    listens = {
        each.partition("=")[2]
        for name in ("prometheus", "alertmanager")
        for each in SERVICES[name]["command"]
        if "web.listen" in each
    }
    provisioning = FOLDER / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())
    assert {each["url"].removeprefix("http://") for each in sources["datasources"]} == listens
    (alerting,) = PROMETHEUS["alerting"]["alertmanagers"]
    assert alerting["static_configs"][0]["targets"][0] in listens
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "elastic-pt.yaml").read_text())[
        "providers"
    ]
    mounts = dict(each.split(":")[:2] for each in SERVICES["grafana"]["volumes"])
    mounted = {there: FOLDER / here for here, there in mounts.items()}
    assert list(mounted[provider["options"]["path"]].glob("*.json"))
    assert mounted["/etc/grafana/provisioning"].resolve() == provisioning
    for service, file in (("prometheus", "prometheus.yml"), ("alertmanager", "alertmanager.yml")):
        assert f"--config.file=/etc/{service}/{file}" in SERVICES[service]["command"]
        assert f"./:/etc/{service}:ro" in SERVICES[service]["volumes"]


def test_intervals_agree() -> None:
    """Grafana computes $__rate_interval from the interval at which Prometheus scrapes."""
    path = FOLDER / "grafana" / "provisioning" / "datasources" / "prometheus.yaml"
    source = yaml.safe_load(path.read_text())["datasources"][0]
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]


def test_the_pod_monitor_finds_the_pods_of_the_job() -> None:
    """Namespace, labels and the port's name are those of deploy/kubernetes; the instance is the pod."""
    monitor = yaml.safe_load((KUBERNETES / "components/podmonitor/podmonitor.yaml").read_text())
    kustomization = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text())
    assert monitor["metadata"]["namespace"] == kustomization["namespace"]
    template = JOB["spec"]["template"]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert wanted <= template["metadata"]["labels"].items()
    (agent,) = template["spec"]["containers"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in agent["ports"]}
    assert template["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "elastic-pt"
    relabelled = {each["targetLabel"]: each["sourceLabels"] for each in endpoint["relabelings"]}
    assert relabelled["instance"] == ["__meta_kubernetes_pod_name"]
    # The metrics have these.
    assert not {"run", "node"} & relabelled.keys()


def test_the_job_is_called_the_same_everywhere() -> None:
    """Prometheus' job has the name that the PodMonitor gives it, and only the rule files have `rules` in their names."""
    names = [each["job_name"] for each in PROMETHEUS["scrape_configs"]]
    assert names[0] == "elastic-pt"
    rules = {path.name for path in FOLDER.rglob("*rules*")}
    assert rules <= set(PROMETHEUS["rule_files"]) == {"recording-rules.yml", "alert-rules.yml"}
