"""Tests on the user's own store whether create-once holds, because providers differ.

The log of a run needs one property: if several writers create the same key at the same time, exactly one
succeeds, and all readers get its bytes. The check races for this. Threads, spread over several clients,
wait at a barrier and then create the same key. Each round counts the winners by the results of `create`
and by the bytes that are stored afterwards. A round with no winner or with several makes the store
`unfenced`. Passing all rounds is evidence, not proof; more rounds are stronger evidence.
"""

import threading
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from elastic_pt.errors import AlreadyExists, ConfigError, NotFound, StoreError
from elastic_pt.store.open import open_store
from elastic_pt.store.port import NoAtomicCreate, Store

CLIENTS = 4
BARRIER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class StoreReport:
    """The result of a check. A run of several nodes may use the store if it is `fenced`."""

    verdict: Literal["fenced", "unfenced"]
    reason: str
    lines: tuple[str, ...]

    @property
    def fenced(self) -> bool:
        """True if a run of several nodes may use the store."""
        return self.verdict == "fenced"


@dataclass(frozen=True)
class _Round:
    winners: int
    agreed: bool


class _Failed(Exception):
    """The store broke its contract; the text says how."""


def check_store(
    store: Store,
    *,
    racers: int = 8,
    rounds: int = 20,
    deletes: bool = True,
    open_client: Callable[[str], Store] = open_store,
) -> StoreReport:
    """Test every operation below a fresh key, race `create`, and delete the test objects.

    `racers` threads over `CLIENTS` separate clients create one key, `rounds` times. Without `deletes`, for a user who
    may not delete, that operation is not tested and the test objects remain. Raises
    `AccessDenied`, `ConfigError` for a wrong URL and `StoreError` for an unreachable store: after
    these, it is not known whether the store is fenced.
    """
    if racers < 2 or rounds < 1:
        raise ValueError(
            f"racers = {racers}, rounds = {rounds}: expected at least 2 racers and 1 round"
        )
    folder = scratch_folder()
    lines: list[str] = []
    try:
        _check_create(store, folder, lines)
        _check_bytes(store, folder, lines, deletes=deletes)
        clients = [store, *(open_client(store.url) for _ in range(min(CLIENTS, racers) - 1))]
        results = [_race(clients, f"{folder}race-{n}", racers) for n in range(rounds)]
        lines.append(_tally(results, racers, len(clients)))
        verdict, reason = _judge(store.url, results)
    except (_Failed, NoAtomicCreate) as failure:
        verdict, reason = "unfenced", str(failure)
    # Not in a finally: with an unreachable store, the cleanup would only wait for a second timeout.
    if deletes:
        _clean(store, folder, rounds)
    return StoreReport(verdict, reason, (*lines, f"{verdict}: {reason}"))


def scratch_folder() -> str:
    """A fresh folder for objects of a check, below the URL of the store."""
    return f"storage-check-{uuid.uuid4().hex}/"


def is_fenced(
    store: Store, *, deletes: bool = True, open_client: Callable[[str], Store] = open_store
) -> StoreReport:
    """The cheap check of an agent before a run of several nodes: three races of four writers."""
    return check_store(store, racers=4, rounds=3, deletes=deletes, open_client=open_client)


def _check_bytes(store: Store, folder: str, lines: list[str], *, deletes: bool) -> None:
    key, data = f"{folder}bytes", bytes(range(256)) * 16
    store.write(key, b"old")
    store.write(key, data)
    _expect("write, then read", store.read(key), data)
    _expect("read of a range", store.read(key, 10, 300), data[10:300])
    _expect("read beyond the end", store.read(key, len(data) - 5, len(data) + 5), data[-5:])
    _expect("size", store.size(key), len(data))
    listed = key in store.keys(folder)
    if deletes:
        _check_delete(store, key)
    lines.append(f"write, read, ranges, size{', delete' * deletes}: correct")
    lines.append(f"listing: {'up to date' if listed else 'stale (allowed: nothing depends on it)'}")


def _check_delete(store: Store, key: str) -> None:
    store.delete(key)
    store.delete(key)
    _expect("size after delete", store.size(key), None)
    with suppress(NotFound):
        store.read(key)
        raise _Failed("a deleted object can still be read")


def _check_create(store: Store, folder: str, lines: list[str]) -> None:
    key = f"{folder}first"
    store.create(key, b"first")
    store.create(
        key, b"first"
    )  # the same bytes again: a lost response must not look like a lost race
    try:
        store.create(key, b"second")
    except AlreadyExists:
        _expect("object after a refused create", store.read(key), b"first")
    else:
        raise _Failed("create replaced an object: the store ignores the condition of a create")
    lines.append("create-once, one writer after another: held")


def _race(clients: list[Store], key: str, racers: int) -> _Round:
    start = threading.Barrier(racers)

    def run(number: int) -> bytes | None:
        mine = f"{number} {uuid.uuid4().hex}".encode()
        client = clients[number % len(clients)]
        client.size(key)  # connect first, so that only the creates race
        start.wait(BARRIER_TIMEOUT_S)
        try:
            client.create(key, mine)
        except AlreadyExists:
            return None
        return mine

    with ThreadPoolExecutor(racers, thread_name_prefix="store-race") as pool:
        outcomes = list(pool.map(run, range(racers)))
    winners = [mine for mine in outcomes if mine is not None]
    seen = {client.read(key) for client in clients}
    return _Round(winners=len(winners), agreed=len(winners) == 1 and seen == set(winners))


def _tally(results: list[_Round], racers: int, clients: int) -> str:
    counts = sorted(Counter(result.winners for result in results).items())
    told = ", ".join(f"{winners} winner{'s' * (winners != 1)}: {n} rounds" for winners, n in counts)
    return f"create-once under a race of {racers} writers over {clients} clients: {told}"


def _judge(url: str, results: list[_Round]) -> tuple[Literal["fenced", "unfenced"], str]:
    bad = [result for result in results if result.winners != 1]
    if bad:
        return (
            "unfenced",
            f"{len(bad)} of {len(results)} races to create one key had {bad[0].winners} winners",
        )
    if not all(result.agreed for result in results):
        return "unfenced", "after a race, not all clients read the bytes of the winner"
    if url.startswith("memory://"):
        return "unfenced", "memory:// exists only inside one process; other nodes cannot read it"
    where = "; every node must mount this directory" if url.startswith("file://") else ""
    return "fenced", f"each of {len(results)} races to create one key had exactly one winner{where}"


def _expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise _Failed(f"{what}: the result does not match what was written")


def _clean(store: Store, folder: str, rounds: int) -> None:
    # By name: a listing may be stale.
    for name in ("bytes", "first", *(f"race-{n}" for n in range(rounds))):
        try:
            store.delete(f"{folder}{name}")
        except (StoreError, ConfigError):
            return  # a failed cleanup does not change the verdict
