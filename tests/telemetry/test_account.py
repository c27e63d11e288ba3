"""An agent's account reaches the bucket while it lives, and a bucket that fails stops nobody."""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_pt.errors import StoreError
from elastic_pt.store.local import LocalStore
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Source, Store
from elastic_pt.telemetry.account import Account, AccountWriter, ProcessTime, interval_s
from elastic_pt.telemetry.goodput import Bucket

PATIENCE_S = 20.0


def accounts() -> Iterator[Account]:
    """An agent that ages by 2 s from one look to the next."""
    age_s = 0.0
    while True:
        seconds = {Bucket.START: 1.0, Bucket.AGREE: age_s - 1.0}
        yield Account("a", 1000.0, 2.5, "a-1", "run", 1000.0 + age_s, seconds=seconds, steps=3)
        age_s += 2.0


def stored(store: Store) -> Account:
    """The account in the bucket."""
    return Account.from_bytes(store.read("events/a-12ab/account.json"))


def test_account_is_written_at_once_and_at_the_end(tmp_path: Path) -> None:
    """The first account comes with the start, the last one has the end and its reason."""
    store, ages = open_store(f"file://{tmp_path}"), accounts()
    with AccountWriter(store, "a-12ab", lambda: next(ages)) as writer:
        deadline_s = time.monotonic() + PATIENCE_S
        while store.size("events/a-12ab/account.json") is None:
            assert time.monotonic() < deadline_s
        first = stored(store)
        writer.reason = "completed"
    assert (first.ended, first.reason) == (False, "")
    last = stored(store)
    assert (last.ended, last.reason, last.steps) == (True, "completed", 3)
    assert last.written_at > first.written_at
    assert sum(last.seconds.values()) == pytest.approx(last.written_at - last.started_at)


def test_account_tells_the_error_that_ended_the_agent(tmp_path: Path) -> None:
    """An agent that ends by an error says which."""
    store, ages = open_store(f"file://{tmp_path}"), accounts()
    with (
        pytest.raises(StoreError),
        AccountWriter(store, "a-12ab", lambda: next(ages)),
    ):
        raise StoreError("the bucket is gone")
    assert stored(store).reason == "StoreError: the bucket is gone"


def test_the_reason_of_an_end_has_no_secret(tmp_path: Path) -> None:
    """The account is in the bucket: whoever may read it must not find credentials there."""
    store, ages = open_store(f"file://{tmp_path}"), accounts()
    with pytest.raises(StoreError), AccountWriter(store, "a-12ab", lambda: next(ages)):
        raise StoreError("https://host/x?X-Amz-Signature=0123456789abcdef")
    assert "0123456789abcdef" not in stored(store).reason
    with AccountWriter(store, "a-12ab", lambda: next(ages)) as writer:
        writer.hide("fedcba9876543210")
        writer.reason = "stopped: secret_access_key=0123456789abcdef, fedcba9876543210"
    assert stored(store).reason == "stopped: secret_access_key=[redacted] [redacted]"


class Stuck:
    """A local store whose writes do not return until they are let go."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.entered, self.go = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def write(self, key: str, source: Source) -> None:
        """Wait, then write."""
        self.entered.set()
        assert self.go.wait(PATIENCE_S)
        self._store.write(key, source)


def test_a_stuck_bucket_delays_neither_start_nor_work(tmp_path: Path) -> None:
    """Only the account's own thread waits for the bucket; the end waits for a bounded time."""
    store, ages = Stuck(LocalStore(str(tmp_path))), accounts()
    with AccountWriter(store, "a-12ab", lambda: next(ages)):  # type: ignore[arg-type]
        assert store.entered.wait(PATIENCE_S)
        # This thread has come here while the write hangs.
        store.go.set()
    assert stored(LocalStore(str(tmp_path))).ended


class Failing:
    """A local store that refuses the first writes."""

    def __init__(self, store: Store, failures: int) -> None:
        self._store, self._left = store, failures

    def write(self, key: str, source: Source) -> None:
        """Fail, or write."""
        self._left -= 1
        if self._left >= 0:
            raise StoreError("503")
        self._store.write(key, source)


def test_a_failed_write_is_made_good_by_the_next_one(tmp_path: Path) -> None:
    """The thread survives a failing bucket, and the next account has everything."""
    store, ages = Failing(LocalStore(str(tmp_path)), 1), accounts()
    with AccountWriter(store, "a-12ab", lambda: next(ages)):  # type: ignore[arg-type]
        pass
    assert stored(LocalStore(str(tmp_path))).ended


def test_an_account_that_cannot_be_taken_does_not_end_the_thread(tmp_path: Path) -> None:
    """An error in the agent's own measurements costs one account, not all later ones."""
    store, ages, looks = LocalStore(str(tmp_path)), accounts(), iter(range(9))

    def take() -> Account:
        if next(looks) == 0:
            raise RuntimeError("dictionary changed size during iteration")
        return next(ages)

    with AccountWriter(store, "a-12ab", take):
        pass
    assert stored(store).ended


def test_accounts_come_more_rarely_with_age() -> None:
    """A killed agent loses at most 1 % of its age: at least 1 s, and at most 10 s."""
    assert [interval_s(age_s) for age_s in (0.0, 99.0, 500.0, 1e6)] == [1.0, 1.0, 5.0, 10.0]


def test_account_survives_its_stored_form() -> None:
    """What is written is read, and keys and buckets of a later version do no harm."""
    account = dataclasses.replace(next(accounts()), bucket=Bucket.AGREE)
    again = Account.from_bytes(account.to_bytes())
    assert {name: value for name, value in again.seconds.items() if value} == account.seconds
    assert dataclasses.replace(again, seconds=account.seconds) == account
    later = json.loads(account.to_bytes()) | {"zone": "b", "bucket": "dreaming"}
    later["seconds"] |= {"dreaming": 5.0}
    found = Account.from_bytes(json.dumps(later).encode())
    assert (found.bucket, found.seconds[Bucket.OTHER]) == (Bucket.OTHER, 5.0)


@pytest.mark.parametrize(
    "damage",
    [
        {"written_at": None},
        {"started_at": "1000"},
        {"node": 7},
        {"ended": "no"},
        {"steps": None},
        {"seconds": {"start": None}},
        {"seconds": {"start": float("nan")}},
        {"written_at": float("inf")},
    ],
)
def test_a_value_of_another_type_is_a_value_error(damage: dict[str, object]) -> None:
    """A reader computes with the values: a wrong one must not fail later, as another error."""
    stored_form = json.loads(next(accounts()).to_bytes()) | damage
    with pytest.raises(ValueError, match=r"expected|not an account"):
        Account.from_bytes(json.dumps(stored_form).encode())


@pytest.mark.parametrize("data", [b"", b"[1]", b'{"schema": 2}', b'{"schema": 1}', b"null"])
def test_a_damaged_account_is_a_value_error(data: bytes) -> None:
    """Whatever the file has, the reader gets one kind of error."""
    with pytest.raises(ValueError, match=r"."):
        Account.from_bytes(data)


def test_age_of_the_process_includes_its_imports() -> None:
    """The age comes from the kernel: it counts from before the first line of Python."""
    program = (
        "import time; time.sleep(0.5)\n"
        "from elastic_pt.telemetry.account import ProcessTime\n"
        "process = ProcessTime(); print(process.age_s, process.started_at)"
    )
    before_s, began_s = time.time(), time.monotonic()
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    took_s = time.monotonic() - began_s
    age_s, started_at_s = map(float, told.stdout.split())
    assert 0.5 <= age_s <= took_s + 0.02
    assert before_s - 0.02 <= started_at_s <= before_s + took_s - 0.5


def test_age_grows_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc the process counts from now on, and its age still grows."""
    monkeypatch.setattr(Path, "read_text", lambda _: "")
    process = ProcessTime()
    first_s = process.age_s
    assert first_s < 1.0
    assert process.age_s >= first_s
