"""Nodes of two versions of elastic_pt in one run: who is refused, and what it is told."""

from itertools import count, repeat
from pathlib import Path

import pytest

from elastic_pt import __version__
from elastic_pt.agent import start
from elastic_pt.errors import ConfigError
from elastic_pt.membership import pulse
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Generation, Member, Stop
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

MEMBER = Member("node-0", "0123", "10.0.0.1", 9000, 1, 1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A run directory."""
    return open_store(f"file://{tmp_path}")


def log_of(store: Store, release: str, *, stopped: bool = False) -> RunView:
    """A log with one generation of this version."""
    log = RunLog(store, writer="node-0")
    generation = Generation(1, (MEMBER,), (8,), "10.0.0.1", 1, None, "started", release=release)
    log.append(lambda _: generation, generation=0)
    if stopped:
        log.append(lambda _: Stop("completed", 5), generation=1)
    return log.refresh()


def beats(monkeypatch: pytest.MonkeyPatch, *, alive: bool) -> None:
    """The pulse changes with each look, or stays."""
    pulses = map(str, count()) if alive else repeat("1")
    monkeypatch.setattr(pulse.Pulse, "feel", lambda _: next(pulses).encode())
    monkeypatch.setattr(pulse, "_LOOK_AGAIN_S", 0.001)


@pytest.mark.parametrize("release", ["", "0.0.1"])
def test_a_node_of_another_version_than_the_members_is_refused(
    release: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has both versions and the remedy. Records of the first version name none."""
    beats(monkeypatch, alive=True)
    theirs = release or "an earlier version"
    with pytest.raises(ConfigError, match=rf"^elastic_pt {__version__}: .* by {theirs} now .*expe"):
        start.require_one_release(store, log_of(store, release), 5.0)


@pytest.mark.parametrize(
    ("release", "stopped", "alive"),
    [(__version__, False, True), ("0.0.1", True, True), ("0.0.1", False, False)],
    ids=["same version", "the run has ended", "its members are gone"],
)
def test_an_upgrade_is_no_mixture(
    release: str, stopped: bool, alive: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may go on with another version once no node of the one before trains."""
    beats(monkeypatch, alive=alive)
    start.require_one_release(store, log_of(store, release, stopped=stopped), 0.05)


def test_a_generation_names_its_version(store: Store) -> None:
    """It is in the stored record, where later versions find it."""
    view = log_of(store, __version__)
    assert view.generation is not None
    assert view.generation.release == __version__
