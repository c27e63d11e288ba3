"""OOM kills in the cgroup of a process; real ones if this process may create a memory cgroup."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_pt.workers.cgroup import OomKills, oom_counter, oom_counters, read_oom_kills

LIMIT_BYTES = 64 * 1024 * 1024
V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V1_GROUPS = "6:freezer:/\n4:memory:/api/d7b4\n0::/\n"
V2_MOUNTS = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V2_PART_MOUNTS = "30 23 0:26 /kubepods/pod1/c2 /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n"


@pytest.mark.parametrize(
    ("groups", "mounts", "expected"),
    [
        (
            V1_GROUPS,
            V1_MOUNTS,
            [
                "/sys/fs/cgroup/memory/api/d7b4/memory.oom_control",
                "/sys/fs/cgroup/unified/memory.events",
            ],
        ),
        (
            "0::/system.slice/a.service\n",
            V2_MOUNTS,
            ["/sys/fs/cgroup/system.slice/a.service/memory.events"],
        ),
        ("0::/\n", V2_MOUNTS, ["/sys/fs/cgroup/memory.events"]),
        (
            "0::/kubepods/pod1/c2/inner\n",
            V2_PART_MOUNTS,
            ["/sys/fs/cgroup/inner/memory.events"],
        ),
        ("0::/../other\n", V2_PART_MOUNTS, ["/sys/fs/cgroup/memory.events"]),
        ("4:memory:/x\n", V2_MOUNTS, []),
    ],
)
def test_the_counter_file_of_a_process_is_found(
    groups: str, mounts: str, expected: list[str]
) -> None:
    """Cgroup v1 and v2, on a host and in containers that see a part of the hierarchy."""
    assert [str(path) for path in oom_counters(groups, mounts)] == expected


@pytest.mark.parametrize(
    ("text", "kills"),
    [
        ("low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 1\n", 3),
        ("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n", 2),
        ("pgfault 17\noom_kill 5\nnuma_hit 3\n", 5),
        ("low 0\nhigh 0\n", 0),
    ],
)
def test_each_kind_of_counter_file_is_read(tmp_path: Path, text: str, kills: int) -> None:
    """`memory.events` of v2, `memory.oom_control` of v1 and `/proc/vmstat` have one line in common, which is read."""
    (tmp_path / "file").write_text(text)
    assert read_oom_kills(tmp_path / "file") == kills
    assert read_oom_kills(tmp_path / "none") == 0


@pytest.fixture
def small_memory_group() -> Iterator[Path]:
    """A new cgroup with little memory; skips if this process may not create one."""
    group = f"elastic_pt-test-{os.getpid()}"
    for parent, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        try:
            (parent / group).mkdir()
            (parent / group / limit).write_text(str(LIMIT_BYTES))
        except OSError:
            if (parent / group).is_dir():
                (parent / group).rmdir()
            continue
        yield parent / group
        (parent / group).rmdir()
        return
    pytest.skip("no memory cgroup can be created here")


@pytest.mark.parametrize(("size_bytes", "happens"), [(4 * LIMIT_BYTES, True), (0, False)])
def test_an_oom_kill_is_counted_and_another_kill_is_not(
    small_memory_group: Path, size_bytes: int, happens: bool
) -> None:
    """An OOM kill is counted in the process's cgroup. Another kill is not."""
    allocate = f"input(); block = b'x' * {size_bytes}; input()"
    with subprocess.Popen([sys.executable, "-c", allocate], stdin=subprocess.PIPE) as child:
        try:
            (small_memory_group / "cgroup.procs").write_text(str(child.pid))
            assert oom_counter(child.pid).parent == small_memory_group
            oom_kills = OomKills(child.pid)
            assert child.stdin is not None
            child.stdin.write(b"\n")
            child.stdin.flush()
            if not happens:
                child.kill()
            assert child.wait(30) == -signal.SIGKILL
            assert oom_kills.happened() is happens
        finally:
            child.kill()


def test_limit_of_a_group_around_this_one_is_found(small_memory_group: Path) -> None:
    """A process has the least limit of its own group and of those around it, such as that of its container."""
    code = (
        "from elastic_pt.workers.cgroup import read_limit; input(); "
        "print(read_limit('memory', 'memory.max', 'memory.limit_in_bytes'))"
    )
    inner = small_memory_group / "inner"
    inner.mkdir()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            (inner / "cgroup.procs").write_text(str(child.pid))
            out, _ = child.communicate(b"\n", timeout=60)
    finally:
        inner.rmdir()
    assert int(out) == LIMIT_BYTES
