"""The Helm chart: it renders what kustomize renders, with any good values, and refuses the others."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from elastic_pt import __version__
from elastic_pt.config import parse_config
from tests.deploy import chart_files
from tests.deploy.rendered import (
    CHART,
    KUBERNETES,
    MONITORING,
    PLATFORMS,
    ROOT,
    Manifest,
    Objects,
    agent_of,
    chart,
    config_of,
    helm,
    job_of,
    kustomized,
    objects,
    options_of,
    pod_specs,
    run,
)
from tests.services.fixtures import left_out

VERSIONS = ("1.31", "1.34", "1.37")
"""Of Kubernetes; the manifests need 1.29."""
UNREADABLE = "".join(map(chr, range(0x7F, 0xA0))) + "\x00\ufffe\uffff"
"""Characters that YAML or TOML has no room for."""
CUSTOM = {"PodMonitor", "PrometheusRule"}
"""Kinds that the Prometheus Operator defines: Kubernetes has no schema of them."""
DIGEST = "sha256:" + 64 * "a"

GOOD: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one node": {"replicas": 1},
    "many nodes": {"replicas": 100_000},
    "eight gpus": {"gpus": 8, "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]},
    "resources": {
        "resources": {
            "requests": {"cpu": 0.5, "memory": "1.5Gi"},
            "limits": {"memory": "2Gi", "amd.com/gpu": 1},
        },
        "sharedMemory": "512Mi",
        "temporary": "1Ti",
    },
    "gpus without limits": {"gpus": 1, "resources": {"limits": None}},
    "image by digest": {
        "image": {"repository": "registry:5000/a/b", "digest": DIGEST, "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry"}],
    },
    "no secret": {"credentialsSecret": "", "env": [{"name": "AWS_REGION", "value": "eu-west-1"}]},
    "the zone of each pod": {
        "env": [
            {
                "name": "ZONE",
                "valueFrom": {
                    "fieldRef": {"fieldPath": "metadata.labels['topology.kubernetes.io/zone']"}
                },
            }
        ],
        "extraArgs": ["--set", "elastic.zone=$(ZONE)"],
    },
    "an account that exists": {"serviceAccount": {"create": False, "name": "mine"}},
    "the default account": {"serviceAccount": {"create": False}},
    "no policy": {"networkPolicy": {"enabled": False}},
    "a bucket in the cluster": {
        "networkPolicy": {
            "bucketPort": 9000,
            "bucketCidrs": ["10.0.0.0/8", "fd00::/8"],
            "metricsNamespace": "",
            "extraEgress": [{"to": [{"ipBlock": {"cidr": "1.2.3.4/32"}}]}],
        }
    },
    "placement": {
        "nodeSelector": {"a/b": "true"},
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
                    ]
                }
            }
        },
        "topologySpreadConstraints": [
            {"maxSkew": 2, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"},
            {
                "maxSkew": 1,
                "topologyKey": "rack",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"own": "true"}},
            },
        ],
        "priorityClassName": "spot",
        "runtimeClassName": "nvidia",
        "podAnnotations": {"a": "true", "number": "1"},
        "podLabels": {"team": "x"},
    },
    "nowhere in particular": {"topologySpreadConstraints": [], "nodeSelector": {}},
    "more volumes": {
        "extraVolumes": [
            {"name": "tls", "secret": {"secretName": "tls"}},
            {"name": "cache", "persistentVolumeClaim": {"claimName": "cache"}},
        ],
        "extraVolumeMounts": [{"name": "tls", "mountPath": "/etc/tls", "readOnly": True}],
    },
    "several sources of notices": {"notices": ["auto", "file:/run/x y", "aws:http://10.0.0.1:1"]},
    "no source of notices": {"notices": "off"},
    "names without a value": dict.fromkeys(
        [
            "nodeSelector",
            "tolerations",
            "affinity",
            "topologySpreadConstraints",
            "env",
            "podLabels",
            "extraVolumes",
            "podMonitor",
            "imagePullSecrets",
            "priorityClassName",
            "configToml",
            "dashboards",
            "gpus",
            "credentialsSecret",
            "extraArgs",
        ]
    ),
    "monitoring": MONITORING | {"podMonitor": {"enabled": True, "labels": {"release": "kps"}}},
    "text": {"configToml": '[run]\nurl = "a"\n[data]\nurl = "{{ .Values }}"\n'},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for kustomizations of a test."""
    return tmp_path_factory.mktemp("kustomizations")


def with_components(folder: Path) -> Objects:
    """The base with all optional parts."""
    parts = (
        KUBERNETES / "components/podmonitor",
        KUBERNETES / "components/rules",
        ROOT / "dashboards",
    )
    listed = {
        "kind": "Kustomization",
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "resources": [os.path.relpath(KUBERNETES / "base", folder)],
        "components": [os.path.relpath(each, folder) for each in parts],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(listed))
    return kustomized(folder)


def kustomizations(folder: Path) -> dict[str, Objects]:
    """What people apply, by name."""
    overlays = {name: kustomized(KUBERNETES / "overlays" / name) for name in PLATFORMS}
    return overlays | {
        "base": kustomized(KUBERNETES / "base"),
        "namespace": kustomized(KUBERNETES / "namespace"),
        "components": with_components(folder),
    }


def test_the_chart_renders_the_base() -> None:
    """With the values as they are, the chart's objects are those of the kustomize base. No label differs."""
    assert chart() == kustomized(KUBERNETES / "base")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_chart_renders_the_overlay_of_a_platform(platform: str) -> None:
    """With the values of a platform, they are those of its overlay. Helm makes the namespace itself."""
    overlay = kustomized(KUBERNETES / "overlays" / platform)
    namespace = overlay.pop(("Namespace", "elastic-pt"))
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert chart(platform=platform) == overlay
    assert overlay != kustomized(KUBERNETES / "base")


def test_the_chart_renders_the_components(folder: Path) -> None:
    """PodMonitor, rules and dashboards are the same by either way."""
    found = chart(MONITORING)
    assert found == with_components(folder)
    assert CUSTOM | {"Job"} <= {kind for kind, _ in found}
    boards = [each for each in found.values() if "grafana_dashboard" in each["metadata"]["labels"]]
    assert len(boards) == len(list((ROOT / "dashboards").glob("*.json"))) == 5
    # `kubectl apply` keeps a copy of each object in an annotation, which has a limit.
    assert all(len(json.dumps(board)) < 2**18 for board in boards)


def test_copies_are_those_of_their_sources() -> None:
    """Files that repeat others are up to date: `python -m tests.deploy.chart_files` writes them."""
    for path, text in chart_files.files().items():
        assert path.read_text() == text, f"{path}: python -m tests.deploy.chart_files writes it"
    boards = {path.name for path in (CHART / "files" / "dashboards").iterdir()}
    assert boards == {path.name for path in (ROOT / "dashboards").glob("*.json")}


def assert_valid(found: Objects) -> None:
    """Kubernetes knows each field of each object, in several versions, and has no rule against its value."""
    for (kind, name), each in found.items():
        if kind in CUSTOM:
            continue
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(each, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                pytest.fail(f"{kind} {name}, Kubernetes {version}: {error.message}")


def test_kustomizations_are_valid(folder: Path) -> None:
    """Each kustomization is valid in three versions of Kubernetes."""
    for found in kustomizations(folder).values():
        assert_valid(found)


@pytest.mark.parametrize("name", GOOD)
def test_good_values_render_valid_objects(name: str) -> None:
    """Values that people would give are accepted, and what they render is valid and meets `restricted`."""
    found = chart(GOOD[name])
    assert_valid(found)
    assert [violations(pod) for pod in pod_specs(found.values())] == [[]]
    overrides = options_of(agent_of(found), "--set")
    parse_config(config_of(found), source="config.toml", overrides=overrides)


def test_validation_finds_mistakes() -> None:
    """The check of validity can fail: an unknown field, and a value of another type."""
    for path, value in ((("spec", "parallel"), 3), (("spec", "parallelism"), "3")):
        found = chart()
        job_of(found)[path[0]][path[1]] = value
        with pytest.raises(pytest.fail.Exception, match=path[1] if value == 3 else "'3'"):
            assert_valid(found)


def violations(pod: Manifest) -> list[str]:
    """What the pod security standard `restricted` (and `baseline`, which it contains) has against a pod."""
    context = pod.get("securityContext", {})
    found = [f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    found += [f"securityContext.{key} is set" for key in ("sysctls",) if context.get(key)]
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for volume in pod.get("volumes", []):
        found += [f"volume of type {kind}" for kind in volume.keys() - allowed - {"name"}]
    kinds = ("initContainers", "containers", "ephemeralContainers")
    for container in (each for kind in kinds for each in pod.get(kind, [])):
        own = container.get("securityContext", {})
        # A container's own field counts, else the pod's.
        both = {**context, **own}
        if own.get("privileged"):
            found.append("privileged")
        if own.get("allowPrivilegeEscalation") is not False:
            found.append("allowPrivilegeEscalation")
        capabilities = own.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"]:
            found.append("capabilities.drop")
        if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            found.append("capabilities.add")
        if both.get("runAsNonRoot") is not True:
            found.append("runAsNonRoot")
        if both.get("runAsUser") == 0:
            found.append("runAsUser")
        if both.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
            found.append("seccompProfile")
        if own.get("procMount", "Default") != "Default":
            found.append("procMount")
        if any(port.get("hostPort") for port in container.get("ports", [])):
            found.append("hostPort")
        probes = [container.get(each, {}) for each in ("livenessProbe", "readinessProbe")]
        if any(
            "host" in (probe.get("httpGet") or probe.get("tcpSocket") or {}) for probe in probes
        ):
            found.append("host of a probe")
        if "windowsOptions" in both or "seLinuxOptions" in both or "appArmorProfile" in both:
            found.append("options of the host's security")
    return found


@pytest.mark.parametrize("name", ["base", *PLATFORMS])
def test_every_pod_meets_the_restricted_standard(name: str) -> None:
    """The namespace enforces `restricted`, so a pod that breaks one of its rules would not start."""
    place = KUBERNETES / name if name == "base" else KUBERNETES / "overlays" / name
    (pod,) = pod_specs(kustomized(place).values())
    assert violations(pod) == []
    (agent,) = pod["containers"]
    assert agent["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda pod, agent: pod.update(hostNetwork=True), "hostNetwork is set"),
        (lambda pod, agent: pod["securityContext"].pop("runAsNonRoot"), "runAsNonRoot"),
        (lambda pod, agent: pod["securityContext"].pop("seccompProfile"), "seccompProfile"),
        (lambda pod, agent: agent.pop("securityContext"), "capabilities.drop"),
        (lambda pod, agent: agent["securityContext"].update(runAsUser=0), "runAsUser"),
        (
            lambda pod, agent: agent["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
            "capabilities.add",
        ),
        (lambda pod, agent: agent["ports"][0].update(hostPort=9400), "hostPort"),
        (lambda pod, agent: pod["volumes"].append({"hostPath": {}}), "volume of type hostPath"),
        (lambda pod, agent: pod.update(initContainers=[{}]), "allowPrivilegeEscalation"),
    ],
)
def test_each_rule_of_the_restricted_standard_is_checked(change: Any, found: str) -> None:
    """A pod that breaks a rule is found."""
    (pod,) = pod_specs(chart().values())
    change(pod, pod["containers"][0])
    assert found in violations(pod)


@pytest.mark.parametrize(("platform", "grace_s"), [("eks", 120), ("gke", 15), ("aks", 30)])
def test_a_node_leaves_within_the_grace_of_its_platform(platform: str, grace_s: int) -> None:
    """The pod asks for no more than the platform gives, and the agent takes less than the pod has."""
    found = kustomized(KUBERNETES / "overlays" / platform)
    pod, agent = job_of(found)["spec"]["template"]["spec"], agent_of(found)
    overrides = options_of(agent, "--set")
    config = parse_config(config_of(found), source="config.toml", overrides=overrides)
    assert pod["terminationGracePeriodSeconds"] <= grace_s
    # The agent needs a moment to end.
    assert config.elastic.leave_timeout_s + 2 <= pod["terminationGracePeriodSeconds"]
    # For the Job, a node that has left is not done, and nobody's failure.
    (code,) = options_of(agent, "--left-code")
    ignored = job_of(found)["spec"]["podFailurePolicy"]["rules"][1]
    assert ignored["action"] == "Ignore"
    assert int(code) in ignored["onExitCodes"]["values"]
    assert int(code) != 0
    metadata = {"ipBlock": {"cidr": "169.254.169.254/32"}}
    egress = found["NetworkPolicy", "elastic-pt"]["spec"]["egress"]
    ports = [rule["ports"] for rule in egress if metadata in rule.get("to", [])]
    assert {"port": 80, "protocol": "TCP"} in ports[0]
    assert config.elastic.notices == {"eks": ("aws",), "gke": "auto", "aks": ("azure",)}[platform]


def test_the_page_tells_the_grace_of_each_platform() -> None:
    """The table of graces has those of the manifests."""
    page = (ROOT / "docs" / "deployment" / "kubernetes.md").read_text()
    rows = re.findall(r"^\| (\w+) \| .* \| (\d+) s \| (\d+) s \|$", page, re.MULTILINE)
    told = {name.lower(): (grace, leave) for name, grace, leave in rows}
    for name in ("base", *PLATFORMS):
        found = chart(platform="" if name == "base" else name)
        grace_s = job_of(found)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert f"elastic.leave_timeout_s={told[name][1]}" in agent_of(found)["args"]
        assert told[name][0] == str(grace_s)
    assert told.keys() == {"base", *PLATFORMS}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_overlay_takes_the_components_that_it_lists(platform: str, tmp_path: Path) -> None:
    """Without the `#` before them, the optional parts of an overlay are what the chart has for them."""
    copied = (KUBERNETES, ROOT / "dashboards")
    for each in copied:
        shutil.copytree(each, tmp_path / each.relative_to(ROOT))
    overlay = tmp_path / "deploy/kubernetes/overlays" / platform
    path = overlay / "kustomization.yaml"
    path.write_text(re.sub("^# (components:|  - )", r"\1", path.read_text(), flags=re.MULTILINE))
    found = kustomized(overlay)
    del found["Namespace", "elastic-pt"]
    assert found == chart(MONITORING, platform=platform)


def test_the_example_of_a_node_pool_fits_the_overlay() -> None:
    """Karpenter deletes the pods of a machine that is taken away in time, and pods reach the metadata service."""
    pool, machine = yaml.safe_load_all((KUBERNETES / "overlays/eks/nodepool.yaml").read_text())
    pod = job_of(kustomized(KUBERNETES / "overlays" / "eks"))["spec"]["template"]
    grace_s = pod["spec"]["terminationGracePeriodSeconds"]
    assert pool["spec"]["template"]["spec"]["terminationGracePeriod"] == f"{grace_s}s"
    assert machine["spec"]["metadataOptions"]["httpPutResponseHopLimit"] == 2
    (capacity,) = pod["spec"]["nodeSelector"].items()
    wanted = {
        each["key"]: each["values"] for each in pool["spec"]["template"]["spec"]["requirements"]
    }
    assert wanted[capacity[0]] == [capacity[1]]
    assert pool["spec"]["template"]["spec"]["nodeClassRef"]["name"] == machine["metadata"]["name"]


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("a", "a"),
        ("my-run.v1.2", "my-run-v1-2"),
        ("7b", "run-7b"),
        (53 * "x", 53 * "x"),
        ("1." + 51 * "9", "run-1-" + 51 * "9"),
    ],
)
def test_names_follow_from_the_release(release: str, name: str) -> None:
    """Every object has a valid name, also those that Kubernetes derives: pods' host names are `JOB-INDEX`."""
    values = MONITORING | {"replicas": 100_000}
    found = chart(values, release=release, namespace="other")
    job = job_of(found)
    assert job["metadata"]["name"] == name
    assert len(f"{name}-{job['spec']['completions'] - 1}") <= 63
    for each in found.values():
        metadata = each["metadata"]
        assert metadata["namespace"] == "other"
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", metadata["name"])
        boards = metadata["labels"].get("grafana_dashboard")
        assert len(metadata["name"]) <= (253 if boards else 63)
        assert metadata["labels"]["app.kubernetes.io/instance"] == release
    # All that refers to a name or to labels refers to those of this release.
    template = job["spec"]["template"]
    labels = template["metadata"]["labels"]
    pod = template["spec"]
    assert pod["subdomain"] == found["Service", name]["metadata"]["name"]
    assert pod["serviceAccountName"] == found["ServiceAccount", name]["metadata"]["name"]
    assert found["Service", name]["spec"]["selector"] == labels
    assert found["NetworkPolicy", name]["spec"]["podSelector"]["matchLabels"] == labels
    assert found["PodMonitor", name]["spec"]["selector"]["matchLabels"] == labels
    assert pod["volumes"][0]["configMap"]["name"] == name
    assert_valid(found)


# An example is one run of helm: finding the smallest one that fails would take minutes.
@settings(max_examples=15, phases=(Phase.explicit, Phase.generate))
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters=UNREADABLE), max_size=40),
    st.floats(1e-7, 1, exclude_max=True),
    st.integers(0, 2**53 - 1),
)
def test_the_configuration_arrives_as_it_was_given(text: str, rate: float, seed: int) -> None:
    """Whatever a value holds, quotes, templates, or line ends: the TOML in the ConfigMap has the same value."""
    values = {
        "run": {"url": f"s3://b/{text}{{{{ .Values }}}}", "seed": seed},
        "train": {"learning_rate": rate, "compile": True},
    }
    found = config_of(chart({"config": values}))
    tree = tomllib.loads(found)
    assert tree["run"] == {"url": f"s3://b/{text}{{{{ .Values }}}}", "seed": seed}
    assert tree["train"]["learning_rate"] == rate
    assert tree["train"]["compile"] is True
    # The rest of the section keeps the chart's values.
    assert tree["train"]["steps"] == 20_000


@pytest.mark.parametrize(
    "text",
    [
        "  # first\r\n[run]\r\n",
        "[a]\n\tb = '''\n{{ fail }}\n'''  \n\n",
        'a = "\\u00e9é☃"',
        "---\n...",
    ],
)
def test_a_text_of_configuration_is_used_as_it_is(text: str) -> None:
    """`--set-file configToml=run.toml` takes the file byte by byte, instead of `config`."""
    assert config_of(chart({"configToml": text})) == text


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown value": ({"replica": 3}, "replica"),
    "an unknown value below": ({"image": {"name": "x"}}, "name"),
    "no node": ({"replicas": 0}, "/replicas"),
    "half a node": ({"replicas": 1.5}, "/replicas"),
    "nodes as text": ({"replicas": "3"}, "/replicas"),
    "an unknown key of the run": ({"config": {"train": {"step": 3}}}, "'step'"),
    "an unknown section of the run": ({"config": {"training": {}}}, "'training'"),
    "a wrong value of the run": ({"config": {"train": {"schedule": "linear"}}}, "/config/train"),
    "text for a number": ({"config": {"train": {"steps": "many"}}}, "/config/train/steps"),
    "a seed that would change": ({"config": {"run": {"seed": 2**60}}}, "/config/run/seed"),
    "what the chart sets": ({"config": {"elastic": {"notices": "off"}}}, "'notices'"),
    "a port of the chart": ({"config": {"telemetry": {"metrics_port": 1}}}, "'metrics_port'"),
    "no grace to leave": ({"leaveTimeoutSeconds": 60}, "leaveTimeoutSeconds 60: expected less"),
    "too little grace": ({"terminationGracePeriodSeconds": 20}, "leaveTimeoutSeconds 25"),
    "no seconds": ({"leaveTimeoutSeconds": 0}, "/leaveTimeoutSeconds"),
    "an unknown source of notices": ({"notices": "azur"}, "/notices"),
    "off and more": ({"notices": ["off", "aws"]}, "/notices"),
    "a size without its unit": ({"sharedMemory": "6 GB"}, "/sharedMemory"),
    "a folder of the machine": (
        {"extraVolumes": [{"name": "data", "hostPath": {"path": "/data"}}]},
        "/extraVolumes/0",
    ),
    "a volume of the chart": ({"extraVolumes": [{"name": "tmp", "emptyDir": {}}]}, "/extraVolumes"),
    "a mount over the chart's": (
        {"extraVolumeMounts": [{"name": "x", "mountPath": "/dev/shm"}]},
        "/extraVolumeMounts",
    ),
    "a variable of the chart": ({"env": [{"name": "POD_IP", "value": "1"}]}, "/env/0"),
    "a number as a variable": ({"env": [{"name": "A", "value": 1}]}, "/env/0"),
    "a label of the chart": ({"podLabels": {"app.kubernetes.io/name": "x"}}, "/podLabels"),
    "a long label": ({"podLabels": {"a": 64 * "x"}}, "/podLabels"),
    "true for an annotation": ({"podAnnotations": {"a": True}}, "/podAnnotations"),
    "a wrong effect": ({"tolerations": [{"effect": "No"}]}, "/tolerations/0"),
    "no CIDR": ({"networkPolicy": {"bucketCidrs": ["10.0.0.1"]}}, "/networkPolicy/bucketCidrs"),
    "no port": ({"networkPolicy": {"bucketPort": 0}}, "/networkPolicy/bucketPort"),
    "a value taken away": ({"networkPolicy": {"bucketPort": None}}, "'bucketPort'"),
    "a section taken away": ({"resources": None}, "'resources'"),
    "a tag in the name": ({"image": {"repository": "a/b:1.0"}}, "/image/repository"),
    "a capital in a secret's name": ({"credentialsSecret": "S3"}, "/credentialsSecret"),
    "a negative gpu": ({"gpus": -1}, "/gpus"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name(name: str) -> None:
    """Helm names the value that is wrong, and renders nothing."""
    values, told = BAD[name]
    done = helm(values)
    assert done.returncode != 0
    assert told in done.stderr
    assert not done.stdout


def test_values_and_schema_have_the_same_names() -> None:
    """Every value has a rule, and every rule a value with a default; `global` is helm's own."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["additionalProperties"] is False
    assert schema["properties"].keys() - {"global"} == values.keys()
    for name, value in values.items():
        rules = schema["properties"][name]
        if "properties" in rules and name not in {"config", "resources", "affinity"}:
            assert rules["properties"].keys() == value.keys(), name
            assert rules["additionalProperties"] is False, name


def test_helm_accepts_the_chart() -> None:
    """`helm lint` has nothing against it, with the values of any platform."""
    for platform in PLATFORMS:
        done = run(
            "helm", "lint", "--strict", CHART, "-f", CHART / "platforms" / f"{platform}.yaml"
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_packaged_chart_is_complete(tmp_path: Path) -> None:
    """The archive that a registry holds renders the same, with rules and dashboards."""
    done = run("helm", "package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tgz")
    assert archive.name == f"elastic-pt-{__version__}.tgz"
    assert chart(MONITORING, chart=archive) == chart(MONITORING)


def test_notes_tell_what_to_do_next() -> None:
    """After an installation helm prints commands with this release's names."""
    values = json.dumps({"config": {"run": {"url": "s3://b/r"}, "data": {"url": "s3://b/d"}}})
    install = ("install", "my.run", CHART, "--dry-run=client", "--namespace", "here", "-f", "-")
    notes = run("helm", *install, stdin=values).stdout.partition("NOTES:")[2]
    assert "kubectl delete job my-run -n here" in notes
    assert "elastic-pt status s3://b/r --watch" in notes
    assert "YOUR-BUCKET" not in notes
    assert "YOUR-BUCKET" in run("helm", *install, stdin="{}").stdout.partition("NOTES:")[2]


def test_prometheus_accepts_the_rules(tmp_path: Path) -> None:
    """The groups in the PrometheusRule are rules that Prometheus loads."""
    if shutil.which("promtool") is None:
        left_out("checks with promtool")
    spec = chart(MONITORING)["PrometheusRule", "elastic-pt"]["spec"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(spec))
    checked = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yml"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_objects_refuses_a_repeated_key() -> None:
    """The reader of these tests sees what an API server would refuse."""
    with pytest.raises(AssertionError, match="repeated"):
        objects("kind: A\nmetadata: {name: a, name: b}\n")


def test_the_version_is_that_of_the_package() -> None:
    """Chart, image and package have one version."""
    description = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert description["version"] == description["appVersion"] == __version__
    assert agent_of(chart())["image"] == f"elastic-pt:{__version__}"
