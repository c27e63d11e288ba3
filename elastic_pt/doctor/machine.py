"""Checks of this machine alone. They send no request, and take milliseconds.

    configuration, vocabulary, nodes ─► Needs ─┐
    the kernel's files and limits ─────────────┴─► Check

Agent process, and the command line's process.
"""

import os
import platform
import resource
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from elastic_pt import __version__
from elastic_pt.checkpoint.footprint import footprint
from elastic_pt.config import Config
from elastic_pt.data.cache import cache_directory
from elastic_pt.data.manifest import TOKEN_BYTES, Manifest
from elastic_pt.doctor.check import Check, judged, required, size
from elastic_pt.doctor.requirements import require_cache
from elastic_pt.workers.cgroup import read_limit
from elastic_pt.workers.scratch import scratches

TORCH_MIN: Final = (2, 10)
_MIB: Final = 2**20
_OWN_SHARES: Final = 7
"""Three for this node's own workers, two while a new generation starts, two for an upload of the one before."""
_MIRRORED_SHARES: Final = 3
"""For each node that this one mirrors."""
_WORKING_BYTES: Final = 16
"""Bytes per parameter of a worker without a GPU: weights, gradients and both moments in float32."""
_PROCESS_BYTES: Final = 400 * _MIB
"""Of an agent or worker that has torch imported, without its model."""
_CONTAINER_SHM_BYTES: Final = 64 * _MIB
"""What containers give to /dev/shm if nobody asks for more."""
_IN_MEMORY: Final = ("tmpfs", "ramfs", "hugetlbfs")


@dataclass(frozen=True)
class Needs:
    """What a run asks of one of its nodes."""

    nodes: int
    """Nodes that train together. With fewer nodes the shares are larger."""
    workers: int
    """Workers of this node."""
    ranks: int
    """Workers of all nodes, at most."""
    threads: int
    """Threads per worker."""
    parameters: int
    state_bytes: int
    """Weights and optimizer state of all workers together."""
    copies: int
    """How many nodes this one mirrors."""
    on_gpu: bool

    @property
    def share_bytes(self) -> int:
        """This node's share of the state, which is what it uploads for a checkpoint."""
        return -(-self.state_bytes // self.nodes)

    @property
    def staging_bytes(self) -> int:
        """Room for states in memory (docs/recovery.md)."""
        return self.share_bytes * (_OWN_SHARES + _MIRRORED_SHARES * self.copies)

    def memory_bytes(self, *, staging_in_memory: bool) -> int:
        """The least memory of a node, without activations and caches."""
        model = 0 if self.on_gpu else _WORKING_BYTES * self.parameters // self.nodes
        staging = self.staging_bytes if staging_in_memory else 0
        return staging + model + (self.workers + 1) * _PROCESS_BYTES

    @property
    def open_files(self) -> int:
        """Connections to the bucket and to peers, pipes, and the sockets of collectives."""
        return 512 + 8 * self.ranks

    @property
    def processes(self) -> int:
        """Processes and threads of an agent and its workers."""
        return 256 + self.workers * (64 + self.threads)


def needs_of(config: Config, vocabulary: int, nodes: int | None, workers: int) -> Needs:
    """What a run of so many nodes asks of one of them. Pure.

    Without `nodes`: as many as `elastic.nodes_min`, but two where two may train. A run is rarely sized for one node.
    """
    elastic, model = config.elastic, footprint(config.model, vocabulary)
    nodes = nodes or max(elastic.nodes_min, min(2, elastic.nodes_max))
    return Needs(
        nodes=nodes,
        workers=workers,
        ranks=min(config.train.slots, elastic.nodes_max * workers),
        threads=config.train.threads,
        parameters=model.parameters,
        state_bytes=model.checkpoint_bytes,
        copies=min(config.checkpoint.mirror_copies, nodes - 1),
        on_gpu=config.train.device != "cpu" and torch.cuda.device_count() > 0,
    )


def local_checks(path: Path, needs: Needs | None) -> Iterator[Check]:
    """All checks of this module but those of the data's cache and of versions. `path` is `checkpoint.staging`."""
    if needs is not None:
        yield memory(needs, file_system_of(path) in _IN_MEMORY)
        yield processors(needs)
    yield staging(path, needs)
    yield open_files(1024 if needs is None else needs.open_files)
    yield processes(512 if needs is None else needs.processes)
    if Path("/sys/class/infiniband").is_dir() and torch.cuda.device_count():
        yield locked_memory()


def versions() -> Check:
    """Versions of this program, torch and Python."""
    ours, python, found = __version__, platform.python_version(), torch.__version__
    return judged(
        "versions",
        tuple(int(part) for part in found.split(".")[:2]) >= TORCH_MIN,
        f"elastic_pt {ours}, torch {found}, Python {python}",
        f"torch {'.'.join(map(str, TORCH_MIN))} or later",
        "install elastic_pt with constraints.txt (README, Installing)",
    )


def memory(needs: Needs, staging_in_memory: bool) -> Check:
    """The memory that this machine or its container has, against what the run takes at least."""
    there, limited = machine_memory(), read_limit("memory", "memory.max", "memory.limit_in_bytes")
    usable = there if limited is None else min(there, limited)
    least = needs.memory_bytes(staging_in_memory=staging_in_memory)
    states = ", states in memory included" if staging_in_memory else ""
    return judged(
        "memory",
        usable >= least,
        f"{size(usable)}" + (" (limit of the cgroup)" if usable < there else ""),
        f"{size(least)} or more (nodes: {needs.nodes}{states})",
        "use a larger machine or more nodes, or raise the container's memory limit; /dev/shm counts against it",
    )


def machine_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processors(needs: Needs) -> Check:
    """Processors for all workers' threads."""
    there = len(os.sched_getaffinity(0))
    limit = _processor_limit()
    usable = there if limit is None else min(float(there), limit)
    wanted = needs.workers * needs.threads
    return judged(
        "processors",
        usable >= wanted,
        f"{usable:g}" + (f" (limit of the cgroup; {there} visible)" if usable < there else ""),
        f"{wanted} or more (workers: {needs.workers}, threads of each: {needs.threads})",
        "lower elastic.workers_per_node or, in a new run, train.threads; or give the container more processors",
    )


def _processor_limit() -> float | None:
    quota = read_limit("cpu", "cpu.max", "cpu.cfs_quota_us")
    return None if quota is None else quota / 100_000


def staging(path: Path, needs: Needs | None) -> Check:
    """The directory of states in memory, against what the run keeps there; or against a container's default."""
    expected = f"more than {size(_CONTAINER_SHM_BYTES)}, which is the default of containers"
    wanted, room = _CONTAINER_SHM_BYTES + 1, 0
    if needs is not None:
        wanted, shares = needs.staging_bytes, _OWN_SHARES + _MIRRORED_SHARES * needs.copies
        expected = (
            f"{size(wanted)}: {shares} shares of {size(needs.share_bytes)} (nodes: {needs.nodes})"
        )
    try:
        # What agents of this machine keep there is part of what the run takes.
        room = shutil.disk_usage(path).free + sum(map(bytes_below, scratches(path)))
        found = _staging_found(path)
    except OSError as error:
        found = f"{path}: {error.strerror}"
    return judged(
        "staging",
        room >= wanted and os.access(path, os.W_OK | os.X_OK),
        found,
        f"a writable directory with room for {expected}"
        if needs
        else f"a writable directory of {expected}",
        "docker run --shm-size=SIZE; in Kubernetes sizeLimit of the emptyDir at /dev/shm; on a machine "
        f"mount -o remount,size=SIZE {path}; or more nodes (--nodes N: how many there will be)",
    )


def _staging_found(path: Path) -> str:
    usage = shutil.disk_usage(path)
    kind = file_system_of(path)
    found = f"{path}: {size(usage.free)} free of {size(usage.total)}"
    found += "" if os.access(path, os.W_OK | os.X_OK) else ", not writable for this user"
    return found if kind in _IN_MEMORY else f"{found}, on {kind or 'a disk'}, not in memory"


def file_system_of(path: Path) -> str:
    """The type of the file system at a path, such as `tmpfs`; empty if it cannot be told."""
    found, longest = "", -1
    with suppress(OSError):
        resolved = path.resolve()
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, point, kind = line.split()[:3]
            if resolved.is_relative_to(point) and len(point) >= longest:
                found, longest = kind, len(point)
    return found


def cache(config: Config, data: Manifest) -> Check:
    """The directory of fetched blocks: its owner, its limit, and room for what the run reads."""
    directory = cache_directory(config.data.cache)
    read = data.tokens("train") * TOKEN_BYTES[data.token_type]
    wanted = min(read, config.data.cache_bytes)
    expected = f"room for {size(wanted)}: the data, or data.cache_bytes"
    remedy = "set data.cache to a directory of your own on a larger local disk; smaller works, but fetches blocks again"

    def look() -> str:
        require_cache(config, data)
        return f"{directory}: {size(shutil.disk_usage(directory).free)} free"

    check = required("cache", expected, remedy, look)
    if not check.ok:
        return check
    free = shutil.disk_usage(directory).free
    free += 0 if free >= wanted else bytes_below(directory)
    return judged("cache", free >= wanted, check.found, expected, remedy)


def bytes_below(directory: Path) -> int:
    """Bytes that the files below a directory take on the disk; of those that this user can see."""
    taken = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                taken += os.lstat(f"{folder}/{name}").st_blocks * 512
    return taken


def open_files(wanted: int) -> Check:
    """RLIMIT_NOFILE, of which the soft limit counts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return judged(
        "open_files",
        _limit(soft) >= wanted,
        f"at most {_shown(soft)} (hard limit {_shown(hard)})",
        f"{wanted:,} or more",
        f"ulimit -n {max(wanted, 65536)} before the start; systemd: LimitNOFILE; docker run --ulimit nofile",
    )


def processes(wanted: int) -> Check:
    """RLIMIT_NPROC of this user, and the cgroup's limit of processes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    pids = read_limit("pids", "pids.max", "pids.max")
    least = min(_limit(soft), _limit(-1) if pids is None else pids)
    return judged(
        "processes",
        least >= wanted,
        f"at most {_shown(soft)}" + ("" if pids is None else f", {pids:,} in this cgroup"),
        f"{wanted:,} or more, threads included",
        f"ulimit -u {max(wanted, 8192)} before the start; systemd: TasksMax; docker run --pids-limit",
    )


def locked_memory() -> Check:
    """RLIMIT_MEMLOCK: InfiniBand registers memory, which locks it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return judged(
        "locked_memory",
        soft == resource.RLIM_INFINITY,
        "unlimited" if soft == resource.RLIM_INFINITY else size(soft),
        "unlimited, because NCCL locks memory for InfiniBand",
        "ulimit -l unlimited; systemd: LimitMEMLOCK=infinity; docker run --ulimit memlock=-1",
    )


def _limit(value: int) -> int:
    return 2**62 if value == resource.RLIM_INFINITY else value


def _shown(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"
