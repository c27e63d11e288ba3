"""The software bill of materials of the image, as CycloneDX JSON on standard output.

In the build of the image: the packages of the environment whose Python is the first argument, that Python itself, and the Debian
or Ubuntu packages of the base image. Its time is SOURCE_DATE_EPOCH, so that the same image has the same document.
"""

import json
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL


def python_packages(python: str) -> Bom:
    """What cyclonedx-py finds in the environment of `python`, of which elastic-pt is the main component."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", "pyproject.toml"]
    command += [
        "--mc-type",
        "application",
        "--output-reproducible",
        "--spec-version",
        "1.6",
        python,
    ]
    document = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    bom: Bom = Bom.from_json(json.loads(document))  # type: ignore[attr-defined]
    ask = "from importlib.metadata import version; print(version('elastic-pt'))"
    version = subprocess.check_output([python, "-c", ask], text=True).strip()
    assert bom.metadata.component is not None
    bom.metadata.component.version = version
    bom.metadata.component.purl = PackageURL("pypi", None, "elastic-pt", version)
    return bom


def distribution_packages() -> Iterator[Component]:
    """What dpkg had installed before the build added its own tools, which stay behind."""
    release = platform.freedesktop_os_release()
    command = [
        "dpkg-query",
        "--admindir",
        "/opt/dpkg",
        "--show",
        "--showformat",
        "${Package}\\t${Version}\\t${Architecture}\\n",
    ]
    listed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    for line in listed.splitlines():
        name, version, architecture = line.split("\t")
        qualifiers = {"arch": architecture, "distro": f"{release['ID']}-{release['VERSION_ID']}"}
        yield Component(
            type=ComponentType.LIBRARY,
            name=name,
            version=version,
            purl=PackageURL("deb", release["ID"], name, version, qualifiers),
            bom_ref=f"deb:{name}:{architecture}",
        )


def main() -> None:
    bom = python_packages(sys.argv[1])
    version = platform.python_version()
    interpreter = Component(
        type=ComponentType.PLATFORM,
        name="python",
        version=version,
        purl=PackageURL("generic", None, "python", version),
        bom_ref="python",
    )
    bom.components.update([interpreter, *distribution_packages()])
    bom.metadata.timestamp = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), UTC)
    names: list[Any] = sorted(str(component.purl) for component in bom.components)
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, "\n".join(names))
    print(JsonV1Dot6(bom).output_as_string(indent=2))


if __name__ == "__main__":
    main()
