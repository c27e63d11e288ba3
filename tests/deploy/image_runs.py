"""The image, built for real and run as strangers run it: `make try-image` (minutes; `make test` has test_image.py).

Every container has a read-only root, no capabilities, no new privileges and a user that is not root.
"""

import json
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.utils import canonicalize_name

from elastic_pt import __version__
from elastic_pt.chaos.small_run import small_run
from elastic_pt.report.status import State, open_run, read_status
from tests.deploy import containers
from tests.deploy.containers import IMAGE, ROOT, Docker
from tests.services.fixtures import left_out

HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
ROOM = ("--tmpfs", "/tmp:rw,nosuid,nodev,mode=1777", "--shm-size", "512m")
USERS = ["10001:10001", "1000650000:0"]
NETWORK = "elastic-pt-try"
LARGEST_BYTES = 1_200_000_000
STEPS = 400

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="session")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    """A daemon with the image in it."""
    if missing := containers.missing():
        left_out(f"the image, since {', '.join(missing)} is missing")
    directory = tmp_path_factory.mktemp("docker")
    client, daemon = containers.start_daemon(directory)
    try:
        containers.build(client, containers.make_base(client))
        # A session that was killed leaves them.
        for container in client("ps", "--all", "--quiet").split():
            client("rm", "--force", container)
        client("network", "rm", NETWORK, check=False)
        client("network", "create", "--subnet", "10.213.77.0/24", NETWORK)
        yield client
    finally:
        for container in client("ps", "--all", "--quiet", check=False).split():
            client("rm", "--force", container, check=False)
        client("network", "rm", NETWORK, check=False)
        containers.stop_daemon(directory, daemon)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """What the containers share as /runs: a folder that every user may write to, with prepared data in it."""
    tmp_path.chmod(0o777)
    (tmp_path / "text").mkdir()
    for name in ("ast.py", "argparse.py", "datetime.py", "decimal.py", "inspect.py"):
        if (source := Path(json.__file__).parents[1] / name).exists():
            shutil.copy(source, tmp_path / "text")
    return tmp_path


def inspected(docker: Docker) -> dict[str, Any]:
    (found,) = json.loads(docker("image", "inspect", IMAGE))
    assert isinstance(found, dict)
    return found


def node(docker: Docker, volume: Path, name: str, run: str, *, user: str = USERS[0]) -> None:
    """Start one node of a run in the background."""
    docker(
        *("run", "--detach", "--name", name, "--network", NETWORK, "--volume", f"{volume}:/runs"),
        *(*HARDENED, *ROOM, "--user", user, IMAGE, "run", f"/runs/{run}.toml", "--node", name),
    )


def ended(docker: Docker, name: str) -> int:
    """Wait for a container; its exit status."""
    return int(docker("wait", name, timeout=600))


def log_of(docker: Docker, *names: str) -> str:
    return "\n".join(f"{name}: {docker('logs', '--tail', '8', name)}" for name in names)


def prepare(docker: Docker, volume: Path, *runs: str) -> None:
    docker(
        *("run", "--rm", "--volume", f"{volume}:/runs", *HARDENED, *ROOM, "--user", USERS[1]),
        *(IMAGE, "prepare", "/runs/text", "--out", "/runs/data", "--vocab-size", "512"),
    )
    for run in runs:
        tree = small_run(f"/runs/{run}", "/runs/data", {"train": {"steps": STEPS}})
        tree["elastic"]["nodes_max"] = 3
        tree["elastic"]["join_window_s"] = 5.0
        tree["checkpoint"]["every_steps"] = 20
        (volume / f"{run}.toml").write_text(tomlkit.dumps(tree))


def wait_for_step(docker: Docker, run: Path, step: int, *names: str) -> None:
    """Until the run has done `step` steps on `names`."""
    deadline_s = time.monotonic() + 300
    while time.monotonic() < deadline_s:
        if (run / "log").exists() and any((run / "log").iterdir()):
            status = read_status(open_run(str(run)))
            members = {member.node for member in status.members}
            if status.step >= step and members >= set(names):
                assert status.state is not State.COMPLETED, "the run was over before the fault"
                return
        time.sleep(0.2)
    raise AssertionError(f"{names} did not reach step {step}:\n{log_of(docker, *names)}")


def digest(docker: Docker, volume: Path, run: str) -> str:
    """What `elastic-pt digest` prints of a run, in a container that may only read it."""
    return docker(
        *("run", "--rm", "--volume", f"{volume}:/runs:ro", *HARDENED, *ROOM),
        *("--user", USERS[1], IMAGE, "digest", f"/runs/{run}"),
    ).strip()


def test_is_small_and_says_what_it_is(docker: Docker) -> None:
    """The CPU image is below 1.2 GB, and its labels name version, revision and time of the commit."""
    found = inspected(docker)
    print(f"\nimage: {found['Size'] / 1e6:.0f} MB")
    assert found["Size"] < LARGEST_BYTES
    labels = {name.rpartition(".")[2]: text for name, text in found["Config"]["Labels"].items()}
    revision = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    committed = subprocess.check_output(
        ["git", "log", "-1", "--format=%cd", "--date=format-local:%Y-%m-%dT%H:%M:%SZ"],
        cwd=ROOT,
        env={"TZ": "UTC", "PATH": "/usr/bin:/bin"},
        text=True,
    )
    assert labels["version"] == __version__
    assert labels["revision"].removesuffix("-modified") == revision
    assert labels["created"] == committed.strip()
    assert labels["licenses"] == "Apache-2.0"
    assert "Healthcheck" not in found["Config"]


def test_lists_what_is_in_it(docker: Docker) -> None:
    """The SBOM is valid CycloneDX and names every Python and Debian package of the image, and no other."""
    plain = ("run", "--rm", *HARDENED, "--user", USERS[1], "--entrypoint")
    text = docker(*plain, "cat", IMAGE, "/usr/share/elastic-pt/sbom.cdx.json")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    listed = json.loads(text)
    parts = [PackageURL.from_string(each["purl"]) for each in listed["components"]]
    found = {(part.type, canonicalize_name(part.name), part.version) for part in parts}
    ask = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
    python = docker(*plain, "python", IMAGE, "-c", ask).splitlines()
    query = ("--show", "--showformat", r"${Package} ${Version}\n")
    debian = docker(*plain, "dpkg-query", IMAGE, *query).splitlines()
    kinds = [*(("pypi", line) for line in python), *(("deb", line) for line in debian)]
    here = {(kind, canonicalize_name(line.split()[0]), line.split()[1]) for kind, line in kinds}
    own = ("pypi", "elastic-pt", __version__)
    assert here - found == {own}
    assert {each for each in found - here if each[0] != "generic"} == set()
    assert listed["metadata"]["component"]["purl"] == f"pkg:pypi/elastic-pt@{__version__}"


def test_demo_trains_in_a_closed_container(docker: Docker) -> None:
    """`elastic-pt demo` runs as an unknown user, without network, and its two digests are equal."""
    shown = docker(
        *("run", "--rm", "--network", "none", *HARDENED, *ROOM, "--user", USERS[1]),
        *(IMAGE, "demo"),
    )
    print(shown[-3000:])
    assert "identical" in shown or "equal" in shown


def test_nodes_are_killed_stopped_and_replaced(docker: Docker, volume: Path) -> None:
    """Three containers train one run: one is killed, one stopped, a new one joins; the weights are those of two undisturbed ones."""
    prepare(docker, volume, "calm", "disturbed")
    for name in ("calm-0", "calm-1"):
        node(docker, volume, name, "calm")
    assert [ended(docker, name) for name in ("calm-0", "calm-1")] == [0, 0]

    for name in ("node-0", "node-1", "node-2"):
        node(docker, volume, name, "disturbed")
    wait_for_step(docker, volume / "disturbed", 25, "node-0", "node-1", "node-2")
    docker("kill", "node-0")
    wait_for_step(docker, volume / "disturbed", 60, "node-1", "node-2")
    node(docker, volume, "node-3", "disturbed")
    wait_for_step(docker, volume / "disturbed", 90, "node-1", "node-2", "node-3")
    docker("stop", "--time", "60", "node-1")
    assert ended(docker, "node-1") == 0, log_of(docker, "node-1")
    assert [ended(docker, name) for name in ("node-2", "node-3")] == [0, 0], log_of(
        docker, "node-2", "node-3"
    )
    assert ended(docker, "node-0") == 137
    assert digest(docker, volume, "disturbed") == digest(docker, volume, "calm")

    # The same run outside of any container: the same bits, if the platform is the same. Variables of this shell may choose other
    # kernels, so they are left out.
    outside = tomllib.loads((volume / "calm.toml").read_text())
    outside["run"]["url"], outside["data"]["url"] = str(volume / "outside"), str(volume / "data")
    (volume / "outside.toml").write_text(tomlkit.dumps(outside))
    command = [sys.executable, "-m", "elastic_pt", "local", str(volume / "outside.toml")]
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(volume), "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "--nodes", "2"], check=True, cwd=volume, env=bare, capture_output=True
    )
    inside = json.loads((volume / "calm" / "identity.json").read_text())
    here = json.loads((volume / "outside" / "identity.json").read_text())
    differs = {name for name in inside if inside[name] != here.get(name)}
    print(f"platform outside: {'the same' if not differs else f'differs in {differs}'}")
    if not differs:
        assert digest(docker, volume, "outside") == digest(docker, volume, "calm")


def test_all_nodes_lost(docker: Docker, volume: Path) -> None:
    """When every container is killed, new ones under another user id go on from the bucket's newest checkpoint."""
    prepare(docker, volume, "lost", "kept")
    for name in ("lost-0", "lost-1"):
        node(docker, volume, name, "lost", user=USERS[1])
    wait_for_step(docker, volume / "lost", 45, "lost-0", "lost-1")
    docker("kill", "lost-0", "lost-1")
    node(docker, volume, "lost-2", "lost", user=USERS[1])
    node(docker, volume, "kept-0", "kept")
    assert [ended(docker, name) for name in ("lost-2", "kept-0")] == [0, 0]
    assert digest(docker, volume, "lost") == digest(docker, volume, "kept")


def test_names_a_small_dev_shm(docker: Docker, volume: Path) -> None:
    """With Docker's 64 MB of /dev/shm and a model that does not fit, an agent says in one line what to change, and ends with 2."""
    prepare(docker, volume, "large")
    tree = tomllib.loads((volume / "large.toml").read_text())
    tree["model"].update(width=512, heads=8, layers=8)
    (volume / "large.toml").write_text(tomlkit.dumps(tree))
    docker(
        *("run", "--detach", "--name", "large", "--volume", f"{volume}:/runs", *HARDENED),
        *("--tmpfs", "/tmp", "--network", NETWORK, IMAGE, "run", "/runs/large.toml"),
    )
    assert ended(docker, "large") == 2
    (line,) = docker("logs", "large").splitlines()
    assert line.startswith("error: checkpoint.staging = '/dev/shm': ")
    assert line.endswith("expected a larger directory (docker: --shm-size)")


def files_of(docker: Docker) -> set[str]:
    """Path, time and SHA-256 of every file in the image; Docker itself writes a few in /etc."""
    command = "cd /; find opt usr var -xdev -type f -printf '%p %T@\\n'; find opt usr var -xdev -type f -exec sha256sum {} +"
    plain = ("run", "--rm", "--network", "none", "--user", "0", "--entrypoint", "sh")
    return set(docker(*plain, IMAGE, "-c", command).splitlines())


def test_same_input_gives_the_same_files(docker: Docker) -> None:
    """A second build without any cache has the same files, byte for byte, with the same times."""
    first = files_of(docker)
    containers.build(docker, containers.make_base(docker), "--no-cache")
    assert first ^ files_of(docker) == set()
    assert len(first) > 10_000
