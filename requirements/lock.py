"""Writes the lock: `constraints.txt` (versions) and `requirements/*.txt` (the same versions, with the hashes of their files).

`make lock` runs it. Versions stay as `constraints.txt` has them, unless `--upgrade` names packages, or names none: then all move
to the newest that `pyproject.toml` allows. uv resolves for Linux and every Python that the project supports.

    runtime.txt    what elastic-pt needs, without torch
    cuda.txt       the torch of the default index, with its CUDA libraries
    cpu.txt        or else the smaller torch for CPUs, from its own index: other files, other hashes (torch-cpu.sha256)
    dev.txt        what the extra `dev` adds; likewise gcs.txt, azure.txt, grafana.txt, wandb.txt
    image.txt      what the build of the image needs, in an environment of its own

None names an index: that is for the configuration of pip. `install.sh` installs them.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
CONSTRAINTS = ROOT / "constraints.txt"
HEADER = "# Exact versions that this release is tested with; pyproject.toml says which ranges work. Written by `make lock`.\n"
LOCK_HEADER = "# Written by `make lock`; requirements/install.sh installs it.\n"
# The torch of the default index, and what it brings besides; its CPU wheel does not.
CUDA = re.compile(r"torch|triton|cuda-.*|nvidia-(?!ml-py$).*")
# The environments of `tool.uv`: uv repeats their marker on each line.
EVERYWHERE = " ; python_full_version < '3.15' and sys_platform == 'linux'"
FIRST_OF_BLOCK = re.compile(r"(?=^\S)", re.MULTILINE)


def compiled(arguments: Iterable[str], constraints: str) -> dict[str, str]:
    """uv's resolution of what the arguments name: each requirement's text with its hashes, by package name."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--universal"]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--quiet", *arguments]
    command += ["--python-version", "3.11", "--constraints", "-"]
    result = subprocess.run(command, cwd=ROOT, input=constraints, text=True, stdout=subprocess.PIPE)
    if result.returncode:
        sys.exit("lock: uv could not resolve pyproject.toml, see above")
    blocks = [
        block
        for block in FIRST_OF_BLOCK.split(result.stdout.replace(EVERYWHERE + " \\\n", " \\\n"))
        if block.strip()
    ]
    return {block.partition("==")[0].partition("[")[0]: block for block in blocks}


def cpu_torch(torch: str) -> str:
    """The requirement of the CPU wheels that torch-cpu.sha256 names, of the same version as `torch`."""
    version = torch.partition(" ")[0].removeprefix("torch==")
    hashes = []
    for line in (HERE / "torch-cpu.sha256").read_text().splitlines():
        if line.startswith("#"):
            continue
        sha256, _, name = line.partition("  ")
        if not name.startswith(f"torch-{version}+cpu-"):
            sys.exit(f"lock: torch-cpu.sha256: {name}: expected a wheel of torch {version}+cpu")
        hashes.append(f"--hash=sha256:{sha256}")
    return " \\\n    ".join([f"torch=={version}+cpu", *sorted(hashes)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write constraints.txt and requirements/*.txt.")
    parser.add_argument("--upgrade", nargs="*", metavar="PACKAGE", help="all, if none is named")
    upgrade = parser.parse_args().upgrade

    pins = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    if upgrade is not None:
        pins = [pin for pin in pins if upgrade and pin.partition("==")[0] not in upgrade]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = list(project["project"]["optional-dependencies"])

    everything = compiled(["pyproject.toml", "--all-extras", "--group", "image"], "\n".join(pins))
    versions = [block.partition(" \\\n")[0] for block in everything.values()]
    # Markers stay in the lock: a constraint is about a version only.
    constraints = "".join(f"{version.partition(' ;')[0]}\n" for version in versions)
    if len(set(everything)) != len(constraints.splitlines()):
        sys.exit("lock: a package has two versions; constrain it in constraints.txt")
    CONSTRAINTS.write_text(HEADER + constraints)

    runtime = compiled(["pyproject.toml"], constraints)
    cuda = {name: block for name, block in runtime.items() if CUDA.fullmatch(name)}
    files = {"cuda": cuda, "image": compiled(["--group", "pyproject.toml:image"], constraints)}
    for extra in extras:
        added = compiled(["pyproject.toml", "--extra", extra], constraints)
        files[extra] = {name: block for name, block in added.items() if name not in runtime}
    files["runtime"] = {name: block for name, block in runtime.items() if name not in cuda}
    files["cpu"] = {"torch": cpu_torch(runtime["torch"])}
    for name, blocks in files.items():
        (HERE / f"{name}.txt").write_text(LOCK_HEADER + "".join(blocks.values()))
        print(f"requirements/{name}.txt: {len(blocks)} packages")


if __name__ == "__main__":
    main()
