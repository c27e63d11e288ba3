"""What is found on the machines of a run, and in its directory."""

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import elastic_pt
from elastic_pt.chaos.leftovers import Places, left_by, unfinished_in
from elastic_pt.chaos.mounts import (
    below,
    hidden,
    missing_for_mounts,
    of_the_program,
    prefix_for_mounts,
)
from elastic_pt.config import parse_config
from elastic_pt.store.local import UNFINISHED, LocalStore

SHARED = [Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")]


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    """Those of a run in the test's directory."""
    text = f'[run]\nurl = "file://{tmp_path}/run"\n[data]\nurl = "file://{tmp_path}/data"\n'
    made = Places(f"test-{uuid.uuid4().hex[:8]}", parse_config(text, source="test"), tmp_path)
    yield made
    made.close()


def test_a_node_has_directories_of_its_own(places: Places) -> None:
    """They are empty; its configuration and its variables lead there."""
    overrides, variables = places.settings("node-0")
    places.prefix("node-0")
    assert overrides[0] == f"checkpoint.staging={places.staging('node-0')}"
    assert list(Path(variables["HOME"]).iterdir()) == []
    assert list(places.current("node-0").iterdir()) == []
    assert places.held_by("node-0") == []
    assert places.held_by("node-1") == []


def test_whatever_is_left_is_told(places: Places) -> None:
    """In memory, in the home directory and in the current one. That of another node is not this one's."""
    _, variables = places.settings("node-0")
    places.settings("node-1")
    places.prefix("node-0")
    left = [
        places.staging("node-0") / "state",
        Path(variables["HOME"]) / ".cache",
        places.current("node-0") / "core",
    ]
    for each in left:
        each.touch()
    assert set(places.held_by("node-0")) == {str(left[0]), "home/.cache", "current/core"}
    assert left_by("no such mark", places, ["node-1"]) == ()
    assert len(left_by("no such mark", places, ["node-0", "node-1"])) == 3


def test_a_process_without_the_environment_is_told(places: Places) -> None:
    """It stands in the current directory of a node. `close` ends it."""
    places.settings("node-0")
    left = subprocess.Popen(["sleep", "60"], cwd=places.current("node-0"), env={})
    assert left_by("no such mark", places, []) == (f"process {left.pid}",)
    places.close()
    assert left.wait(10.0) < 0


def test_what_must_stay_reachable_hides_nothing() -> None:
    """A shared directory inside of it is left as it is; only the outermost ones are mounted."""
    shared = [each.resolve() for each in SHARED if each.is_dir()]
    assert hidden([Path("/dev/shm/run")]) == list(dict.fromkeys(shared))
    assert Path("/tmp").resolve() not in hidden([Path("/tmp").resolve()])
    assert hidden([Path("/")]) == []
    kept = [Path(each) for each in ("/tmp/a/b", "/tmp/a", "/tmp/c/d", "/home")]
    assert below(Path("/tmp"), kept) == [Path("a"), Path("c/d")]


@pytest.mark.skipif(bool(missing_for_mounts()), reason="mounts need root")
def test_a_node_sees_its_own_shared_directories(places: Places, tmp_path: Path) -> None:
    """What it leaves there is found; what it writes to the run's directory is there."""
    _, variables = places.settings("node-0")
    name = places.directory.name
    script = f"ls /tmp /var/tmp /dev/shm; touch $TMPDIR/{name} /dev/shm/{name}.left {tmp_path}/kept"
    done = subprocess.run(
        [*places.prefix("node-0"), "sh", "-c", script],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not Path("/dev/shm", f"{name}.left").exists()
    assert not Path("/tmp", name).exists()
    assert sorted(places.held_by("node-0")) == [f"/dev/shm/{name}.left", f"/tmp/{name}"]
    assert (tmp_path / "kept").exists()
    assert done.stdout.split().count(name) == 1


def test_semaphores_of_a_killed_agent_are_removed(places: Places) -> None:
    """They have the name of its directory. Where nodes have no shared memory of their own, they are in that of all."""
    places.settings("node-0")
    scratch = places.staging("node-0") / f"elastic_pt-{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    semaphore = Path("/dev/shm", f"sem.{scratch.name}-a")
    semaphore.touch()
    places.close()
    assert not semaphore.exists()
    assert not places.directory.exists()


def test_a_prefix_keeps_the_directories_of_the_node_until_last() -> None:
    """The shared directory that they are in is mounted over at the end."""
    own = {Path("/dev/shm"): Path("/dev/shm/x/shm"), Path("/tmp"): Path("/dev/shm/x/tmp")}
    script = prefix_for_mounts(own, [])[-2]
    assert script.index("x/tmp /tmp") < script.index("x/shm /dev/shm")


@pytest.mark.parametrize("name", [f"{UNFINISHED}/abc", "log/1.json.part"])
def test_files_that_nobody_finishes(name: str, tmp_path: Path) -> None:
    """They are objections if they were begun after the last fault."""
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.touch()
    store = LocalStore(f"file://{tmp_path}/run")
    began_s = path.stat().st_mtime
    assert set(unfinished_in(store, tmp_path, began_s - 60.0)) == {str(path)}
    assert list(unfinished_in(store, tmp_path, began_s)) == []


def test_without_root_a_node_has_its_own_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mounts: the shared directories are those of the machine, and only `TMPDIR` is the node's."""
    monkeypatch.setattr("elastic_pt.chaos.leftovers.missing_for_mounts", lambda: "which need root")
    text = f'[run]\nurl = "file://{tmp_path}/run"\n[data]\nurl = "file://{tmp_path}/data"\n'
    places = Places(f"test-{uuid.uuid4().hex[:8]}", parse_config(text, source="test"), tmp_path)
    try:
        _, variables = places.settings("node-0")
        assert places.prefix("node-0") == []
        Path(variables["TMPDIR"], "left").touch()
        assert places.held_by("node-0") == ["temporary/left"]
    finally:
        places.close()


def test_an_editable_installation_stays_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on no path of the interpreter, and may be below `/tmp`."""
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert Path(elastic_pt.__file__).parents[1] in of_the_program()
