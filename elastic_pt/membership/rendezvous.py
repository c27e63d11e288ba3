"""The membership behind torch elastic's rendezvous interface: the log decides, and each generation has a new store.

`LogRendezvous` serves our own agent and, through the `torchrun.handlers` entry point, stock torchrun:

    torchrun --rdzv-backend elastic_pt --rdzv-endpoint s3://bucket/run --nnodes 1:8 train.py

With stock torchrun the log has generations only. The script decides what to train and how to save it.
"""

import secrets
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from pydantic import ValidationError
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
from elastic_pt.membership.decision.status import Limits, NodeStatus
from elastic_pt.membership.node import Formed, Node, new_member, new_node
from elastic_pt.membership.resources import Resources
from elastic_pt.membership.tcp_store import bind_store
from elastic_pt.runlog.access import join_access
from elastic_pt.runlog.log import RunLog
from elastic_pt.runlog.records import CauseKind, Stop
from elastic_pt.store.open import open_store

_ENTERED: Final = "entered"
_ENTERED_POLL_S: Final = 0.01
_STORE_GONE_S: Final = 60.0


class LogRendezvous(RendezvousHandler):
    """Gives each generation of the log to a `torch.distributed.elastic` agent. Agent process, main thread."""

    def __init__(self, node: Node, run_id: str) -> None:
        self._node = node
        self._run_id = run_id

    @property
    def formed(self) -> Formed | None:
        """The generation that was returned last."""
        return self._node.latest

    def get_backend(self) -> str:
        """The name by which torchrun finds this handler."""
        return "elastic_pt"

    @property
    def use_agent_store(self) -> bool:
        """Whether workers may use the generation's store. Yes: it is new, so they cannot read stale keys."""
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
        self._node.running()
        generation = found.generation
        return RendezvousInfo(
            found.store,
            found.node_rank,
            len(generation.members),
            RendezvousStoreInfo(generation.store_address, generation.store_port),
        )

    def is_closed(self) -> bool:
        """Whether the log has a STOP."""
        return self._node.view.stop is not None

    def set_closed(self) -> None:
        """Do nothing: one node never closes a run. Only the log's STOP record ends it."""

    def num_nodes_waiting(self) -> int:
        """Nonzero when the running workers must end and a new generation is due."""
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
    """The same for stock torchrun. Its agent blocks on the store right after the rendezvous.

    Such an agent cannot be interrupted when a member dies in this wait, and would fail with it. So all members first
    count themselves in the store, and that wait ends as soon as the generation is broken.
    """

    def next_rendezvous(self) -> RendezvousInfo:
        """Give up the last generation and wait until all members of the next one have counted themselves."""
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
            # The store's host is gone. Wait until the membership has detected that, too.
            self._node.await_reform(self.formed.generation.number, _STORE_GONE_S)
            return False
        return True


def torchrun_backend() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Entry point for stock torchrun (`torchrun.handlers`): returns the function that creates a handler."""
    return create_handler


def create_handler(parameters: RendezvousParameters) -> RendezvousHandler:
    """A rendezvous for stock torchrun, on the log at `--rdzv-endpoint`. Agent process of torchrun."""
    url = parameters.endpoint
    if not url:
        raise ConfigError("--rdzv-endpoint: missing; expected the URL of a run directory")
    address = _address_of(parameters.local_addr) if parameters.local_addr else local_address()
    store = open_store(url if "://" in url else f"file://{url}")
    name = parameters.get("node") or f"{address}-{secrets.token_hex(3)}"

    def make_room(reason: str) -> None:
        # Stock workers cannot be drained. They are ended at any step so that new nodes can join.
        node.spend(node.view.generation_number, node.failure(reason, kind=CauseKind.GAVE_UP))

    limits = Limits(_elastic_section(parameters), slots=None)
    node = new_node(
        NodeStatus.first(
            new_member(name, address, workers=1),
            fingerprint={"torchrun --rdzv-id": parameters.run_id, "torch": torch.__version__},
        ),
        limits,
        Resources(
            log=RunLog(store, writer=name),
            hints=store,
            clock_s=time.monotonic,
            bind_store=partial(bind_store, address),
            choose_resume=lambda _: None,
            on_drain=make_room,
        ),
        join_access(store, name, tls=limits.elastic.tls),
    )
    node.start()
    return TorchrunRendezvous(node, run_id=parameters.run_id)


def _address_of(name: str) -> str:
    """The IP address of `--local-addr`, which may be a host name: records have addresses only."""
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(
            f"--local-addr {name}: {error.strerror}; expected an IP address or a host name of this machine"
        ) from error


def _elastic_section(parameters: RendezvousParameters) -> ElasticSection:
    """The limits that torchrun's options set, and our defaults for the others."""
    keys = ("heartbeat_timeout_s", "join_window_s", "takeover_s")
    given = {key: value for key in keys if (value := parameters.get(key)) is not None}
    try:
        section = ElasticSection(
            nodes_min=parameters.min_nodes, nodes_max=parameters.max_nodes, **given
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "--rdzv-conf"
        raise ConfigError(f"{where} = {first['input']!r}: {first['msg']}") from None
    # torchrun reports no steps, so failures would add up without a limit. It has --max-restarts for that.
    return section.model_copy(update={"failures_max": sys.maxsize})
