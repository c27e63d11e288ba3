"""Prints the requirements that `wheels.sh` downloads, one `name==version` a line.

These are the dependencies in pyproject.toml and all dependencies of the installed distributions, for Python 3.12. The
versions come from constraints.txt.
"""

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

_LEFT_OUT: Final = {"torch", "pyarrow", "matplotlib", "tokenizers", "tensorboard"}
"""torch is already installed. The benchmark does not need the others: Parquet files, plots, tokenizers, TensorBoard."""
_TARGET: Final = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
_CHECKOUT: Final = Path(__file__).resolve().parents[2]


def normal(name: str) -> str:
    """The normal form of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed() -> set[str]:
    """Names of all distributions that elastic-pt requires."""
    found: set[str] = set()
    # Not the installed metadata of elastic-pt itself, which may be older than pyproject.toml.
    waiting = dependencies()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = normal(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate(_TARGET)
        if wanted and name not in found | _LEFT_OUT:
            found.add(name)
            waiting += metadata.requires(name) or ()
    return found


def dependencies() -> list[str]:
    """The requirements that pyproject.toml lists."""
    project = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["dependencies"])


def main() -> None:
    """Print the list."""
    lines = (_CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normal(line.partition("==")[0]): line for line in lines if "==" in line}
    print("\n".join(sorted(pinned[name] for name in needed())))


if __name__ == "__main__":
    main()
