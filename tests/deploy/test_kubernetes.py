"""The Kubernetes manifests say what the agent needs, with the fewest rights, in options that exist."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from elastic_pt import __version__
from elastic_pt.checkpoint.footprint import footprint
from elastic_pt.checkpoint.snapshot import BUFFERS
from elastic_pt.cli import app
from elastic_pt.config import parse_config
from elastic_pt.errors import CheckpointError, ConfigError, RunFailed

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes" / "base"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS: dict[str, dict[str, Any]] = {
    document["kind"]: document
    for name in KUSTOMIZATION["resources"]
    for document in yaml.safe_load_all((FOLDER / name).read_text())
}
JOB = MANIFESTS["Job"]["spec"]
POD = JOB["template"]["spec"]
(AGENT,) = POD["containers"]
LABELS = JOB["template"]["metadata"]["labels"]
NAMESPACE = yaml.safe_load((FOLDER.parent / "namespace" / "namespace.yaml").read_text())
FIELDS = {entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"] for entry in AGENT["env"]}


def options(name: str) -> list[str]:
    """The values of an option in the agent's arguments."""
    arguments = AGENT["args"]
    return [arguments[i + 1] for i, argument in enumerate(arguments) if argument == name]


def test_every_manifest_is_listed_and_there() -> None:
    """`kubectl apply -k` applies all files of the folder, each of one kind."""
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(KUSTOMIZATION["resources"])
    assert MANIFESTS.keys() == {"ServiceAccount", "Service", "NetworkPolicy", "Job"}
    assert KUSTOMIZATION["namespace"] == NAMESPACE["metadata"]["name"]


def test_pod_meets_the_restricted_standard() -> None:
    """The namespace enforces `restricted`, and the pod meets it: not root, no escalation, no capabilities."""
    labels = NAMESPACE["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    context, own = POD["securityContext"], AGENT["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == 10001
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False
    assert own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & POD.keys()
    assert all("hostPath" not in volume for volume in POD["volumes"])


def test_no_token_of_the_cluster_is_mounted() -> None:
    """An agent never talks to the Kubernetes API, so neither pod nor account hands it a token."""
    assert POD["automountServiceAccountToken"] is False
    assert MANIFESTS["ServiceAccount"]["automountServiceAccountToken"] is False
    assert POD["serviceAccountName"] == MANIFESTS["ServiceAccount"]["metadata"]["name"]


def test_agent_can_write_where_it_must() -> None:
    """With a read-only root, /tmp and /dev/shm are volumes; /dev/shm is memory, bounded, and within the limit."""
    mounts = {mount["mountPath"]: mount for mount in AGENT["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert mounts.keys() == {"/tmp", "/dev/shm", "/etc/elastic_pt"}
    assert mounts["/etc/elastic_pt"]["readOnly"] is True
    memory = volumes[mounts["/dev/shm"]["name"]]["emptyDir"]
    assert memory["medium"] == "Memory"
    limits = AGENT["resources"]["limits"]
    assert gibibytes(memory["sizeLimit"]) < gibibytes(limits["memory"])
    temporary = volumes[mounts["/tmp"]["name"]]["emptyDir"]
    assert gibibytes(temporary["sizeLimit"]) <= gibibytes(limits["ephemeral-storage"])
    assert AGENT["resources"]["requests"].keys() >= {"cpu", "memory", "ephemeral-storage"}


def test_states_of_the_example_fit_into_memory() -> None:
    """With two nodes left: buffers of the own workers and of a mirror, a state from before, and one being uploaded."""
    model = parse_config((FOLDER / "config.toml").read_text(), source="config.toml").model
    share_bytes = footprint(model, vocabulary=32_768).checkpoint_bytes / 2
    (memory,) = (volume["emptyDir"] for volume in POD["volumes"] if volume["name"] == "shm")
    assert (2 * BUFFERS + 4) * share_bytes <= gibibytes(memory["sizeLimit"]) * 2**30


def gibibytes(quantity: str) -> int:
    """`6Gi` -> 6."""
    return int(quantity.removesuffix("Gi"))


def test_arguments_are_options_of_the_command_line() -> None:
    """The pod starts `elastic-pt run` with options that it has."""
    command = get_command(app).commands[AGENT["args"][0]]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {argument for argument in AGENT["args"] if argument.startswith("--")} <= known
    assert AGENT["args"][1] == "/etc/elastic_pt/config.toml"
    assert [FIELDS[value.strip("$()")] for value in options("--address")] == ["status.podIP"]


def test_a_replaced_pod_is_the_same_node() -> None:
    """Failures are counted by name, so the name follows from what a replacement keeps: the Job and the index."""
    (name,) = options("--node")
    assert [FIELDS[part] for part in re.findall(r"\$\((\w+)\)", name)] == [
        "metadata.labels['batch.kubernetes.io/job-name']",
        "metadata.annotations['batch.kubernetes.io/job-completion-index']",
    ]
    assert JOB["completionMode"] == "Indexed"


def test_the_agent_is_the_container_and_no_shell_is_between() -> None:
    """The image's own entry point is used: an init that hands signals to the agent."""
    assert "command" not in AGENT
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["/usr/bin/tini", "--", "elastic-pt"]' in dockerfile


def test_config_and_overrides_are_accepted() -> None:
    """The ConfigMap's TOML with the pod's overrides is a valid configuration, on the port that is scraped."""
    (generator,) = KUSTOMIZATION["configMapGenerator"]
    (name,) = generator["files"]
    config = parse_config((FOLDER / name).read_text(), source=name, overrides=options("--set"))
    (port,) = AGENT["ports"]
    (scraped,) = MANIFESTS["Service"]["spec"]["ports"]
    (policed,) = MANIFESTS["NetworkPolicy"]["spec"]["ingress"][1]["ports"]
    assert config.telemetry.metrics_address == "0.0.0.0"
    assert config.telemetry.metrics_port == port["containerPort"] == policed["port"] == 9400
    assert scraped["targetPort"] == port["name"]
    assert config.elastic.nodes_max >= JOB["completions"]
    volume = next(volume for volume in POD["volumes"] if "configMap" in volume)
    assert volume["configMap"]["name"] == generator["name"]


def test_a_lost_node_is_replaced_and_a_mistake_is_not() -> None:
    """Disruptions are not counted as failures; exit codes that a new try cannot mend end their own index."""
    assert JOB["completionMode"] == "Indexed"
    assert JOB["completions"] == JOB["parallelism"]
    assert POD["restartPolicy"] == "Never"
    disruption, left, mistake = JOB["podFailurePolicy"]["rules"]
    assert disruption["action"] == "Ignore"
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert left["action"] == "Ignore"
    (code,) = options("--left-code")
    # The alarm ends an agent that could not leave in time.
    assert left["onExitCodes"]["values"] == [128 + signal.SIGALRM, int(code)]
    assert int(code) == 128 + signal.SIGTERM
    assert mistake["action"] == "FailIndex"
    final = [ConfigError.exit_code, CheckpointError.exit_code, RunFailed.exit_code]
    assert mistake["onExitCodes"]["operator"] == "In"
    assert mistake["onExitCodes"]["values"] == final
    assert mistake["onExitCodes"]["containerName"] == AGENT["name"]


@pytest.mark.parametrize("rule", ["ingress", "egress"])
def test_only_pods_of_the_run_reach_each_other_on_any_port(rule: str) -> None:
    """Traffic between nodes is in plain text, so whatever is open without a port is open to the run's pods alone."""
    policy = MANIFESTS["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == LABELS
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    side = {"ingress": "from", "egress": "to"}[rule]
    anywhere = [entry[side] for entry in policy[rule] if "ports" not in entry]
    assert anywhere == [[{"podSelector": {"matchLabels": LABELS}}]]


def test_service_is_headless_and_finds_the_pods() -> None:
    """Pods have names before they are ready, through a Service without an address of its own."""
    service = MANIFESTS["Service"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == LABELS
    assert POD["subdomain"] == service["metadata"]["name"]


def test_image_is_that_of_this_version() -> None:
    """The manifests name the version that they were tested with."""
    (image,) = KUSTOMIZATION["images"]
    assert image["name"] == AGENT["image"]
    assert image["newTag"] == __version__
