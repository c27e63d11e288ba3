"""Our rendezvous behind torch elastic's interface: the log decides, one fresh store per generation.

`LogRendezvous` serves our own agent and, through the `torchrun.handlers` entry point, stock torchrun:

    torchrun --rdzv-backend elastic_pt --rdzv-endpoint s3://bucket/run --nnodes 1:8 train.py

With stock torchrun the log holds generations only: what is trained, and its checkpoints, are the script's.
"""

import secrets
import sys
from collections.abc import Callable
from typing import Final

import torch
from torch.distributed import DistNetworkError, DistStoreError  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

from elastic_pt.config import ElasticSection
from elastic_pt.errors import ConfigError
from elastic_pt.membership.address import local_address
from elastic_pt.membership.budgets import Budgets
from elastic_pt.membership.node import Formed, Node, NodeOptions
from elastic_pt.membership.status import Limits
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import CauseKind, Stop
from elastic_pt.store.open import open_store

_ENTERED: Final = "entered"
_ENTERED_POLL_S: Final = 0.01
_STORE_GONE_S: Final = 60.0


class LogRendezvous(RendezvousHandler):
    """Hands each generation of the log to a `torch.distributed.elastic` agent. Agent process, main thread."""

    def __init__(self, node: Node, run_id: str) -> None:
        self._node = node
        self._run_id = run_id
        self.formed: Formed | None = None
        """The generation handed out last."""

    def get_backend(self) -> str:
        """The name under which torchrun finds this handler."""
        return "elastic_pt"

    @property
    def use_agent_store(self) -> bool:
        """Workers may use the generation's store: it is fresh, so nothing stale can be read."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Give up the last generation and wait for the next one with this node in it."""
        if self.formed is not None:
            number = self.formed.generation.number
            own = (
                None if self._node.must_reform(number) else self._node.failure("its workers failed")
            )
            self._node.spend(number, own)
        found = self._node.await_generation()
        if isinstance(found, Stop):
            raise RendezvousClosedError(f"the run has ended: {found.reason}")
        self.formed = found
        self._node.running()
        generation = found.generation
        return RendezvousInfo(
            found.store,
            found.node_rank,
            len(generation.members),
            RendezvousStoreInfo(generation.store_address, generation.store_port),
        )

    def is_closed(self) -> bool:
        """Whether the log says the run has ended."""
        return self._node.view.stop is not None

    def set_closed(self) -> None:
        """Nothing: one node never closes a run; only the log's STOP record ends it."""

    def num_nodes_waiting(self) -> int:
        """Nonzero when the running workers have no future and a new generation is due."""
        return int(
            self.formed is not None and self._node.must_reform(self.formed.generation.number)
        )

    def get_run_id(self) -> str:
        """The run's name."""
        return self._run_id

    def shutdown(self) -> bool:
        """Leave; the others see it at once."""
        self._node.leave()
        return True


class TorchrunRendezvous(LogRendezvous):
    """As above, for agents that block on the store right after the rendezvous, as stock torchrun does.

    Such an agent cannot be told that a member died meanwhile, and would die with it. So all members
    meet in the store first, where waiting ends as soon as the generation has no future.
    """

    def next_rendezvous(self) -> RendezvousInfo:
        """Give up the last generation and wait for the next one that all its members have entered."""
        while True:
            info = super().next_rendezvous()
            if self._all_enter(info):
                return info

    def _all_enter(self, info: RendezvousInfo) -> bool:
        assert self.formed is not None
        try:
            info.store.add(_ENTERED, 1)
            while info.store.add(_ENTERED, 0) < info.world_size:
                if self._node.await_reform(self.formed.generation.number, _ENTERED_POLL_S):
                    return False
        except (DistNetworkError, DistStoreError):
            # Its host is gone: the membership will say so. Until then there is nothing to be entered.
            self._node.await_reform(self.formed.generation.number, _STORE_GONE_S)
            return False
        return True


def torchrun_backend() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Entry point for stock torchrun (`torchrun.handlers`): what makes a handler."""
    return create_handler


def create_handler(parameters: RendezvousParameters) -> RendezvousHandler:
    """A rendezvous for stock torchrun, on the log at `--rdzv-endpoint`. Agent process of torchrun."""
    url, defaults = parameters.endpoint, ElasticSection()
    if not url:
        raise ConfigError("--rdzv-endpoint: missing; the URL of a run directory would be right")
    address = parameters.local_addr or local_address()
    store = open_store(url if "://" in url else f"file://{url}")
    options = NodeOptions(
        name=parameters.get("node") or f"{address}-{secrets.token_hex(3)}",
        address=address,
        workers=1,
        fingerprint={"torchrun --rdzv-id": parameters.run_id, "torch": torch.__version__},
        limits=Limits(
            nodes_min=parameters.min_nodes,
            nodes_max=parameters.max_nodes,
            slots=None,
            heartbeat_timeout_s=float(
                parameters.get("heartbeat_timeout_s", defaults.heartbeat_timeout_s)
            ),
            join_window_s=float(parameters.get("join_window_s", defaults.join_window_s)),
            takeover_s=float(parameters.get("takeover_s", defaults.takeover_s)),
            heartbeat_interval_s=defaults.heartbeat_interval_s,
        ),
        # Nobody tells of steps here, so failures would add up for ever; torchrun has --max-restarts.
        budgets=Budgets(failures_max=sys.maxsize),
    )

    def make_room(reason: str) -> None:
        # Stock workers cannot be drained; to make room for others they are ended where they are.
        node.spend(node.view.generation_number, node.failure(reason, kind=CauseKind.GAVE_UP))

    run_log = RunLog(store, writer=options.name)
    node = Node(options, store, store, run_log, choose_resume=lambda _: None, on_drain=make_room)
    node.start()
    return TorchrunRendezvous(node, run_id=parameters.run_id)
