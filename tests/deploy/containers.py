"""Docker for the tests of the image: a daemon of their own, a base image that needs no registry, and the built image.

Needs root and Debian's `docker.io` and `debootstrap`. The daemon has its own socket and directories below `services/image`, sets no
firewall rules and no bridge of its own, and ends with the session. Base image and build cache stay for the next session.
"""

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Docker takes no symbolic link for its data.
HOME = (ROOT / "services").resolve() / "image"
IMAGE = "elastic-pt:try"
PACKAGES = {"/usr/sbin/dockerd": "docker.io", "/usr/sbin/debootstrap": "debootstrap"}
# The base has what an official slim Python image has: Python with venv and pip, certificates, no documentation.
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
UNUSED = (
    "var/cache/apt",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
)


def missing() -> list[str]:
    """Packages that are not installed, and `root` where this is another user."""
    found = [package for path, package in PACKAGES.items() if not Path(path).exists()]
    return found if os.geteuid() == 0 else ["root", *found]


@dataclass(frozen=True)
class Docker:
    """A client of one daemon."""

    socket: Path

    def __call__(self, *arguments: str | Path, check: bool = True, **options: Any) -> str:
        """Run one command; its standard output and error, in order."""
        # Debian's client matches its daemon; another one may lie before it on the path.
        result = subprocess.run(
            ["/usr/bin/docker", *map(str, arguments)],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        if check:
            assert result.returncode == 0, (
                f"docker {' '.join(map(str, arguments))}\n{result.stdout}"
            )
        return result.stdout

    def environment(self) -> dict[str, str]:
        return {**os.environ, "DOCKER_HOST": f"unix://{self.socket}", "DOCKER_BUILDKIT": "1"}


def start_daemon(directory: Path) -> tuple[Docker, subprocess.Popen[bytes]]:
    """A daemon whose socket is in `directory`. The caller ends it with `stop_daemon`."""
    HOME.mkdir(parents=True, exist_ok=True)
    docker = Docker(directory / "docker.sock")
    log = (directory / "dockerd.log").open("wb")
    command = ["dockerd", "--iptables=false", "--bridge=none", "--host", f"unix://{docker.socket}"]
    command += ["--data-root", str(HOME / "docker"), "--exec-root", str(directory / "exec")]
    command += ["--pidfile", str(HOME / "docker.pid")]
    daemon = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    deadline_s = time.monotonic() + 60
    while daemon.poll() is None and time.monotonic() < deadline_s:
        if docker.socket.exists() and "Server Version" in docker("info", check=False):
            return docker, daemon
        time.sleep(0.1)
    daemon.kill()
    raise AssertionError(f"dockerd did not start:\n{(directory / 'dockerd.log').read_text()}")


def stop_daemon(directory: Path, daemon: subprocess.Popen[bytes]) -> None:
    """End a daemon of `start_daemon`, and undo the mounts that it leaves behind."""
    daemon.terminate()
    daemon.wait(60)
    for mounted in (directory / "exec" / "netns" / "default", HOME / "docker"):
        subprocess.run(["umount", "--lazy", mounted], check=False, stderr=subprocess.DEVNULL)


def make_base(docker: Docker) -> str:
    """The name of a base image with Debian's Python, made by debootstrap if it is not there yet."""
    name = "elastic-pt-base:bookworm"
    if docker("image", "ls", "--quiet", name).strip():
        return name
    tree = HOME / "base"
    shutil.rmtree(tree, ignore_errors=True)
    command = [
        "debootstrap",
        "--variant=minbase",
        f"--include={BASE_PACKAGES}",
        "bookworm",
        str(tree),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for path in UNUSED:
        for each in (tree / path).iterdir():
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
    with subprocess.Popen(["tar", "-C", str(tree), "-c", "."], stdout=subprocess.PIPE) as tar:
        docker("import", "-", name, stdin=tar.stdout)
    shutil.rmtree(tree)
    return name


def build(docker: Docker, base: str, *arguments: str) -> None:
    """Build the image from this checkout, as `make image` does, from the files that `make wheels` has fetched."""
    # Debian's packages come over the network of the host; a bridge without firewall rules leads nowhere.
    command = ["sh", "deploy/image/build.sh", "--network", "host", *arguments]
    result = subprocess.run(
        [*command, "--build-arg", f"PYTHON_IMAGE={base}"],
        cwd=ROOT,
        env={**docker.environment(), "DOCKER": "/usr/bin/docker", "IMAGE": IMAGE},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
