"""What can be told of the image from its Dockerfile alone."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

from elastic_pt import __version__

ROOT = Path(__file__).parents[2]
TEXT = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
INSTRUCTIONS = [
    (name, rest)
    for name, _, rest in (line.partition(" ") for line in TEXT.splitlines())
    if name.isupper()
]


def values(name: str) -> list[str]:
    """The arguments of every instruction of one kind."""
    return [rest for found, rest in INSTRUCTIONS if found == name]


def test_two_stages_from_a_base_that_can_be_chosen() -> None:
    """What builds is left behind, and the base image is an argument."""
    assert INSTRUCTIONS[0] == ("ARG", "PYTHON_IMAGE=python:3.12-slim-bookworm")
    assert values("FROM") == ["${PYTHON_IMAGE} AS base", "base AS build", "base"]
    last_stage = INSTRUCTIONS[
        max(i for i, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM") :
    ]
    assert [rest for name, rest in last_stage if name == "COPY"] == [
        "--from=build /opt/venv /opt/venv",
        "--from=build /usr/share/elastic-pt /usr/share/elastic-pt",
    ]
    assert not [name for name, _ in last_stage if name in ("RUN", "ADD")]


def test_runs_as_a_numbered_user_that_is_not_root() -> None:
    """Kubernetes can tell from the number that it is not root; nothing is installed after the switch."""
    assert values("USER") == ["10001:10001"]
    after = [name for name, _ in INSTRUCTIONS[INSTRUCTIONS.index(("USER", "10001:10001")) + 1 :]]
    assert not {"RUN", "COPY", "ADD"} & set(after)


def test_starts_the_agent_under_tini_without_a_shell() -> None:
    """Signals reach the agent: an init that forwards them, and no shell between."""
    (entrypoint,), (command,) = values("ENTRYPOINT"), values("CMD")
    assert json.loads(entrypoint) == ["/usr/bin/tini", "--", "elastic-pt"]
    assert json.loads(command) == ["--help"]


def test_output_is_unbuffered_and_home_is_writable() -> None:
    """Events show at once, and caches of libraries go to /tmp, which is writable with a read-only root."""
    environment = " ".join(values("ENV"))
    assert "PYTHONUNBUFFERED=1" in environment
    assert "HOME=/tmp" in environment


def test_labels_follow_the_image_specification() -> None:
    """Title, licence, version, revision, source and time are OCI labels; the version is that of the package."""
    labels = " ".join(values("LABEL"))
    names = ("title", "description", "licenses", "version", "revision", "created", "source")
    for name in names:
        assert f"org.opencontainers.image.{name}=" in labels
    assert f"VERSION={__version__}" in values("ARG")


def test_names_no_index_and_needs_no_particular_builder() -> None:
    """Where packages come from is an argument, and every instruction is one that Docker's first builder knows too."""
    assert {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "TORCH", "EXTRAS="} <= set(values("ARG"))
    assert "://" not in "\n".join(rest for _, rest in INSTRUCTIONS)
    assert not [rest for rest in values("RUN") if rest.startswith("--")]
    assert not values("HEALTHCHECK")


def test_context_holds_what_is_copied_and_nothing_else() -> None:
    """`.dockerignore` lets in exactly the files that the build copies, and each of them exists."""
    copied = {
        source.removeprefix("./")
        for rest in values("COPY")
        if "--from" not in rest
        for source in rest.split()[:-1]
    }
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in patterns
    allowed = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert allowed == copied
    assert all((ROOT / name).exists() for name in copied)
    assert any(
        fnmatch("elastic_pt/__pycache__", pattern.replace("**", "*")) for pattern in patterns
    )
