"""The player of a scenario, without processes."""

from pathlib import Path
from typing import Any

from elastic_pt.chaos.play import Player
from elastic_pt.chaos.scenario import Scenario
from elastic_pt.chaos.scrape import Counters
from elastic_pt.runlog.log import RunView
from elastic_pt.runlog.records import COMPLETED, Stop


class EndsAtOnce:
    """An arena whose node ends as soon as it is started. The second one has completed the run."""

    def __init__(self, config: Any, directory: Path, nodes: list[str], **_: Any) -> None:
        self.nodes = nodes
        self.counters = Counters()
        self.started: list[str] = []
        self.run = self
        self.lives: list[Any] = []

    def __enter__(self) -> "EndsAtOnce":
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, node: str) -> None:
        self.started.append(node)

    def running(self) -> list[str]:
        return []

    def gone(self) -> set[str]:
        return set(self.started)

    def look(self) -> None: ...

    def view(self) -> RunView:
        return RunView(stop=Stop(COMPLETED, 48) if len(self.started) > 1 else None)

    def statuses(self) -> list[Any]:
        return []

    def events(self, *_: str) -> list[Any]:
        return []

    def exit_codes(self) -> dict[str, int]:
        return {}

    def leftovers(self, _: list[str]) -> tuple[str, ...]:
        return ()


def test_a_pool_replaces_the_last_node_before_anybody_has_looked(tmp_path: Path) -> None:
    """The run is not over because no node runs and none is due to start yet."""
    scenario = Scenario(
        name="pool",
        hypothesis="The pool starts the only node anew.",
        nodes=1,
        store="directory",
        replace_after_s=0.01,
        longest_s=20.0,
    )
    config = scenario.run_config(f"file://{tmp_path}/run", f"file://{tmp_path}/d")
    arena: Any = EndsAtOnce
    player = Player(scenario, 1, config, tmp_path, network=False, arena=arena)
    played = player.play()
    assert not played.timed_out
    assert [each.what for each in played.happenings] == ["ended", "started", "stop"]
