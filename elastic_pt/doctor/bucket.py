"""Checks of the store of `run.url`: that it answers, its rights verb by verb, create-once, speed, rules and clock.

    bucket_checks ─► reached ─► rights ─► create_once ─► speed ─► credentials, rules, clock
                        └─ not reached: nothing else can be checked

All objects are below one scratch folder of the run's prefix, and are deleted at the end. Command line's process, and
`rules_and_clock` in the agent's too.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastic_pt.config import ElasticSection
from elastic_pt.doctor.check import EXPECTED, Check, judged, one_line, rate, seconds, size
from elastic_pt.doctor.machine import Needs
from elastic_pt.errors import AccessDenied, AlreadyExists, ElasticPtError, NotFound, StoreError
from elastic_pt.store.check import check_store, scratch_folder
from elastic_pt.store.local import UNFINISHED
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Examinable, KeepsUnfinished, Store

ANSWER_TIMEOUT_S: Final = 15.0
"""For which a request of a check is retried."""
CLOCKS_DIFFER_S: Final = 5.0
"""More than this is too much, as for `elastic-pt watch`."""
_ROUND_TRIPS: Final = 5
_STREAMS: Final = 4
_FIRST_BYTES: Final = 2**20
_STREAM_BYTES_MAX: Final = 16 * 2**20
_TRANSFER_S: Final = 2.0
"""A transfer is made so large that it takes about this long."""
_LEAST_RATE: Final = 1e6
"""Expected where no model is known, in bytes per second."""
_CHECKPOINTS: Final = "ckpt/"


@dataclass(frozen=True)
class Speed:
    """What the bucket gave to this machine, in bytes per second."""

    up: float
    down: float


@dataclass(frozen=True)
class Verb:
    """One right that a node needs."""

    name: str
    action: str
    """What to allow, as the policies of S3 call it."""
    why: str


PUT: Final = Verb("right_put", "s3:PutObject on the run's prefix", "write objects")
CREATE: Final = Verb("right_create", PUT.action + ", with If-None-Match too", "create records")
GET: Final = Verb("right_get", "s3:GetObject on the run's prefix", "read objects")
RANGE: Final = Verb("right_range", GET.action + ", with Range too", "read a part of an object")
LIST: Final = Verb(
    "right_list", "s3:ListBucket on the bucket, for the run's prefix", "list objects"
)
PARTS: Final = Verb("right_parts", PUT.action + ", in parts too", "upload in parts")
ABORT: Final = Verb(
    "right_abort", "s3:AbortMultipartUpload on the run's prefix", "end an upload in parts"
)
DELETE: Final = Verb("right_delete", "s3:DeleteObject on the run's prefix", "delete objects")
_ANSWER: Final = "an answer from the store, with these credentials"
_REACH: Final = (
    "check run.url, that the bucket exists, AWS_ENDPOINT_URL, AWS_REGION and the credentials, and that this machine "
    "reaches the server"
)
_DENIED: Final = "denied: "


class _Wrong(StoreError):
    """The store did something else than it was asked for; the text says what it did."""


def reached(store: Store) -> Check:
    """Whether the store answers. A refusal is an answer: the rights, verb by verb, tell more."""
    try:
        store.keys(scratch_folder())
    except AccessDenied:
        pass
    except ElasticPtError as error:
        return Check("bucket", False, one_line(str(error)), _ANSWER, _REACH)
    return Check("bucket", True, f"{store.url} answers", _ANSWER, "")


def rights(store: Store, folder: str) -> Iterator[Check]:
    """Try each verb that a node needs, on new objects of `folder`."""
    key, data = f"{folder}object", bytes(range(256))

    def put() -> None:
        store.write(key, data)

    def create() -> None:
        store.create(f"{folder}created", b"first")
        # A refused create reads the object, which may be denied: that right is tried below.
        with suppress(AlreadyExists, AccessDenied):
            store.create(f"{folder}created", b"second")
            raise _Wrong("a second create replaced the object")

    def get() -> None:
        with suppress(NotFound):
            _expect(store.read(key), data)

    def part_of() -> None:
        with suppress(NotFound):
            _expect(store.read(key, 10, 20), data[10:20])

    def listing() -> None:
        store.keys(folder)

    def delete() -> None:
        store.delete(key)

    yield _tried(store, PUT, put)
    yield _tried(store, CREATE, create)
    yield _tried(store, GET, get)
    yield _tried(store, RANGE, part_of)
    yield _tried(store, LIST, listing)
    if isinstance(store, Examinable):
        bucket = store
        yield _tried(store, PARTS, lambda: bucket.write_in_parts(f"{folder}parts", data))
        if isinstance(store, KeepsUnfinished):
            sweeper = store
            yield _tried(store, ABORT, lambda: sweeper.abandon(bucket.begin_upload(f"{folder}x")))
    # Also with `checkpoint.tidy = false`: such objects, and cards of the lobby, are removed by each node.
    yield _tried(store, DELETE, delete)


def _expect(found: bytes, wanted: bytes) -> None:
    if found != wanted:
        raise _Wrong("other bytes than those that were written")


def _tried(store: Store, verb: Verb, act: Callable[[], None]) -> Check:
    expected = f"may {verb.why} below {store.url}"
    try:
        act()
    except AccessDenied as error:
        found = _DENIED + _reason(error)
        if store.url.startswith("file://"):
            remedy = "give this user the right to read and write in that directory"
        elif store.url.startswith("s3://"):
            remedy = f"allow {verb.action} in the policy of these credentials"
        else:
            remedy = f"give these credentials a role that may {verb.why} there"
        return Check(verb.name, False, found, expected, remedy)
    except ElasticPtError as error:
        remedy = "try again; if it stays, this store does not do what a run needs"
        found, _, wanted = one_line(str(error)).partition(EXPECTED)
        return Check(verb.name, False, found, wanted or expected, remedy)
    return Check(verb.name, True, "allowed", expected, "")


def _reason(error: BaseException) -> str:
    """What the server said, which is the first of the errors that were raised from each other."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(str(error))


def create_once(store: Store, *, deletes: bool) -> Check:
    """Whether of several writers exactly one creates an object: what `elastic-pt storage-check` tests."""
    expected = "fenced: of several writers of one key exactly one succeeds"
    remedy = "use a store with conditional writes for several nodes (elastic-pt storage-check URL), or elastic.nodes_max = 1"
    try:
        report = check_store(
            store,
            deletes=deletes,
            open_client=lambda url: open_store(url, timeout_s=ANSWER_TIMEOUT_S),
        )
    except ElasticPtError as error:
        return Check("create_once", False, f"not known: {one_line(str(error))}", expected, remedy)
    return judged(
        "create_once", report.fenced, f"{report.verdict}: {report.reason}", expected, remedy
    )


def latency(store: Store, folder: str, elastic: ElasticSection) -> Check:
    """Round trips of small objects. A request should take less than half of `elastic.takeover_s` (docs/assumptions.md)."""
    took = []
    for number in range(_ROUND_TRIPS):
        key = f"{folder}small-{number}"
        for act in (lambda key=key: store.write(key, b"1"), lambda key=key: store.read(key)):
            began_s = time.perf_counter()
            act()
            took.append(time.perf_counter() - began_s)
    return judge_latency(took, elastic.takeover_s)


def judge_latency(took_s: list[float], takeover_s: float) -> Check:
    """The check of these round trips. Pure."""
    worst_s, limit_s = max(took_s), takeover_s / 2
    return judged(
        "latency",
        worst_s < limit_s,
        f"median {seconds(statistics.median(took_s))}, slowest {seconds(worst_s)} of {len(took_s)} small requests",
        f"below {seconds(limit_s)}, half of elastic.takeover_s",
        "use a bucket in this region, or raise elastic.takeover_s above twice the slowest request",
    )


def measure(store: Store, folder: str, *, bytes_max: int = _STREAM_BYTES_MAX) -> Speed:
    """Write and read some MB, several objects of at most `bytes_max` at a time. Takes a few seconds, also on a slow network."""
    began_s = time.perf_counter()
    store.write(f"{folder}first", bytes(_FIRST_BYTES))
    first_s = max(1e-6, time.perf_counter() - began_s)
    if first_s > _TRANSFER_S:
        began_s = time.perf_counter()
        store.read(f"{folder}first")
        return Speed(
            _FIRST_BYTES / first_s, _FIRST_BYTES / max(1e-6, time.perf_counter() - began_s)
        )
    each = min(bytes_max, max(_FIRST_BYTES, int(_FIRST_BYTES / first_s * _TRANSFER_S / 2)))
    keys, data = [f"{folder}stream-{number}" for number in range(_STREAMS)], bytes(each)
    with ThreadPoolExecutor(_STREAMS, thread_name_prefix="doctor") as pool:
        began_s = time.perf_counter()
        list(pool.map(lambda key: store.write(key, data), keys))
        up_s = time.perf_counter() - began_s
        began_s = time.perf_counter()
        list(pool.map(store.read, keys))
        down_s = time.perf_counter() - began_s
    return Speed(_STREAMS * each / max(1e-6, up_s), _STREAMS * each / max(1e-6, down_s))


def judge_rates(speed: Speed, needs: Needs | None, elastic: ElasticSection) -> Iterator[Check]:
    """Whether uploads and restores fit in the timeouts of a run (docs/assumptions.md). Pure."""
    for name, found, what, key, limit_s in (
        ("rate_up", speed.up, "upload", "elastic.settle_timeout_s", elastic.settle_timeout_s),
        (
            "rate_down",
            speed.down,
            "restore",
            "elastic.startup_timeout_s",
            elastic.startup_timeout_s,
        ),
    ):
        least, expected = _LEAST_RATE, f"{rate(_LEAST_RATE)} or more"
        if needs is not None:
            least = needs.share_bytes / limit_s
            expected = f"{rate(least)} or more, to {what} this node's {size(needs.share_bytes)} within {key}"
        remedy = f"use a bucket in this region or more nodes, or raise {key}"
        yield judged(name, found >= least, rate(found), expected, remedy)


def credentials(store: Examinable) -> Check:
    """Whether the credentials will be renewed."""
    found = store.credentials()
    origin = found.origin or "none"
    kind = "renewed or permanent" if found.renewed else "temporary, and nothing renews them"
    until = f", until {found.expires}" if found.expires else ""
    return judged(
        "credentials",
        found.renewed,
        f"{origin}: {kind}{until}",
        "an identity of the machine or pod, or keys that do not expire",
        "use an identity of the machine or pod (docs/operations.md, Credentials): an agent cannot renew AWS_SESSION_TOKEN",
    )


def lifecycle_rule(store: KeepsUnfinished) -> Check | None:
    """Whether a rule removes the parts of uploads that are never finished; None if the server does not know rules.

    A run removes such parts while it trains. Without a rule, those of a run that does not continue remain, cost money
    and appear in no listing.
    """
    expected = "a rule AbortIncompleteMultipartUpload after one or two days"
    try:
        ok, found = store.expires_unfinished(_CHECKPOINTS), ""
    except AccessDenied:
        ok, found = False, "cannot be read: access denied"
    except StoreError:
        return None
    found = found or (
        "unfinished uploads are removed" if ok else "no rule removes unfinished uploads"
    )
    return judged(
        "lifecycle_rule",
        ok,
        found,
        expected,
        "ask the owner of the bucket for the rule, or allow s3:GetLifecycleConfiguration on the bucket"
        if found.startswith("cannot")
        else "aws s3api put-bucket-lifecycle-configuration (docs/deployment/doctor.md has the rule)",
    )


def versioning(store: Examinable) -> Check | None:
    """Whether old versions of rewritten objects pile up; None if this user may not know it."""
    try:
        keeps = store.keeps_all_versions(_CHECKPOINTS)
    except StoreError:
        return None
    return judged(
        "versioning",
        not keeps,
        "old versions are kept, and no rule removes them"
        if keeps
        else "old versions do not pile up",
        "no versioning, or a rule NoncurrentVersionExpiration: a run rewrites pulse.json each second",
        "add the rule to the bucket's lifecycle configuration (docs/deployment/doctor.md has it)",
    )


def clock(store: Examinable) -> Check | None:
    """This machine's clock against the server's; None before the first answer."""
    ahead_s = store.clock_ahead_s
    if ahead_s is None:
        return None
    # The server tells whole seconds.
    off_s = max(0.0, abs(ahead_s) - 0.5)
    side = "ahead of" if ahead_s > 0 else "behind"
    found = f"{seconds(off_s)} {side} the store's" if off_s >= 1 else "as the store's, to a second"
    return judged(
        "clock",
        off_s < CLOCKS_DIFFER_S,
        found,
        f"within {CLOCKS_DIFFER_S:g} s: ages and notices compare clocks, and S3 refuses requests from 15 min on",
        "set the clock (timedatectl set-ntp true, or chrony)",
    )


def rules_and_clock(store: Store) -> Iterator[Check]:
    """The checks of the bucket that cost an agent one short request at its start."""
    found: list[Check | None] = []
    if isinstance(store, KeepsUnfinished):
        found.append(lifecycle_rule(store))
    if isinstance(store, Examinable):
        found.append(clock(store))
    yield from (each for each in found if each is not None)


def bucket_checks(
    store: Store,
    first: Check,
    needs: Needs | None,
    elastic: ElasticSection,
    speeds: list[Speed],
) -> Iterator[Check]:
    """All checks of this module, after `reached` (`first`). The measured speed is appended to `speeds`."""
    folder = scratch_folder()
    with _directory_as_before(store.url):
        found = _rights_until_trouble(store, folder) if first.ok else {}
        if found and all(each.found.startswith(_DENIED) for each in found.values()):
            first = Check(
                "bucket", False, f"{store.url}: {found[LIST.name].found}", _ANSWER, _REACH
            )
        yield first
        if not first.ok:
            # A clock that is far off is a reason to be refused.
            if isinstance(store, Examinable) and (told := clock(store)) is not None:
                yield told
            return
        try:
            yield from found.values()
            allowed = {name for name, each in found.items() if each.ok}
            if allowed >= {PUT.name, CREATE.name, GET.name, LIST.name}:
                may_delete = DELETE.name in allowed
                yield create_once(store, deletes=may_delete)
                yield from speed_checks(
                    store, folder, needs, elastic, speeds, may_delete=may_delete
                )
        finally:
            _clean(store, folder)
    if isinstance(store, Examinable):
        yield credentials(store)
        if (told := versioning(store)) is not None:
            yield told
    yield from rules_and_clock(store)


def _rights_until_trouble(store: Store, folder: str) -> dict[str, Check]:
    """The rights by name, up to the first trouble that is no refusal: each further one could take as long."""
    found: dict[str, Check] = {}
    for check in rights(store, folder):
        found[check.name] = check
        if not check.ok and not check.found.startswith(_DENIED):
            break
    return found


@contextmanager
def _directory_as_before(url: str) -> Iterator[None]:
    """Remove the directories that writing to a `file://` store creates, if nothing else is in them."""
    root = Path(url.removeprefix("file://")) if url.startswith("file:///") else None
    new = [] if root is None else [each for each in (root, *root.parents) if not each.exists()]
    try:
        yield
    finally:
        for each in [new[0] / UNFINISHED, *new] if new else []:
            with suppress(OSError):
                each.rmdir()


def speed_checks(
    store: Store,
    folder: str,
    needs: Needs | None,
    elastic: ElasticSection,
    speeds: list[Speed],
    *,
    may_delete: bool,
) -> Iterator[Check]:
    """Latency and rates. A store that stops answering is the finding of the check."""
    name = "latency"
    try:
        yield latency(store, folder, elastic)
        name = "rate_up"
        # Nobody removes what a user without that right writes.
        bytes_max = _STREAM_BYTES_MAX if may_delete else _FIRST_BYTES
        speeds.append(measure(store, folder, bytes_max=bytes_max))
    except StoreError as error:
        yield Check(
            name,
            False,
            one_line(str(error)),
            "answers",
            "try again; check the network to the store",
        )
        return
    yield from judge_rates(speeds[-1], needs, elastic)


def _clean(store: Store, folder: str) -> None:
    names = ["object", "created", "parts", "first"]
    names += [f"small-{number}" for number in range(_ROUND_TRIPS)]
    names += [f"stream-{number}" for number in range(_STREAMS)]
    # A store that cannot be written raises `ConfigError`.
    with suppress(ElasticPtError):
        for name in names:
            store.delete(f"{folder}{name}")
