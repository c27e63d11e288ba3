"""A run seen from outside: its log, what its agents answer, and the events that they wrote. Any process."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

from elastic_pt.config import Config
from elastic_pt.membership.asking import ask_status
from elastic_pt.membership.decision.status import NodeStatus
from elastic_pt.runlog.access import Access, read_access
from elastic_pt.runlog.control import ask
from elastic_pt.runlog.log import RunLog, RunView
from elastic_pt.runlog.records import Generation, Member, Record, Request, Verb
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

_STATUS_TIMEOUT_S: Final = 1.0
_TAIL_LINES: Final = 12


class WatchedRun:
    """One run, whose agents write their output to `<directory>/<node>.log`."""

    def __init__(self, config: Config, directory: Path) -> None:
        self.config = config
        self.directory = directory
        self.store: Store = open_store(config.run.url)
        self.ask_from: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered around each question to an agent: the agents may be on another network than this process."""
        self._log = RunLog(self.store, writer="chaos")
        self._access: Access | None = None

    def view(self) -> RunView:
        """The run's log up to its end."""
        return self._log.refresh()

    def request(self, verb: Verb, node: str = "") -> None:
        """Record what an operator asks of the run, as `elastic-pt pause` and its like do."""
        wanted = Request(verb, by="chaos", node=node)
        self._log.append(lambda view: ask(view, wanted), generation=self.view().generation_number)

    def records(self) -> list[Record]:
        """All records of the log."""
        return list(self._log.records())

    def generation(self) -> Generation:
        """The newest generation, which must exist."""
        generation = self.view().generation
        assert generation is not None
        return generation

    def statuses(self) -> list[NodeStatus]:
        """The statuses that the members of the newest generation report; members that do not answer are left out."""
        generation = self.view().generation
        members = () if generation is None else generation.members
        return [status for each in members if (status := self._ask(each)) is not None]

    def _ask(self, member: Member) -> NodeStatus | None:
        if self._access is None:
            self._access = read_access(self.store, "chaos", tls=self.config.elastic.tls)
        with self.ask_from():
            return ask_status([member], self._access, _STATUS_TIMEOUT_S).get(member.incarnation)

    def step(self) -> int:
        """The newest step that a member of the newest generation has done."""
        return max((status.step for status in self.statuses()), default=0)

    def all_events(self, node: str) -> list[dict[str, Any]]:
        """The structured events that a node's agents wrote, in order."""
        path = self.directory / f"{node}.log"
        if not path.exists():
            return []
        *lines, _ = path.read_text(errors="replace").split("\n")
        return [json.loads(line) for line in lines if line.startswith("{")]

    def events(self, node: str, name: str) -> list[dict[str, Any]]:
        """Those of one name."""
        return [event for event in self.all_events(node) if event["event"] == name]

    def log_tails(self) -> str:
        """The end of each node's log."""
        return "\n".join(
            f"--- {path.name}\n"
            + "\n".join(path.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
            for path in sorted(self.directory.glob("*.log"))
        )
