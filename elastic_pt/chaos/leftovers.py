"""What a run has left on its machines: processes, memory, semaphores, sockets, files, unfinished uploads.

Each node of a chaos run has directories of its own for what it keeps in memory and for temporary files, so all that is
found belongs to this run, whatever else runs on the machine. Called by the process of a chaos run.

A machine that was lost keeps what it held until an agent starts on it again, which removes it. So only nodes whose
agent has ended by itself must be clean.
"""

import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

from elastic_pt.chaos.processes import marked
from elastic_pt.config import Config
from elastic_pt.config.sections import CheckpointSection
from elastic_pt.store.local import UNFINISHED
from elastic_pt.store.port import KeepsUnfinished, Store

SHARED_MEMORY: Final = Path("/dev/shm")
_GRACE_S: Final = 5.0
_POLL_S: Final = 0.05
_CLOCK_S: Final = 1.0


class Places:
    """Where the nodes of one run keep what is not in the run's directory. Removed by `close`."""

    def __init__(self, name: str) -> None:
        """`name` is unique on this machine, and short: sockets are below it."""
        # Not the prefix of the agents' own directories, which other agents on this machine would sweep.
        self.directory = SHARED_MEMORY / f"chaos-{name}"
        self._scratch: dict[str, str] = {}
        """Names of the agents' own directories, each with its node."""

    def settings(self, node: str, config: Config) -> tuple[list[str], dict[str, str]]:
        """Overrides of the configuration and variables for a node's agent; makes the directories.

        A configuration that names directories itself keeps them.
        """
        staging, temporary = self.staging(node), self.directory / f"{node}.tmp"
        for each in (staging, temporary):
            each.mkdir(parents=True, exist_ok=True)
        cache = self.directory / f"{node}.cache"
        # torch makes this one for the user of the machine, whatever runs.
        variables = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
        overrides = []
        if config.checkpoint.staging == CheckpointSection().staging:
            overrides.append(f"checkpoint.staging={staging}")
        if not config.data.cache:
            overrides.append(f"data.cache={cache / 'tokens'}")
        return overrides, variables

    def staging(self, node: str) -> Path:
        """Where a node keeps states in memory (`checkpoint.staging`)."""
        return self.directory / node

    def look(self) -> None:
        """Note the directories that the agents have made: their semaphores have the same names."""
        for each in self.directory.glob("*/elastic_pt-*"):
            self._scratch[each.name] = each.parent.name

    def held_by(self, node: str) -> list[str]:
        """What is in the memory and among the temporary files of a node."""
        folders = (self.staging(node), self.directory / f"{node}.tmp")
        found = [each for folder in folders if folder.exists() for each in folder.iterdir()]
        return [str(each) for each in (*found, *self._semaphores(node))]

    def _semaphores(self, node: str) -> list[Path]:
        self.look()
        names = [name for name, owner in self._scratch.items() if owner == node]
        return [each for name in names for each in SHARED_MEMORY.glob(f"sem.{name}-*")]

    def close(self) -> None:
        """Remove everything."""
        for node in set(self._scratch.values()):
            for each in self._semaphores(node):
                each.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def left_by(mark: str, places: Places, clean: Collection[str]) -> tuple[str, ...]:
    """What a run has left on this machine. Waits some seconds for its processes to end.

    `clean`: the nodes whose agent has ended by itself.
    """
    found = [f"process {pid}" for pid in _processes_left(lambda: list(marked(mark)))]
    found += [each for node in sorted(clean) for each in places.held_by(node)]
    return tuple(found)


def _processes_left(find: Callable[[], list[int]]) -> list[int]:
    deadline_s = time.monotonic() + _GRACE_S
    while (found := find()) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    return found


def unfinished_in(store: Store, directory: Path, since_at_s: float) -> Iterator[str]:
    """Files and uploads of a run's directory that nobody has finished or removed.

    Only those that were begun after `since_at_s` (Unix time): an older one may be that of a writer that was killed,
    which a later writer or sweep removes after an hour. `directory` has the logs of the nodes.
    """
    if isinstance(store, KeepsUnfinished):
        for upload in store.unfinished(""):
            if time.time() - upload.age_s > since_at_s + _CLOCK_S:
                yield f"unfinished upload of {upload.key}"
    folders = [directory]
    if store.url.startswith("file://"):
        folders.append(Path(store.url.removeprefix("file://")))
    for folder in folders:
        hidden = [*(folder / UNFINISHED).glob("*"), *folder.rglob("*.part")]
        for path in hidden:
            if path.stat().st_mtime > since_at_s + _CLOCK_S:
                yield str(path)
