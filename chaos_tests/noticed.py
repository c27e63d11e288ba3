"""Nodes that get notices of their platform: a metadata server for each node, and what the notice cost the run.

begin ─► nodes, each with a source of its own ─► until_phase ─► Source.notice ─► finish ─► lost_steps
"""

import json
import re
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from chaos_tests.conftest import StartScenario
from chaos_tests.scenario import Scenario
from elastic_pt.report.change import as_json
from elastic_pt.report.explanation import explain
from tests.notices.servers import (
    PREEMPTED,
    REBALANCE,
    AzureMetadata,
    Cloud,
    GcpMetadata,
    Imds,
    scheduled,
)

STEP: Final = 9
"""The step after which a node in the midst of training gets its notice."""
_ANSWER_S: Final = 5.0


class Source(Protocol):
    """A source of notices for one node."""

    setting: str
    """Its name in `elastic.notices`."""

    def notice(self, lead_s: float) -> None:
        """Announce that the machine will be taken away."""

    def withdraw(self) -> None:
        """Cancel that."""


class Aws:
    """AWS's metadata service. The agent reads it every two seconds."""

    def __init__(self, server: Imds) -> None:
        self._server = server
        self.setting = f"aws:{server.url}"

    def notice(self, lead_s: float) -> None:
        """A spot interruption."""
        self._server.interrupt("terminate", lead_s)

    def advise(self) -> None:
        """A rebalance recommendation: the instance may be interrupted."""
        self._server.tell(documents={REBALANCE: '{"noticeTime": "2026-11-27T13:00:00Z"}'})

    def withdraw(self) -> None:
        """No document any more."""
        self._server.tell(documents={})


class Gcp:
    """Google Cloud's metadata server. It answers at once; the lead is always 30 seconds."""

    def __init__(self, server: GcpMetadata) -> None:
        self._server = server
        self.setting = f"gcp:{server.url}"

    def notice(self, lead_s: float) -> None:
        """The Spot VM is preempted."""
        assert lead_s == 30.0
        self._server.tell(values=self._server.values | {PREEMPTED: "TRUE"})

    def withdraw(self) -> None:
        """It is not."""
        self._server.tell(values=self._server.values | {PREEMPTED: "FALSE"})


class Azure:
    """Azure's scheduled events. The agent reads them every second."""

    def __init__(self, server: AzureMetadata) -> None:
        self._server = server
        self.setting = f"azure:{server.url}"

    def notice(self, lead_s: float) -> None:
        """A Spot VM is evicted within 30 seconds, a machine of a scale set is deleted within 15 minutes."""
        kind = "Preempt" if lead_s <= 30.0 else "Terminate"
        self._server.schedule(scheduled(kind, self._server.name, "another", lead_s=lead_s))

    def withdraw(self) -> None:
        """No event any more."""
        self._server.schedule()


class File:
    """A file, which the agent reads every half second."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.setting = f"file:{path}"

    def notice(self, lead_s: float) -> None:
        """Write it."""
        part = self._path.with_suffix(".part")
        part.write_text(f"kind: preempt\nlead_s: {lead_s}\n")
        part.rename(self._path)

    def withdraw(self) -> None:
        """Remove it."""
        self._path.unlink()


@contextmanager
def source(kind: str, node: str, folder: Path) -> Iterator[Source]:
    """A source of this kind for one node; its server answers until the end of the block."""
    if kind in ("file", "off"):
        yield File(folder / f"notice-{node}")
        return
    aws, gcp, azure = Imds(), GcpMetadata(), AzureMetadata(node)
    clouds: dict[str, tuple[Cloud, Source]] = {
        "aws": (aws, Aws(aws)),
        "gcp": (gcp, Gcp(gcp)),
        "azure": (azure, Azure(azure)),
    }
    server, found = clouds[kind]
    with server.serving():
        yield found


@dataclass(frozen=True)
class Noticed:
    """A run whose nodes can get notices."""

    run: Scenario
    sources: Mapping[str, Source]

    def notice(self, lead_s: float, *nodes: str) -> None:
        """All these nodes get a notice."""
        for node in nodes:
            self.sources[node].notice(lead_s)

    def until_noticed(self, *nodes: str) -> None:
        """Wait until each of these agents has decided how to leave."""
        for node in nodes:
            self.run.until(f"{node} is noticed", partial(self.event, node, "leave_planned"))

    def event(self, node: str, name: str) -> bool:
        """Whether a node has written an event."""
        return bool(self.run.events(node, name))

    def until_phase(self, phase: str, node: str, nodes: int) -> None:
        """Wait until a node is in the midst of a phase, in a run of so many nodes."""
        run = self.run
        match phase:
            case "start":
                run.until(phase, lambda: self.event(node, "workers_start"))
            case "first step":
                run.until(phase, lambda: self._seconds(node, "restore") > 0.0)
            case "restore":
                # Another node is lost, so the workers read a state.
                run.until_step(STEP, nodes)
                before_s = self._seconds(node, "restore")
                victim = next(each for each in self.sources if each != node)
                run.fleet.kill(victim)
                run.until(phase, lambda: self._seconds(node, "restore") > before_s)
            case "step":
                run.until_step(STEP, nodes)
            case "save":
                run.until_step(2, nodes)
                run.until(phase, self._is_saving)
            case "import":
                pass

    def _is_saving(self) -> bool:
        attempts = {key.rsplit("/", 1)[0] for key in self.run.store.keys("ckpt/")}
        return bool(attempts - {each.directory for each in self.run.view().checkpoints})

    def _seconds(self, node: str, state: str) -> float:
        urls = [each.metrics_url for each in self.run.statuses() if each.member.node == node]
        line_of = re.compile(rf'elastic_pt_time_seconds_total{{.*state="{state}"}} (.*)')
        for url in urls:
            with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer:
                for line in answer.read().decode().splitlines():
                    if found := line_of.match(line):
                        return float(found[1])
        return 0.0

    def lost_steps(self, *nodes: str) -> list[int | None]:
        """The steps that each change of members because of these nodes cost, as `log --explain --json` has them."""
        found: list[dict[str, Any]] = [
            json.loads(json.dumps(as_json(each), default=str))
            for each in explain(self.run.records())
        ]
        return [
            each["lost_steps"]
            for each in found
            if each["kind"] == "change" and {cause["node"] for cause in each["causes"]} & {*nodes}
        ]


@contextmanager
def begun(
    start: StartScenario, folder: Path, nodes: Mapping[str, str], *overrides: str
) -> Iterator[Noticed]:
    """A run of these nodes, each with a source of the named kind, and a snapshot of every step."""
    with ExitStack() as stack:
        sources = {
            node: stack.enter_context(source(kind, node, folder)) for node, kind in nodes.items()
        }
        run = start(
            f"elastic.nodes_max={len(nodes)}", "checkpoint.snapshot_every_steps=1", *overrides
        )
        for node, each in sources.items():
            run.fleet.start(node, settings=[f'elastic.notices=["{each.setting}"]'])
        yield Noticed(run, sources)
