"""Which objects a completed run may leave in its directory."""

from collections.abc import Sequence

import pytest

from elastic_pt.chaos.directory import Objection
from elastic_pt.chaos.objects import Objects, check_kept
from elastic_pt.chaos.play import Struck
from elastic_pt.membership.lobby import card_key
from elastic_pt.runlog.records import Checkpoint, Commit, Quarantine, Record, Stop
from tests.chaos.made_up import (
    checkpoint,
    fault,
    generation,
    life,
    log_of,
    member,
    played,
    struck,
    training,
)

A, B = member("node-0"), member("node-1")
SIX, TWELVE, NEWEST = checkpoint(6), checkpoint(12, 2), checkpoint(18, 2)
LOG = log_of(
    (9.0, generation(1, A, B)),
    (12.5, Commit((SIX,), "history/0000000006-g1-abcd-1.jsonl")),
    (14.0, generation(2, B, resume_step=9, reached=9)),
    (16.0, Commit((TWELVE, SIX), "history/0000000012-g2-abcd-3.jsonl")),
    (20.0, Commit((NEWEST, TWELVE), "history/0000000018-g2-abcd-4.jsonl")),
    (20.1, Stop("completed", 18)),
)
STEPS = [*training(10.0, 0, 9), *training(15.0, 9, 18)]


def files(kept: Checkpoint) -> list[str]:
    """The keys of a checkpoint."""
    return [f"{kept.directory}/{name}" for name in ("manifest.json", "shard-00000.safetensors")]


EXPECTED = [
    *("config.toml", "identity.json", "pulse.json"),
    *("secret/token", "secret/authority.pem"),
    *(f"log/{index:020d}.json" for index in range(len(LOG))),
    *("events/node-0-0123abcd/00000000.jsonl", "events/node-1-0123abcd/account.json"),
    *("history/0000000012-g2-abcd-3.jsonl", "history/0000000018-g2-abcd-4.1.jsonl"),
    *files(NEWEST),
    *files(TWELVE),
]


def strays(*keys: str, fault: Struck | None = None, log: Sequence[Record] = LOG) -> list[str]:
    """Which of these keys, and of those that are there anyway, belong to nothing."""
    seen = played(
        fault or struck(13.0),
        lives=[life("node-0", 0.0, 13.0, None), life("node-1", 0.0, 21.0)],
        steps=STEPS,
    )
    kept = {each.directory: files(each) for each in (NEWEST, TWELVE)}
    return list(Objects([*EXPECTED, *keys], kept, (), log, seen).strays())


def test_a_clean_run_leaves_nothing() -> None:
    """All that docs/run-directory.md names belongs to the run."""
    assert strays() == []


@pytest.mark.parametrize(
    "key",
    [
        *("left.json", "manifests/6.json", "log/00000000000000000006.json", "log/notes.txt"),
        *("events/node-7-0123abcd/account.json", "events/node-0-0123abcd/core"),
        *files(SIX),
        f"{NEWEST.directory}/shard-00001.safetensors",
        *(f"{checkpoint(step).directory}/shard-00000.safetensors" for step in (5, 12)),
        f"{checkpoint(16, 2).directory}/shard-00000.safetensors",
        f"{checkpoint(6, 2).directory}/shard-00000.tmp",
        "history/0000000018-g2-abcd-3.jsonl",
        *(card_key(B), card_key(member("node-1", pid=7)), "storage-check-0a/x"),
    ],
)
def test_what_belongs_to_nothing_is_told(key: str) -> None:
    """A checkpoint that has expired, an attempt that nobody disturbed, and whatever is not known."""
    assert strays(key) == [key]


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        # The newest generation gives up an attempt that a fault has struck.
        (f"{checkpoint(10, 2).directory}/shard-00000.safetensors", struck(16.0)),
        # Its writers waited for the bucket, and come back with the next commit.
        (
            f"{checkpoint(16, 2).directory}/shard-00000.safetensors",
            struck(15.5, fault("bucket_away", for_s=1.0)),
        ),
        # A fault was there until the last sweep, or after the last commit.
        (files(SIX)[0], struck(10.0, fault("bucket_away", for_s=6.0))),
        (files(SIX)[0], struck(20.0)),
        # Its writer lost its turn, or was killed.
        ("history/0000000012-g1-abcd-2.jsonl", struck(13.0)),
        ("history/0000000012-g2-abcd-4.jsonl", struck(17.0)),
        # A node waited when it was lost.
        (card_key(A), struck(13.0)),
        (card_key(B), struck(13.0, fault("bucket_away", for_s=1.0))),
        ("storage-check-0a/x", struck(1.0, generation=0)),
    ],
)
def test_what_a_fault_leaves_is_tolerated(key: str, fault: Struck) -> None:
    """Nobody removes it at once."""
    assert strays(key, fault=fault) == []


def test_a_file_of_no_checkpoint_is_never_tolerated() -> None:
    """Whatever has struck: no writer makes such a file."""
    key = f"{checkpoint(10, 2).directory}/shard-00000.tmp"
    assert strays(key, fault=struck(20.0)) == [key]


def test_commits_keep_the_newest() -> None:
    """As many as are configured, and two at least."""
    assert check_kept(LOG, 1) == check_kept(LOG, 2) == "checkpoints of steps [18, 12] are kept"
    with pytest.raises(Objection, match=r"record 4: keeps .* \[18, 12\], expected \[18, 12, 6\]"):
        check_kept(LOG, 3)


def test_a_quarantined_checkpoint_is_not_kept() -> None:
    """It does not count as one of the newest either."""
    log = log_of(
        (1.0, Commit((SIX,), "h")),
        (2.0, Commit((TWELVE, SIX), "h")),
        (3.0, Quarantine(TWELVE.directory, "damaged")),
        (4.0, Commit((NEWEST, SIX), "h")),
    )
    assert check_kept(log, 2) == "checkpoints of steps [18, 6] are kept"
    with pytest.raises(Objection, match="expected"):
        check_kept([*log[:2], log[3]], 2)
