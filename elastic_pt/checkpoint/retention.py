"""Which checkpoint directories may be deleted, and in which order their files are deleted.

Two kinds of directories are deleted: committed checkpoints that are no longer kept (`expired`), and incomplete
uploads of older generations (`leftovers`). Both decisions are pure functions. A directory without a commit stays while
a node could still commit it. It is deleted only if its generation was replaced *and* a checkpoint of its step or a
later one is committed. So an agent that has read an old log deletes less, never more.

A permanent checkpoint (`is_permanent`) is in neither group. Later COMMITs no longer name it, but its files stay:
`RunLog.permanent` finds it. Two more groups are removed when they are old enough: attempts of the current generation
before a later commit (`overtaken`), and parts of unfinished uploads (`abandoned`). After the end of a completed run
nothing can be committed any more: all that is not kept may go (`unnamed`).

`remove` deletes the manifest first, so that nothing takes a partly removed checkpoint for a complete one.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from elastic_pt.checkpoint.layout import (
    FullManifest,
    manifest_key,
    parse_directory,
)
from elastic_pt.checkpoint.nodes import RootManifest
from elastic_pt.checkpoint.record import DOCUMENT_BYTES_MAX, decode
from elastic_pt.errors import CheckpointError, NotFound
from elastic_pt.failpoints import Failpoint, failpoint
from elastic_pt.runlog.records import Checkpoint
from elastic_pt.store.port import Store, UnfinishedUpload

KEPT_MIN: Final = 2
"""Minimum number of kept commits: the newest may be damaged, and a worker may be reading the one before."""
UPLOAD_AGE_S: Final = 86_400.0
"""After a day an unfinished upload of one file has no writer any more."""
_DELETE_THREADS: Final = 16


def is_permanent(step: int, previous_step: int, keep_every_steps: int) -> bool:
    """Whether the commit of `step` is the first one at or after a multiple of `keep_every_steps` (0: never).

    `previous_step` is the step of the newest usable commit before, 0 if there is none. If a run falls back to a step
    before a quarantined permanent checkpoint, it reaches the same multiple again and commits another permanent one.
    """
    return keep_every_steps > 0 and step // keep_every_steps > previous_step // keep_every_steps


def kept(checkpoints: Sequence[Checkpoint], keep: int) -> list[Checkpoint]:
    """The checkpoints that a COMMIT names: the first `keep` >= 1, and never fewer than `KEPT_MIN`.

    `checkpoints` are the usable committed ones, newest commit first. This is the order of the log, not of the
    steps: after a fall back a run commits an earlier step later.
    """
    assert keep >= 1, f"keep = {keep}: the newest checkpoint is never deleted"
    return list(dict.fromkeys(checkpoints))[: max(keep, KEPT_MIN)]


def expired(checkpoints: Sequence[Checkpoint], keep: int) -> list[Checkpoint]:
    """The checkpoints to delete, newest first: neither `kept` nor permanent."""
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


def overtaken(
    directories: Sequence[str], committed: Collection[str], newest: Checkpoint
) -> list[str]:
    """Directories of attempts that the generation of the `newest` commit gave up: it has committed a later step since.

    Its committing node commits one step after the other, so it will not commit them any more. An upload of one of
    their files may still be running, so the caller waits for a while.
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


def unnamed(directories: Sequence[str], kept: Collection[str]) -> list[str]:
    """All checkpoint directories that are not kept: those to delete once the run is complete."""
    found = []
    for directory in directories:
        with suppress(CheckpointError):
            parse_directory(directory)
            if directory not in kept:
                found.append(directory)
    return found


def abandoned(
    uploads: Sequence[UnfinishedUpload], current_generation: int, newest_committed_step: int
) -> list[UnfinishedUpload]:
    """The unfinished uploads of single files without a writer, from a listing.

    They belong to an attempt that cannot be committed any more (see `leftovers`), or are older than
    `UPLOAD_AGE_S`. An upload in a committed directory is a second attempt for a file that exists. Uploads of a newer
    generation, and of files outside checkpoint directories, are never returned.
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
    """The checkpoint directories in a listing, sorted. A listing may be stale. Agent process."""
    return sorted({key.rpartition("/")[0] for key in store.keys("ckpt/")})


def remove(store: Store, directory: str) -> int:
    """Delete a checkpoint directory: the manifest, then every file in the manifest or in a listing.

    Returns the number of files that were known. Agent process, and that of `elastic-pt tidy`. May be repeated, also after a crash in the middle. Raises `CheckpointError` if this is not a checkpoint directory,
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
    failpoint(Failpoint.REMOVAL_LISTED)
    store.delete(manifest_key(directory))
    failpoint(Failpoint.REMOVAL_MANIFEST)
    with ThreadPoolExecutor(_DELETE_THREADS) as pool:
        for _ in pool.map(store.delete, sorted(keys - {manifest_key(directory)})):
            failpoint(Failpoint.REMOVAL_FILE)
    return len(keys)
