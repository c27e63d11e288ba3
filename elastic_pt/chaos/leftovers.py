"""What a run has left on its machines: processes, memory, semaphores, sockets, files, unfinished uploads.

Each node of a chaos run has directories of its own for what it keeps in memory, for temporary files, as its home and as
its current directory, so all that is found belongs to this run, whatever else runs on the machine. As root it also has
its own `/tmp`, `/var/tmp` and `/dev/shm` (`mounts`), where semaphores are, too. Called by the process of a chaos run.

A machine that was lost keeps what it held until an agent starts on it again, which removes it. So only nodes whose
agent has ended by itself must be clean.
"""

import os
import shutil
import signal
import site
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from elastic_pt.chaos.mounts import (
    below,
    hidden,
    missing_for_mounts,
    of_the_program,
    prefix_for_mounts,
)
from elastic_pt.chaos.processes import marked, those_in
from elastic_pt.config import Config
from elastic_pt.config.sections import CheckpointSection
from elastic_pt.store.local import UNFINISHED
from elastic_pt.store.port import KeepsUnfinished, Store

SHARED_MEMORY: Final = Path("/dev/shm")
_TMP: Final = Path("/tmp")
_TEMPORARY, _HOME, _CURRENT = Path("temporary"), Path("home"), Path("current")
"""What a node has of its own without root, too."""
_GRACE_S: Final = 5.0
_POLL_S: Final = 0.05
_CLOCK_S: Final = 1.0


class Places:
    """Where the nodes of one run keep what is not in the run's directory. Removed by `close`."""

    def __init__(self, name: str, config: Config, directory: Path) -> None:
        """`name` is unique on this machine, and short: sockets are below it. `directory` has the logs of the nodes."""
        # Not the prefix of the agents' own directories, which other agents on this machine would sweep.
        self.directory = (SHARED_MEMORY / f"chaos-{name}").resolve()
        self.sockets = self.directory / "sockets"
        self.sockets.mkdir(parents=True)
        self._config = config
        urls = (config.run.url, config.data.url)
        stores = [Path(each.removeprefix("file://")) for each in urls if each.startswith("file://")]
        for each in stores:
            each.mkdir(parents=True, exist_ok=True)
        used = (self.directory, directory, *stores, *of_the_program())
        # A path that leads through a link must stay as it is, too.
        self._kept = frozenset(path for each in used for path in (each.absolute(), each.resolve()))
        self._hidden = () if missing_for_mounts() else tuple(hidden(self._kept))

    def settings(self, node: str) -> tuple[list[str], dict[str, str]]:
        """Overrides of the configuration and variables for a node's agent; makes the directories.

        A configuration that names directories itself keeps them.
        """
        staging, cache = self.staging(node), self.directory / f"{node}.cache"
        for each in (staging, *self._own(node).values()):
            each.mkdir(parents=True, exist_ok=True)
        temporary = _TMP if _TMP in self._hidden else self._own(node)[_TEMPORARY]
        variables = {
            "TMPDIR": str(temporary),
            "HOME": str(self._own(node)[_HOME]),
            # By default it is below the home directory.
            "PYTHONUSERBASE": site.getuserbase(),
            # torch makes this one for the user of the machine, whatever runs.
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        }
        overrides = []
        if self._config.checkpoint.staging == CheckpointSection().staging:
            overrides.append(f"checkpoint.staging={staging}")
        if not self._config.data.cache:
            overrides.append(f"data.cache={cache / 'tokens'}")
        return overrides, variables

    def prefix(self, node: str) -> list[str]:
        """Words to put before the command of a node's agent, under the same process id; after `settings`."""
        own = {each: self._own(node)[each] for each in self._hidden}
        return prefix_for_mounts(own, self._kept) if own else []

    def staging(self, node: str) -> Path:
        """Where a node keeps states in memory (`checkpoint.staging`)."""
        return self.directory / node

    def current(self, node: str) -> Path:
        """The current directory of a node's agent."""
        return self._own(node)[_CURRENT]

    def _own(self, node: str) -> Mapping[Path, Path]:
        """The directories that a node has of its own, by what they stand for."""
        own = self.directory / f"{node}.own"
        return {
            each: own / str(each).strip("/").replace("/", "-")
            for each in (_TEMPORARY, _HOME, _CURRENT, *self._hidden)
        }

    def held_by(self, node: str) -> list[str]:
        """What is in the memory and among the files of a node."""
        staging = self.staging(node)
        found = [str(each) for each in staging.iterdir()] if staging.exists() else []
        for shared, own in self._own(node).items():
            mounted = below(shared, self._kept)
            expected = {Path(), *mounted, *(up for each in mounted for up in each.parents)}
            for each in own.rglob("*"):
                if each.relative_to(own) not in expected:
                    found.append(str(shared / each.relative_to(own)))
        return found

    def close(self) -> None:
        """Remove everything."""
        for pid in those_in(self.directory):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # The next agent on a machine would remove the semaphores of a killed one, by the name of its directory.
        for scratch in self.directory.glob("*/elastic_pt-*"):
            for each in SHARED_MEMORY.glob(f"sem.{scratch.name}-*"):
                each.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def left_by(mark: str, places: Places, clean: Collection[str]) -> tuple[str, ...]:
    """What a run has left on this machine. Waits some seconds for its processes to end.

    `clean`: the nodes whose agent has ended by itself.
    """
    found = [f"process {pid}" for pid in _processes_left(lambda: _processes(mark, places))]
    found += [each for node in sorted(clean) for each in places.held_by(node)]
    return tuple(found)


def _processes(mark: str, places: Places) -> list[int]:
    return sorted({*marked(mark), *those_in(places.directory)})


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
