"""What may be deleted, and in which order.

Two kinds of directories go: checkpoints that were committed and are no longer kept (`expired`), and
torn uploads of worlds that are gone (`leftovers`). Both decisions are pure. A directory that is not
committed is left alone while anything could still commit it: its generation must be superseded *and*
a newer checkpoint must be committed. So an agent that has read an old log deletes less, never more.

A permanent checkpoint (`is_permanent`) is in neither group. It leaves the list of a COMMIT like any other, and its
files stay: `RunLog.permanent` finds it. An attempt of the current generation whose step was overtaken by a commit
(`overtaken`), and parts of a file whose upload did not end (`abandoned`), go once they are old enough.

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
from elastic_pt.store.port import Store, UnfinishedUpload

KEPT_MIN: Final = 2
"""Commits that are kept whatever is configured: the newest may turn out damaged, and the one before may be read now."""
UPLOAD_AGE_S: Final = 86_400.0
"""An upload of one file that has not ended after a day has no writer any more."""
_DELETE_THREADS: Final = 16


def is_permanent(step: int, previous_step: int, keep_every_steps: int) -> bool:
    """Whether the commit of `step` is the first one at or after a multiple of `keep_every_steps` (0: never).

    `previous_step` is that of the newest usable commit before, 0 if there is none. After a fall-back behind a
    permanent checkpoint that was quarantined, the same multiple is reached again and gives another one.
    """
    return keep_every_steps > 0 and step // keep_every_steps > previous_step // keep_every_steps


def kept(checkpoints: Sequence[Checkpoint], keep: int) -> list[Checkpoint]:
    """The checkpoints that a COMMIT names: the first `keep` >= 1, and never fewer than `KEPT_MIN`.

    `checkpoints` are the usable committed ones, newest commit first (the order of the log, not of the
    steps: a run that fell back commits an earlier step later).
    """
    assert keep >= 1, f"keep = {keep}: the newest checkpoint is never deleted"
    return list(dict.fromkeys(checkpoints))[: max(keep, KEPT_MIN)]


def expired(checkpoints: Sequence[Checkpoint], keep: int) -> list[Checkpoint]:
    """The checkpoints to be deleted, newest first: of those that are not `kept` the ones that are not permanent."""
    named = {checkpoint.directory for checkpoint in kept(checkpoints, keep)}
    return [
        checkpoint
        for checkpoint in dict.fromkeys(checkpoints)
        if checkpoint.directory not in named and not checkpoint.permanent
    ]


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


def overtaken(
    directories: Sequence[str], committed: Collection[str], newest: Checkpoint
) -> list[str]:
    """The directories of attempts that the generation of the `newest` commit gave up: it has committed a later step since.

    Its committing node takes one step after the other, so nothing commits them any more. A file of them
    may still be under way, so the caller waits for a while.
    """
    found = []
    for directory in directories:
        try:
            name = parse_directory(directory)
        except CheckpointError:
            continue
        given_up = name.generation == newest.generation and name.step < newest.step
        if given_up and directory not in committed:
            found.append(directory)
    return found


def abandoned(
    uploads: Sequence[UnfinishedUpload], current_generation: int, newest_committed_step: int
) -> list[UnfinishedUpload]:
    """The unfinished uploads of single files that nobody continues, from a listing.

    They belong to an attempt that nothing can commit any more (see `leftovers`), or are older than
    `UPLOAD_AGE_S`. One in a committed directory is a second attempt at a file that is there. Uploads of a newer
    generation, and of files that are in no checkpoint directory, are never returned.
    """
    found = []
    for upload in uploads:
        try:
            name = parse_directory(upload.key.rpartition("/")[0])
        except CheckpointError:
            continue
        superseded = name.generation < current_generation and name.step <= newest_committed_step
        old = name.generation <= current_generation and upload.age_s >= UPLOAD_AGE_S
        if superseded or old:
            found.append(upload)
    return found


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
