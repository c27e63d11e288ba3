"""What the real helm and the real kubectl make of the files in deploy/. `make services` installs both."""

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from tests.services.fixtures import SERVICES, left_out

ROOT: Final = Path(__file__).parents[2]
KUBERNETES: Final = ROOT / "deploy" / "kubernetes"
CHART: Final = ROOT / "deploy" / "helm" / "elastic-pt"
PLATFORMS: Final = ("eks", "gke", "aks")
MONITORING: Final = {
    name: {"enabled": True} for name in ("podMonitor", "prometheusRule", "dashboards")
}

Manifest = dict[str, Any]
Objects = dict[tuple[str, str], Manifest]
"""Kind and name -> object."""


class _NoRepeatedKeys(yaml.SafeLoader):
    """Plain YAML takes the last one of two equal keys; an API server refuses both."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    assert len(keys) == len(set(keys)), f"a key is repeated: {keys}, {node.start_mark}"
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_NoRepeatedKeys.add_constructor("tag:yaml.org,2002:map", _mapping)


def objects(text: str) -> Objects:
    """The objects in a text of several YAML documents. JSON in them is without spaces: only its meaning counts."""
    found = [each for each in yaml.load_all(text, _NoRepeatedKeys) if each]
    named = {(each["kind"], each["metadata"]["name"]): each for each in found}
    assert len(named) == len(found)
    for each in found:
        for name, content in each.get("data", {}).items():
            if name.endswith(".json"):
                each["data"][name] = json.dumps(json.loads(content))
    return named


def run(program: str, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `helm` or `kubectl`."""
    path = SERVICES / "kubernetes" / program
    if not path.exists():
        left_out(f"tests with the real {program}")
    return subprocess.run(
        [path, *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


def helm(
    values: Mapping[str, Any] | None = None,
    *,
    platform: str = "",
    release: str = "elastic-pt",
    namespace: str = "elastic-pt",
    chart: Path = CHART,
) -> subprocess.CompletedProcess[str]:
    """`helm template`, with these values on top of those of a platform."""
    files = ["-f", str(CHART / "platforms" / f"{platform}.yaml")] if platform else []
    command = ["template", release, str(chart), "--namespace", namespace, *files, "-f", "-"]
    return run("helm", *command, stdin=json.dumps(values or {}, ensure_ascii=False))


def chart(values: Mapping[str, Any] | None = None, **options: Any) -> Objects:
    """The objects that the chart renders."""
    done = helm(values, **options)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


def kustomized(folder: Path) -> Objects:
    """The objects of a kustomization."""
    done = run("kubectl", "kustomize", folder)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return objects(done.stdout)


def pod_specs(found: Iterable[Manifest]) -> Iterator[Manifest]:
    """The specification of each pod that these objects lead to."""
    for each in found:
        if "template" in each.get("spec", {}):
            yield each["spec"]["template"]["spec"]


def job_of(found: Objects) -> Manifest:
    """The Job."""
    (job,) = [each for (kind, _), each in found.items() if kind == "Job"]
    return job


def agent_of(found: Objects) -> Manifest:
    """The container of the agent."""
    (agent,) = job_of(found)["spec"]["template"]["spec"]["containers"]
    container: Manifest = agent
    return container


def options_of(agent: Manifest, name: str) -> list[str]:
    """The values of an option in the agent's arguments."""
    arguments = agent["args"]
    return [arguments[i + 1] for i, argument in enumerate(arguments) if argument == name]


def config_of(found: Objects) -> str:
    """The text of the run's configuration."""
    (text,) = [
        each["data"]["config.toml"]
        for (kind, _), each in found.items()
        if kind == "ConfigMap" and "config.toml" in each["data"]
    ]
    return str(text)
