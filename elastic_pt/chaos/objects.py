"""Which objects a completed run may have left in its directory. Only reads; the process of a chaos run.

    log ─► check_kept                      each COMMIT keeps the newest checkpoints, as many as `checkpoint.keep`
    log, listing ─► objects_of ─► strays   each object belongs to something; what has expired is gone

docs/run-directory.md has all that may be there. A writer that was killed, or that nobody heard, leaves more: uncommitted
checkpoints, histories, cards of waiting nodes. It is tolerated if it was begun before the last fault ended.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from elastic_pt.chaos.directory import Objection
from elastic_pt.chaos.play import Played
from elastic_pt.checkpoint.index import read_root
from elastic_pt.checkpoint.layout import DirectoryName, manifest_key, parse_directory
from elastic_pt.errors import CheckpointError
from elastic_pt.membership.lobby import LOBBY, members_in
from elastic_pt.runlog.log import RunLog, record_key
from elastic_pt.runlog.records import Checkpoint, Commit, Generation, Quarantine, Record
from elastic_pt.store.port import Store

CHECKPOINTS: Final = "ckpt/"
"""All checkpoints, also those that were not committed, are below this key."""
_KEPT_MIN: Final = 2
_SINGLE: Final = (
    *("config.toml", "identity.json", "pulse.json"),
    *("secret/token", "secret/authority.pem"),
)
_EVENTS: Final = r"events/(?P<node>[^/]+)-[0-9a-f]{8}/(?:\d{8}\.jsonl|account\.json)"
_CHECKPOINT_FILE: Final = r"(?:shard-\d{5}\.safetensors|(?:node|notice)-\d{5}\.json|manifest\.json)"
_HISTORY: Final = (
    r"(?P<first>history/(?P<name>\d{10}-g\d{1,10}-[0-9a-z]{4,32})-(?P<record>\d+))(\.\d+)?\.jsonl"
)
_CHECK: Final = r"storage-check-[0-9a-f]+/.*"
_LATE_S: Final = 5.0
"""So long after the end of a fault, writers that it had stopped may still write what nobody removes any more."""


def check_kept(records: Sequence[Record], keep: int) -> str:
    """Each COMMIT keeps its own checkpoint and the newest ones before, that nobody has found unusable. Raises `Objection`."""
    kept: list[Checkpoint] = []
    for record in records:
        if isinstance(record.body, Quarantine):
            kept = [each for each in kept if each.directory != record.body.directory]
        elif isinstance(record.body, Commit):
            kept = [record.body.newest, *kept][: max(keep, _KEPT_MIN)]
            if (found := list(record.body.checkpoints)) != kept:
                raise Objection(
                    f"record {record.index}: keeps the checkpoints of steps {[each.step for each in found]}, "
                    f"expected {[each.step for each in kept]}"
                )
    return f"checkpoints of steps {[each.step for each in kept]} are kept"


@dataclass(frozen=True)
class Objects:
    """The objects of a run that has completed. Pure."""

    keys: Sequence[str]
    kept: Mapping[str, Collection[str]]
    """The keys of each checkpoint that may be used, by directory."""
    permanent: Collection[str]
    """The directories of checkpoints that are never removed, also if they cannot be used."""
    records: Sequence[Record]
    played: Played

    def strays(self) -> Iterator[str]:
        """The keys of all objects that belong to nothing."""
        names = {each.node for each in self.played.lives}
        for key in self.keys:
            events = re.fullmatch(_EVENTS, key)
            known = (
                key in _SINGLE
                or key in self._records
                or (events is not None and events["node"] in names)
                or self._of_a_checkpoint(key)
                or self._of_a_history(key)
                or self._of_a_start(key)
            )
            if not known:
                yield key

    @cached_property
    def _records(self) -> set[str]:
        return {record_key(each.index) for each in self.records}

    def _of_a_checkpoint(self, key: str) -> bool:
        directory, _, name = key.rpartition("/")
        if directory in self.kept:
            return key in self.kept[directory]
        try:
            attempt = parse_directory(directory)
        except CheckpointError:
            return False
        known = re.fullmatch(_CHECKPOINT_FILE, name) is not None
        return known and (directory in self.permanent or self._may_be_left(directory, attempt))

    def _may_be_left(self, directory: str, attempt: DirectoryName) -> bool:
        """Whether no sweep had to remove this checkpoint, which does not count.

        The newest generation has given up an attempt less than an hour ago; or a fault lasted until the last sweep, which
        follows the last commit.
        """
        if self._disturbed_until_s >= self._last_commit_at_s:
            return True
        newest = max(each.generation for each in self.records)
        given_up = attempt.generation == newest and directory not in self._committed
        return given_up and self._was_disturbed(attempt)

    def _was_disturbed(self, attempt: DirectoryName) -> bool:
        """Whether its step was done, for the first time by its generation, while a fault could make its writers give it up."""
        began_at_s = min(
            (
                each.written_at_s
                for each in self.records
                if isinstance(each.body, Generation) and each.body.number == attempt.generation
            ),
            default=0.0,
        )
        done = (
            each.time_s
            for each in self.played.progress
            if each.time_s >= began_at_s and each.step >= attempt.step
        )
        return next(done, math.inf) <= self._given_up_until_s

    @cached_property
    def _given_up_until_s(self) -> float:
        """Until when an attempt may be given up: writers that a fault has kept waiting come back with the next commit."""
        quiet_at_s = self.played.quiet_at_s
        if all(each.spec.for_s is None for each in self.played.struck):
            return quiet_at_s
        commits = (each.written_at_s for each in self.records if isinstance(each.body, Commit))
        return min((each for each in commits if each > quiet_at_s), default=quiet_at_s)

    @cached_property
    def _committed(self) -> set[str]:
        return {
            each.body.newest.directory for each in self.records if isinstance(each.body, Commit)
        }

    @cached_property
    def _disturbed_until_s(self) -> float:
        """Until when a fault may keep a sweep from its work, or a writer that it had stopped may still write."""
        late_s = (
            each.over_at_s + _LATE_S * (each.spec.for_s is not None) for each in self.played.struck
        )
        return max(late_s, default=0.0)

    @cached_property
    def _last_commit_at_s(self) -> float:
        commits = (each for each in self.records if isinstance(each.body, Commit))
        return max((each.written_at_s for each in commits), default=0.0)

    @cached_property
    def _histories(self) -> set[str]:
        return {each.body.history for each in self.records if isinstance(each.body, Commit)}

    def _of_a_history(self, key: str) -> bool:
        """Whether a COMMIT names it, or its writer could not commit: nobody removes it then."""
        found = re.fullmatch(_HISTORY, key)
        if found is None:
            return False
        later = self.records[int(found["record"]) :]
        kinds = [type(each.body) for each in later if isinstance(each.body, Commit | Generation)]
        return (
            f"{found['first']}.jsonl" in self._histories
            or kinds[:1] == [Generation]
            or self._was_disturbed(parse_directory(f"{CHECKPOINTS}{found['name']}"))
        )

    def _of_a_start(self, key: str) -> bool:
        """Whether a node that was disturbed as it started has left it: its card, or objects of the check of the store."""
        struck = self.played.struck
        if not key.startswith(LOBBY):
            early = any(each.generation == 0 for each in struck)
            return early and re.fullmatch(_CHECK, key) is not None
        cards = {(each.node, each.pid) for each in members_in([key])}
        # Nobody deletes the card of a node again that could not delete it.
        lasted = any(each.spec.for_s is not None for each in struck)
        return any(
            (each.node, each.pid) in cards and (lasted or each.exit_code != 0)
            for each in self.played.lives
        )


def objects_of(store: Store, log: RunLog, records: Sequence[Record], played: Played) -> Objects:
    """What is in the directory of a run. Raises `CheckpointError` for a checkpoint that counts and cannot be read."""
    view = log.view
    kept = {
        each.directory: {
            manifest_key(each.directory),
            *read_root(store, each, view.run_id).removable,
        }
        for each in log.usable(view)
    }
    permanent = {each.directory for each, _ in log.permanent(view)}
    return Objects(store.keys(""), kept, permanent, records, played)
