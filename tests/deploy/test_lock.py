"""The lock: what is installed, in which version and with which hash. Nothing here needs a network."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
PARTS = sorted(path.stem for path in LOCK.glob("*.txt"))


def script(name: str) -> ModuleType:
    """A script of `requirements/`, as a module."""
    spec = importlib.util.spec_from_file_location(name, LOCK / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(part: str) -> list[str]:
    """The requirements of one file, each with its hashes."""
    lines = [line for line in (LOCK / f"{part}.txt").read_text().splitlines() if line[:1] != "#"]
    return re.split(r"\n(?=\S)", "\n".join(lines))


def locked(*parts: str) -> dict[str, Version]:
    """The versions in some files of the lock, by name."""
    found = {}
    for part in parts:
        for block in blocks(part):
            name, _, rest = block.partition("==")
            found[canonicalize_name(name.partition("[")[0])] = Version(rest.split()[0])
    return found


def closure(root: str, extra: str) -> Iterator[Requirement]:
    """What an installed package requires, and what that requires, as far as it is installed."""
    seen = set()
    waiting = [(root, extra)]
    while waiting:
        name, chosen = waiting.pop()
        try:
            texts = requires(name) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, texts):
            if requirement.marker and not requirement.marker.evaluate({"extra": chosen}):
                continue
            yield requirement
            for each in ["", *requirement.extras]:
                if (requirement.name, each) not in seen:
                    seen.add((requirement.name, each))
                    waiting.append((requirement.name, each))


@pytest.mark.parametrize("part", PARTS)
def test_each_file_is_named_by_its_hash(part: str) -> None:
    """Every requirement has one version and SHA-256 hashes, and none says where its files come from."""
    for block in blocks(part):
        assert re.match(r"[a-z0-9][a-z0-9._-]*(\[[a-z,]+\])?==\S+ ", block), block
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), block
    text = (LOCK / f"{part}.txt").read_text()
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)


@pytest.mark.parametrize("torch", ["cpu", "cuda"])
def test_has_what_the_project_asks_for(torch: str) -> None:
    """Each dependency and each extra of pyproject.toml is in its file, in a version that its range allows."""
    runtime = locked("runtime", torch)
    wanted = {"": PROJECT["project"]["dependencies"], **EXTRAS}
    for extra, texts in wanted.items():
        have = {**runtime, **(locked(extra) if extra else {})}
        for requirement in map(Requirement, texts):
            if requirement.marker and not requirement.marker.evaluate():
                continue
            name = canonicalize_name(requirement.name)
            assert name in have, f"{requirement}: `make lock` adds it"
            assert requirement.specifier.contains(have[name]), requirement
    image = locked("image")
    for requirement in map(Requirement, PROJECT["dependency-groups"]["image"]):
        assert requirement.specifier.contains(image[canonicalize_name(requirement.name)])


def test_has_what_the_dependencies_need() -> None:
    """What the installed packages require of each other is in the lock too, and installed as locked."""
    have = {**locked("cuda"), **locked("runtime", "dev", "cpu")}
    checked = 0
    roots = [Requirement(text) for text in [*PROJECT["project"]["dependencies"], *EXTRAS["dev"]]]
    for root in roots:
        for extra in ["", *root.extras]:
            for requirement in closure(root.name, extra):
                name = canonicalize_name(requirement.name)
                assert name in have, f"{root.name} needs {requirement}: `make lock` adds it"
                assert requirement.specifier.contains(have[name], prereleases=True), requirement
                checked += 1
    assert checked > 100
    for name, each in have.items():
        try:
            assert Version(version(name)).public == each.public, f"{name}: run `make install`"
        except PackageNotFoundError:
            continue


def test_constraints_have_the_same_versions() -> None:
    """`constraints.txt` is the lock without hashes: one version per package, in all files."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    pairs = [line.split("==") for line in lines]
    constraints = {canonicalize_name(name): Version(text) for name, text in pairs}
    assert len(constraints) == len(lines)
    for part in PARTS:
        for name, each in locked(part).items():
            assert constraints[name] == Version(each.public), f"{part}.txt: {name}"


def test_cpu_torch_accepts_the_listed_wheels_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """cpu.txt has the hashes of torch-cpu.sha256; a list of another version than the lock's is refused by name."""
    listed = re.findall(r"^([0-9a-f]{64})  torch-", (LOCK / "torch-cpu.sha256").read_text(), re.M)
    (block,) = blocks("cpu")
    assert set(re.findall(r"sha256:([0-9a-f]{64})", block)) == set(listed)
    lock = script("lock")
    (tmp_path / "torch-cpu.sha256").write_text("0" * 64 + "  torch-2.9.0+cpu-cp311.whl\n")
    monkeypatch.setattr(lock, "HERE", tmp_path)
    with pytest.raises(
        SystemExit, match=r"torch-2\.9\.0\+cpu-cp311\.whl: expected a wheel of torch 2\.13\.0"
    ):
        lock.cpu_torch("torch==2.13.0 \\\n    --hash=sha256:00\n")


@pytest.mark.parametrize("honest", [True, False])
def test_a_changed_file_is_not_installed(honest: bool, tmp_path: Path) -> None:
    """install.sh installs a wheel that has its recorded hash, and refuses one that has not."""
    wheels = tmp_path / "requirements" / "wheels"
    wheels.mkdir(parents=True)
    shutil.copy(LOCK / "install.sh", wheels.parent)
    wheel = wheels / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small.py", "")
        archive.writestr(
            "small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n"
        )
        archive.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("small-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(wheel.read_bytes() if honest else b"another file").hexdigest()
    (wheels.parent / "dev.txt").write_text(f"small==1.0 --hash=sha256:{sha256}\n")
    result = subprocess.run(
        ["sh", wheels.parent / "install.sh", sys.executable, "dev"],
        env={**os.environ, "PIP_TARGET": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "installed" / "small.py").exists() == honest, result.stderr
    assert (result.returncode == 0) == honest
    assert honest or "DO NOT MATCH THE HASHES" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "torch", "message"),
    [
        (["nothing"], "", r"install\.sh: 'nothing': expected one of azure cpu cuda dev"),
        (["runtime"], "tpu", r"install\.sh: TORCH=tpu: expected cpu or cuda"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], torch: str, message: str) -> None:
    """An unknown part or build of torch is named, with what is expected."""
    result = subprocess.run(
        ["sh", LOCK / "install.sh", sys.executable, *arguments],
        env={**os.environ, "TORCH": torch},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert len(result.stderr.splitlines()) == 1


FINE = {"name": "torch", "version": "2.13.0", "vulns": []}
BAD = {"name": "torch", "version": "2.9", "vulns": [{"id": "CVE-1", "fix_versions": ["2.10"]}]}
UNKNOWN = {"name": "torch", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "status", "said"),
    [
        ([FINE], 0, "0 vulnerabilities in 1 packages"),
        ([FINE, BAD], 1, "torch 2.9: CVE-1, mended in 2.10"),
        ([FINE, UNKNOWN], 2, "1 of 2 packages could not be looked up (not found)"),
        ([BAD, UNKNOWN], 1, "1 of 2 packages could not be looked up"),
        ([], 2, "0 of 0 packages"),
    ],
)
def test_an_audit_without_data_is_no_pass(packages: list[object], status: int, said: str) -> None:
    """Only a report in which every package was looked up can pass."""
    code, lines = script("audit").verdict({"dependencies": packages})
    assert code == status
    assert said in "\n".join(lines)
