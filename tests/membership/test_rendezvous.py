"""The rendezvous for stock torchrun: a generation of the log, and a new one when the members change."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousInfo,
    RendezvousParameters,
)

from elastic_pt.errors import ConfigError
from elastic_pt.membership.rendezvous import TorchrunRendezvous, create_handler
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import CauseKind, Generation, Stop
from elastic_pt.store.open import open_store
from tests.membership.test_node import DEADLINE_S, eventually


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., TorchrunRendezvous]]:
    """Starts handlers of one run, as an agent of torchrun does, and shuts them down at the end."""
    with ExitStack() as stack:

        def make(node: str, *, nodes_min: int = 1, run_id: str = "job") -> TorchrunRendezvous:
            handler = create_handler(
                RendezvousParameters(
                    "elastic_pt",
                    str(tmp_path),
                    run_id,
                    nodes_min,
                    4,
                    local_addr="127.0.0.1",
                    node=node,
                    join_window_s="0.3",
                )
            )
            assert isinstance(handler, TorchrunRendezvous)
            stack.callback(handler.shutdown)
            return handler

        yield make


def entered(*handlers: TorchrunRendezvous) -> list[RendezvousInfo]:
    """The next rendezvous of each handler, in parallel, as their agents do."""
    found: dict[int, RendezvousInfo] = {}

    def enter(index: int, handler: TorchrunRendezvous) -> None:
        found[index] = handler.next_rendezvous()

    threads = [
        threading.Thread(target=enter, args=each, daemon=True) for each in enumerate(handlers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), f"no rendezvous after {DEADLINE_S} s"
    return [found[index] for index in range(len(handlers))]


def generations(directory: Path) -> list[Generation]:
    """All generations of the log."""
    log = RunLog(open_store(f"file://{directory}"), writer="test")
    return [each.body for each in log.records() if isinstance(each.body, Generation)]


def test_agents_get_ranks_and_a_new_store(
    start: Callable[..., TorchrunRendezvous], tmp_path: Path
) -> None:
    """All agents of a generation share a new store, each with its rank. The log names them."""
    worlds = entered(start("a", nodes_min=2), start("b", nodes_min=2))
    assert [(each.rank, each.world_size) for each in worlds] == [(0, 2), (1, 2)]
    worlds[0].store.set("greeting", "hello")
    assert worlds[1].store.get("greeting") == b"hello"
    (generation,) = generations(tmp_path)
    assert [each.node for each in generation.members] == ["a", "b"]
    assert worlds[1].bootstrap_store_info.master_port == generation.store_port
    assert generation.slots == ()


def test_newcomer_starts_another_rendezvous(
    start: Callable[..., TorchrunRendezvous], tmp_path: Path
) -> None:
    """Agents see that a node waits, and have a new rendezvous with it. This is not a failure of a node."""
    a = start("a")
    entered(a)
    assert a.num_nodes_waiting() == 0
    b = start("b")
    eventually(lambda: a.num_nodes_waiting() > 0, "a sees that a node waits")
    worlds = entered(a, b)
    assert [(each.rank, each.world_size) for each in worlds] == [(0, 2), (1, 2)]
    kinds = {cause.kind for cause in generations(tmp_path)[-1].causes}
    assert CauseKind.JOINED in kinds
    assert not kinds & {CauseKind.FAILED, CauseKind.LOST}


def test_lost_node_starts_another_rendezvous(start: Callable[..., TorchrunRendezvous]) -> None:
    """When an agent is gone, the others see that a new rendezvous is due, and continue without it."""
    a, b = start("a", nodes_min=2), start("b", nodes_min=2)
    entered(a, b)
    c = start("c")
    eventually(lambda: b.num_nodes_waiting() > 0, "b sees that a node waits")
    entered(a, b, c)
    a.shutdown()
    eventually(lambda: b.num_nodes_waiting() > 0, "b sees that a is gone")
    assert [each.world_size for each in entered(b, c)] == [2, 2]


def test_failures_of_stock_workers_do_not_end_the_run(
    start: Callable[..., TorchrunRendezvous], tmp_path: Path
) -> None:
    """torchrun limits the failures of workers (--max-restarts), because the log does not have their progress."""
    a = start("a")
    for _ in range(23):
        entered(a)
    found = generations(tmp_path)
    assert len(found) == 23
    assert {cause.kind for each in found[1:] for cause in each.causes} == {CauseKind.FAILED}
    assert not a.is_closed()


def test_the_end_of_the_run_closes_the_rendezvous(
    start: Callable[..., TorchrunRendezvous], tmp_path: Path
) -> None:
    """Only a STOP in the log closes it. One agent that closes does not."""
    a = start("a")
    entered(a)
    a.set_closed()
    assert not a.is_closed()
    log = RunLog(open_store(f"file://{tmp_path}"), writer="x")
    log.append(lambda _: Stop("enough", 0), generation=1)
    a._node.notice_log()
    b = start("b")
    with pytest.raises(RendezvousClosedError, match="enough"):
        b.next_rendezvous()
    assert b.is_closed()


def test_agents_of_another_job_or_torch_are_refused(
    start: Callable[..., TorchrunRendezvous], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--rdzv-id and torch's version must be equal. The error names the one that differs, with both values."""
    entered(start("a"))
    with pytest.raises(ConfigError, match="torchrun --rdzv-id = 'other', where the run has 'job'"):
        start("b", run_id="other").next_rendezvous()
    running = torch.__version__
    monkeypatch.setattr(torch, "__version__", "0.1")
    with pytest.raises(
        ConfigError, match=re.escape(f"torch = '0.1', where the run has '{running}'")
    ):
        start("c").next_rendezvous()
