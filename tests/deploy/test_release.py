"""What a release consists of, told from the checkout: the wheel's files, and one version everywhere."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from elastic_pt import __version__

ROOT = Path(__file__).parents[2]
REPEATING = (
    "deploy/cloud-init/user-data.yaml",
    "docs/deployment/kubernetes.md",
    "docs/releasing.md",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it, as `make dist` makes them."""
    # Setuptools also takes what an earlier build has listed, so the source is a clean copy.
    source, directory = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in listed:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), "."]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return directory


def tracked() -> set[str]:
    """The files of the package, by git."""
    listed = subprocess.check_output(["git", "ls-files", "elastic_pt"], cwd=ROOT, text=True)
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


def test_wheel_has_every_file_of_the_package(built: Path) -> None:
    """Modules, scenarios, pages and dashboards are in the wheel, with their content; nothing else is."""
    (wheel,) = built.glob("elastic_pt-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == tracked()
        for name in names:
            assert archive.read(name) == (ROOT / name).read_bytes(), name


def test_sdist_has_what_the_wheel_is_built_from(built: Path) -> None:
    """The sdist has the package, the licence and the project file, and no tests of which half would be missing."""
    (sdist,) = built.glob("elastic_pt-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert tracked() | {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert not {name for name in names if name.startswith(("tests/", "chaos_tests/"))}


def test_metadata_names_version_licence_and_commands(built: Path) -> None:
    """The wheel has the version of the package, its licence and the command `elastic-pt`."""
    (wheel,) = built.glob(f"elastic_pt-{__version__}-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        information = f"elastic_pt-{__version__}.dist-info"
        metadata = archive.read(f"{information}/METADATA").decode()
        commands = archive.read(f"{information}/entry_points.txt").decode()
        assert f"{information}/licenses/LICENSE" in archive.namelist()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "elastic-pt = elastic_pt.cli:main" in commands
    assert "[torchrun.handlers]" in commands


def test_one_version_everywhere() -> None:
    """`elastic_pt.__version__` is the version; the image's label, a chart and the newest changelog entry repeat it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "elastic_pt.__version__"}
    assert f"ARG VERSION={__version__}\n" in (ROOT / "Dockerfile").read_text()
    for chart in ROOT.glob("deploy/helm/*/Chart.yaml"):
        told = yaml.safe_load(chart.read_text())
        assert (told["appVersion"], told["version"]) == (__version__, __version__), chart
    base = yaml.safe_load((ROOT / "deploy/kubernetes/base/kustomization.yaml").read_text())
    assert [image["newTag"] for image in base["images"]] == [__version__]
    for page in REPEATING:
        told = set(re.findall(r"elastic[-_]pt[-:](\d+\.\d+\.\d+)", (ROOT / page).read_text()))
        assert told == {__version__}, page
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[([^]]+)\](?: - (\d{4}-\d{2}-\d{2}))?$", changelog, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == __version__
