"""What may be deleted, and in which order.

Two kinds of directories go: checkpoints that were committed and are no longer kept (`expired`), and
torn uploads of worlds that are gone (`leftovers`). Both decisions are pure. A directory that is not
committed is left alone while anything could still commit it: its generation must be superseded *and*
a newer checkpoint must be committed. So an agent that has read an old log deletes less, never more.

`remove` takes the manifest first: a half-removed checkpoint must not pass for a whole one.
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

    `checkpoints` are the usable committed ones, newest commit first (the order of the log, not of the
    steps: a run that fell back commits an earlier step later). The first `keep` >= 1 stay.
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
    """The directories of torn uploads that nothing can commit any more.

    `directories` come from a listing (a hint); `committed` are those of the checkpoints that are kept.
    Names that are not checkpoint directories are never returned.
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
    """The checkpoint directories that a listing shows, sorted. A hint: it may lag behind. Agent process."""
    return sorted({key.rpartition("/")[0] for key in store.keys("ckpt/")})


def remove(store: Store, directory: str) -> None:
    """Delete a checkpoint directory: the manifest, then every file it named or a listing shows. Agent process.

    Removing what is partly or wholly gone is fine, so call it again after a crash
    in the middle. Raises `CheckpointError` if this is not a checkpoint directory, `StoreError` if the store fails.
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
