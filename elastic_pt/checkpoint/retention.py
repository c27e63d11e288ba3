"""Which checkpoint directories may be deleted, and in which order their files are deleted.

Two kinds of directories are deleted: committed checkpoints that are no longer kept (`expired`), and incomplete
uploads of older generations (`leftovers`). Both decisions are pure functions. A directory without a commit stays while
a node could still commit it. It is deleted only if its generation was replaced *and* a checkpoint of its step or a
later one is committed. So an agent that has read an old log deletes less, never more.

`remove` deletes the manifest first, so that nothing takes a partly removed checkpoint for a complete one.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from elastic_pt.checkpoint.layout import (
    FullManifest,
    manifest_key,
    parse_directory,
)
from elastic_pt.checkpoint.nodes import RootManifest
from elastic_pt.checkpoint.record import DOCUMENT_BYTES_MAX, decode
from elastic_pt.errors import CheckpointError, NotFound
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.port import Store

_DELETE_THREADS: Final = 16


def expired(checkpoints: Sequence[Checkpoint], keep: int) -> list[Checkpoint]:
    """The committed checkpoints that are no longer kept, newest first.

    `checkpoints` are the usable committed ones, newest commit first. This is the order of the log, not of the
    steps: after a fall back a run commits an earlier step later. The first `keep` >= 1 stay.
    """
    assert keep >= 1, f"keep = {keep}: the newest checkpoint is never deleted"
    newest_first = list(dict.fromkeys(checkpoints))
    kept = {checkpoint.directory for checkpoint in newest_first[:keep]}
    return [checkpoint for checkpoint in newest_first if checkpoint.directory not in kept]


def leftovers(
    directories: Sequence[str],
    committed: Collection[str],
    current_generation: int,
    newest_committed_step: int,
) -> list[str]:
    """The directories of incomplete uploads that nothing can commit any more.

    `directories` come from a listing, which may be stale. `committed` are those of the kept checkpoints.
    Never returns a name that is not a checkpoint directory.
    """
    torn = []
    for directory in directories:
        try:
            name = parse_directory(directory)
        except CheckpointError:
            continue
        superseded = name.generation < current_generation and name.step <= newest_committed_step
        if superseded and directory not in committed:
            torn.append(directory)
    return torn


def listed_directories(store: Store) -> list[str]:
    """The checkpoint directories in a listing, sorted. A listing may be stale. Agent process."""
    return sorted({key.rpartition("/")[0] for key in store.keys("ckpt/")})


def remove(store: Store, directory: str) -> None:
    """Delete a checkpoint directory: the manifest, then every file in the manifest or in a listing. Agent process.

    May be repeated, also after a crash in the middle. Raises `CheckpointError` if this is not a checkpoint directory,
    and `StoreError` if the store fails.
    """
    parse_directory(directory)
    keys = set(store.keys(f"{directory}/"))
    try:
        data = store.read(manifest_key(directory), 0, DOCUMENT_BYTES_MAX)
        manifest = decode(data, RootManifest, FullManifest)
    except (NotFound, CheckpointError):
        pass
    else:
        if manifest.directory == directory:
            keys |= manifest.removable
    store.delete(manifest_key(directory))
    with ThreadPoolExecutor(_DELETE_THREADS) as pool:
        for _ in pool.map(store.delete, sorted(keys - {manifest_key(directory)})):
            pass
