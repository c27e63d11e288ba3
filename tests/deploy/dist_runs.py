"""The wheel on a machine that has nothing of this checkout: `make try-dist` (minutes; `make test` has test_release.py).

It is installed into an empty environment, and the demo runs in an unrelated directory, under another locale, without git.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from elastic_pt import __version__

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `python -m build` makes by way of the sdist, with an isolated backend."""
    directory = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(directory), str(ROOT)], check=True
    )
    (found,) = directory.glob("*.whl")
    return found


def bare_environment(directory: Path, path: str) -> dict[str, str]:
    """What a stranger's shell has: no variables of this project, another locale, a home that cannot be written to."""
    return {
        "PATH": path,
        "HOME": "/nonexistent",
        "LC_ALL": "C",
        "TZ": "Asia/Kathmandu",
        "TMPDIR": str(directory),
    }


def run_demo(command: list[str], directory: Path, environment: Mapping[str, str]) -> None:
    """`elastic-pt demo` in an empty folder: both digests are printed, and they are equal."""
    folder = directory / "an empty folder"
    folder.mkdir()
    result = subprocess.run(
        [*command, "demo"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    digests = re.findall(r"\b[0-9a-f]{64}\b", result.stdout)
    print(result.stdout[-1500:])
    assert len(digests) >= 2
    assert len(set(digests)) == 1
    assert (folder / "demo" / "1" / "disturbed" / "report.html").exists()


def test_demo_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Into an empty environment, by pip from the lock; then version and demo, with only that environment on the path."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    lock = ["sh", str(ROOT / "requirements" / "install.sh"), str(venv / "bin" / "python")]
    # With the checkout on the path, pip would find elastic-pt already installed.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*lock, "runtime"], check=True, env=clean)
    pip = [str(venv / "bin" / "pip")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True, env=clean)
    subprocess.run([*pip, "check"], check=True, env=clean)
    environment = bare_environment(tmp_path, str(venv / "bin"))
    program = str(venv / "bin" / "elastic-pt")
    shown = subprocess.check_output([program, "--version"], cwd="/", env=environment, text=True)
    assert shown == f"elastic-pt {__version__}\n"
    run_demo([program], tmp_path, environment)


def test_demo_by_uvx(wheel: Path, tmp_path: Path) -> None:
    """`uvx --from WHEEL elastic-pt demo` installs and runs it in one command."""
    environment = {
        **os.environ,
        # uv does not read pip's settings: where this machine has torch's CPU wheel.
        "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", ""),
        "UV_EXTRA_INDEX_URL": os.environ.get("PIP_EXTRA_INDEX_URL", ""),
        "UV_CONSTRAINT": str(ROOT / "constraints.txt"),
    }
    environment = {name: value for name, value in environment.items() if value}
    environment.pop("PYTHONPATH", None)
    uvx = [str(Path(sys.executable).with_name("uvx")), "--from", str(wheel), "elastic-pt"]
    shown = subprocess.check_output([*uvx, "--version"], cwd=tmp_path, env=environment, text=True)
    assert shown == f"elastic-pt {__version__}\n"
    run_demo(uvx, tmp_path, environment)
