"""Faults of what is stored: the newest checkpoint, the log, the prepared data. They change it behind the run's back."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from elastic_pt.chaos.kinds.kind import (
    TROUBLE,
    Action,
    Evidence,
    Kind,
    NothingToStrike,
    Strike,
)
from elastic_pt.checkpoint.layout import manifest_key
from elastic_pt.runlog.log import record_key
from elastic_pt.runlog.records import CauseKind

if TYPE_CHECKING:
    from elastic_pt.chaos.arena import Arena

_SHARDS: Final = "shard-"
_EVERY_BYTES: Final = 4096


def _newest(arena: "Arena") -> str:
    """The directory of the newest checkpoint that is committed."""
    return _newest_ones(arena, 1)[0]


def _newest_ones(arena: "Arena", count: int) -> list[str]:
    """The directories of so many committed checkpoints, newest first."""
    found = [each.directory for each in arena.run.view().checkpoints[:count]]
    if len(found) < count:
        raise NothingToStrike(f"{len(found)} checkpoints are committed, expected {count}")
    return found


def _shards(arena: "Arena", directory: str) -> list[str]:
    return arena.run.store.keys(f"{directory}/{_SHARDS}")


def _change_shards(change: Callable[[bytearray], None]) -> Action:
    """Change one shard of each of the newest checkpoints."""

    def act(arena: "Arena", strike: Strike) -> None:
        for each in _newest_ones(arena, int(strike.parameters["checkpoints"])):
            arena.change(strike.choices.choice(_shards(arena, each)), change)

    return act


def _flip_middle(data: bytearray) -> None:
    data[len(data) // 2] ^= 0x10


def _cut(data: bytearray) -> None:
    del data[len(data) // 2 :]


def _flip_everywhere(data: bytearray) -> None:
    for place in range(0, len(data), _EVERY_BYTES):
        data[place] ^= 1


def _delete_shard(arena: "Arena", strike: Strike) -> None:
    shards = _shards(arena, _newest(arena))
    arena.run.store.delete(strike.choices.choice(shards))


def _damage_manifest(arena: "Arena", _: Strike) -> None:
    arena.change(manifest_key(_newest(arena)), _flip_middle)


def _swap_shards(arena: "Arena", _: Strike) -> None:
    store = arena.run.store
    shards = _shards(arena, _newest(arena))
    if len(shards) < 2:
        raise NothingToStrike("the newest checkpoint has one shard, expected two")
    first, second = shards[:2]
    before = store.read(first)
    store.write(first, store.read(second))
    store.write(second, before)


def _replay_checkpoint(arena: "Arena", _: Strike) -> None:
    """The newest checkpoint gets all files of the one before, under its own names."""
    newest, older = _newest_ones(arena, 2)
    store = arena.run.store
    for key in store.keys(f"{older}/"):
        store.write(newest + key.removeprefix(older), store.read(key))


def _alter_record(arena: "Arena", _: Strike) -> None:
    """Another byte, and still JSON: only the hash of the next record, or of the record itself, can tell."""
    arena.change(record_key(_last_but_one(arena)), _alter_text)


def _alter_text(data: bytearray) -> None:
    place = data.index(b'"writer"') + len(b'"writer": "')
    data[place] ^= 1


def _delete_record(arena: "Arena", _: Strike) -> None:
    arena.run.store.delete(record_key(_last_but_one(arena)))


def _last_but_one(arena: "Arena") -> int:
    return arena.run.view().length - 2


def _leave_foreign_files(arena: "Arena", _: Strike) -> None:
    """Files that look like a newer checkpoint, beside those of the run, and that no COMMIT names."""
    newest = _newest(arena)
    folder, name = newest.rsplit("/", 1)
    foreign = f"{folder}/{int(name[:10]) + 1:010d}{name[10:]}"
    store = arena.run.store
    for key in store.keys(f"{newest}/"):
        store.write(foreign + key.removeprefix(newest), store.read(key))


def _damage_data(arena: "Arena", _: Strike) -> None:
    for key in arena.data.keys("shards/"):
        if key.endswith(".bin"):
            arena.change_data(key, _flip_everywhere)


_QUARANTINED: Final = Evidence(
    events=frozenset({"checkpoint_quarantined"}),
    metrics=frozenset({'elastic_pt_quarantines_total{what="checkpoint"}'}),
    names_node=False,
    may=frozenset({CauseKind.UNUSABLE}),
)
_DAMAGED_LOG: Final = Evidence(
    events=frozenset({"agent_failed"}),
    names_node=False,
    at_start=True,
    may=frozenset({CauseKind.LOST}),
)

OF_STORED: Final = (
    Kind(
        "shard_bit_flip",
        "a bit flips in a shard of each of the newest `checkpoints`",
        strike=_change_shards(_flip_middle),
        parameters={"checkpoints": 1},
        evidence=_QUARANTINED,
    ),
    Kind(
        "shard_cut",
        "a shard of each of the newest `checkpoints` loses its second half",
        strike=_change_shards(_cut),
        parameters={"checkpoints": 1},
        evidence=_QUARANTINED,
    ),
    Kind(
        "shard_deleted",
        "a shard of the newest checkpoint is deleted",
        strike=_delete_shard,
        evidence=_QUARANTINED,
    ),
    Kind(
        "shards_swapped",
        "two shards of the newest checkpoint have each other's bytes",
        strike=_swap_shards,
        evidence=_QUARANTINED,
    ),
    Kind(
        "manifest_bit_flip",
        "a bit flips in the manifest of the newest checkpoint",
        strike=_damage_manifest,
        evidence=_QUARANTINED,
    ),
    Kind(
        "checkpoint_replayed",
        "the files of the newest checkpoint are those of the one before",
        strike=_replay_checkpoint,
        evidence=_QUARANTINED,
    ),
    Kind(
        "foreign_files",
        "files that look like a newer checkpoint are copied into the run",
        strike=_leave_foreign_files,
        # Only a later generation may remove what could be an attempt of this one.
        evidence=Evidence(events=frozenset({"attempt_removed"}), names_node=False, at_start=True),
    ),
    Kind(
        "record_altered",
        "a byte changes in a record of the log",
        strike=_alter_record,
        evidence=_DAMAGED_LOG,
    ),
    Kind(
        "record_deleted",
        "a record of the log is deleted",
        strike=_delete_record,
        evidence=_DAMAGED_LOG,
    ),
    Kind(
        "data_away",
        "the prepared data is gone, and comes back",
        strike=lambda arena, _: arena.take_data_away(),
        heal=lambda arena, _: arena.put_data_back(),
        ends_node=True,
        evidence=Evidence(
            events=frozenset({"store_retry"}), names_node=False, at_start=True, may=TROUBLE
        ),
    ),
    Kind(
        "data_damaged",
        "a bit flips in every 4096 bytes of the prepared tokens",
        strike=_damage_data,
        evidence=Evidence(
            causes=frozenset({CauseKind.FAILED, CauseKind.DAMAGED}),
            events=frozenset({"worker_failed", "data_left_out"}),
            names_node=False,
        ),
    ),
)
