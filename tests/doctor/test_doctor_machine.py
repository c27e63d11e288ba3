"""`elastic-pt doctor` on a machine: limits that are small, /dev/shm that is small, GPUs, and the time to leave."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import structlog

from elastic_pt.chaos.mounts import missing_for_mounts
from elastic_pt.config import Config, ElasticSection, parse_config
from elastic_pt.doctor import gpus, machine, saving
from elastic_pt.doctor.at_start import warn_at_start
from elastic_pt.doctor.bucket import Speed
from elastic_pt.doctor.check import Check, judged, rate, required, seconds, size
from elastic_pt.doctor.gpus import Gpus
from elastic_pt.doctor.machine import Needs, needs_of
from elastic_pt.errors import ConfigError
from elastic_pt.notices.detect import Machine, read_machine
from tests.services.fixtures import left_out

GIB = 2**30
CONFIG = '[run]\nurl = "{0}/run"\n[data]\nurl = "{0}/data"\n'
NEEDS = Needs(
    nodes=4,
    workers=2,
    ranks=8,
    threads=3,
    parameters=10**8,
    state_bytes=12 * 10**8,
    copies=1,
    on_gpu=False,
)


def config_of(*overrides: str, root: Path = Path("/tmp")) -> Config:
    return parse_config(CONFIG.format(root), source="test", overrides=overrides)


def doctor(
    *arguments: object, before: Sequence[str] = (), shell: str = ""
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and checks of `elastic-pt doctor` in a process of its own, with `shell` run before it."""
    command = [sys.executable, "-m", "elastic_pt", "doctor", *map(str, arguments), "--json"]
    words = [*before, "bash", "-c", f'{shell}\nexec "$@"', "bash", *command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == "", done.stderr
    return done.returncode, {each["name"]: each for each in json.loads(done.stdout)}


# ---- needs ---------------------------------------------------------------------------------------


def test_needs_are_those_of_the_documentation() -> None:
    """docs/operations.md: ten shares of 12 bytes per parameter; a node alone mirrors nobody and needs seven."""
    config = config_of()
    ten = needs_of(config, 300, 4, 1)
    assert ten.state_bytes == 12 * ten.parameters
    assert ten.staging_bytes == 10 * ten.share_bytes == 10 * -(-ten.state_bytes // 4)
    assert needs_of(config, 300, 1, 1).staging_bytes == 7 * ten.state_bytes
    assert needs_of(config_of("checkpoint.mirror_copies=2"), 300, 4, 1).staging_bytes == (
        13 * ten.share_bytes
    )


@pytest.mark.parametrize(
    ("overrides", "nodes", "expected"),
    [
        ((), None, 2),
        (("elastic.nodes_max=1",), None, 1),
        (("elastic.nodes_min=8",), None, 8),
        (("elastic.nodes_min=8",), 3, 3),
    ],
)
def test_a_run_is_sized_for_its_nodes(
    overrides: tuple[str, ...], nodes: int | None, expected: int
) -> None:
    """Nodes that are not known are as few as may train, but two where two may."""
    assert needs_of(config_of(*overrides), 300, nodes, 1).nodes == expected


def test_memory_counts_states_in_memory() -> None:
    """/dev/shm is memory: on tmpfs the states count, on a disk they do not. A GPU holds the model itself."""
    in_memory = NEEDS.memory_bytes(staging_in_memory=True)
    assert in_memory - NEEDS.memory_bytes(staging_in_memory=False) == NEEDS.staging_bytes
    assert replace(NEEDS, on_gpu=True).memory_bytes(staging_in_memory=True) < in_memory


# ---- limits of this machine ------------------------------------------------------------------------


def test_small_limits_are_found() -> None:
    """The limits of the shell that starts a node are the ones that count: too few files and processes."""
    code, found = doctor(shell="ulimit -n 300 -u 500")
    assert code == 1
    assert [name for name, each in found.items() if not each["ok"]] == ["open_files", "processes"]
    assert found["open_files"]["found"].startswith("at most 300 ")
    assert found["open_files"]["remedy"].startswith("ulimit -n 65536")


def test_small_shared_memory_is_found(tmp_path: Path) -> None:
    """A container gives 64 MiB of /dev/shm by default, which is too little for any run that matters."""
    if missing := missing_for_mounts():
        left_out(f"tests with mounts of their own, {missing}")
    small = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    code, found = doctor(before=["unshare", "--mount"], shell=small)
    assert (code, found["staging"]["ok"]) == (1, False)
    assert found["staging"]["found"] == "/dev/shm: 64 MiB free of 64 MiB"


@pytest.mark.parametrize(
    ("change", "expected"),
    [(lambda path: path.rmdir(), "No such file or directory"), (None, "not in memory")],
    ids=["missing", "on a disk"],
)
def test_the_staging_directory_is_described(
    tmp_path: Path, change: Callable[[Path], None] | None, expected: str
) -> None:
    """A directory that is missing is not well. One on a disk is told as such."""
    path = tmp_path / "staging"
    path.mkdir()
    if change is not None:
        change(path)
    check = machine.staging(path, replace(NEEDS, state_bytes=4096))
    assert check.ok == (change is None)
    assert expected in check.found
    assert not machine.staging(path, replace(NEEDS, state_bytes=10**18)).ok


def test_states_of_running_agents_do_not_count_as_missing_room(tmp_path: Path) -> None:
    """What an agent of this machine keeps in its scratch directory is part of the room that the run takes."""
    scratch = tmp_path / "elastic_pt-abc"
    scratch.mkdir()
    (scratch / "state").write_bytes(bytes(3 * 2**20))
    assert machine.bytes_below(scratch) == 3 * 2**20
    free = machine.shutil.disk_usage(tmp_path).free
    needs = replace(NEEDS, state_bytes=(free + 2**20) // 10 * 4)
    assert machine.staging(tmp_path, needs).ok


def test_processors_and_threads() -> None:
    """Every thread of every worker wants a processor."""
    there = len(machine.os.sched_getaffinity(0))
    assert machine.processors(replace(NEEDS, workers=1, threads=1)).ok
    check = machine.processors(replace(NEEDS, workers=there, threads=2))
    assert not check.ok
    assert check.expected.startswith(f"{2 * there} or more")


def test_an_agent_warns_once_for_each_check_that_is_not_well(tmp_path: Path) -> None:
    """The cheap part runs at an agent's start: an event for each finding, with the remedy, and no error."""
    config = config_of(
        "model.width=65536",
        "model.layers=1000",
        "train.threads=1000",
        f"checkpoint.staging={tmp_path}",
        root=tmp_path,
    )
    with structlog.testing.capture_logs() as events:
        warn_at_start(config, 300, None)
    assert {each["event"] for each in events} == {"start_check_failed"}
    assert sorted(each["check"] for each in events) == ["memory", "processors", "staging"]
    assert all(each["remedy"] and each["found"] and each["expected"] for each in events)
    assert not (tmp_path / "run").exists()


# ---- GPUs ------------------------------------------------------------------------------------------

WELL = Gpus(
    cards=2,
    driver="580.1",
    driver_cuda=13000,
    handles=(0, 1),
    torch_cuda="13.0",
    torch_sees=2,
)


@pytest.mark.parametrize(
    ("changes", "workers", "remedy"),
    [
        ({}, 2, ""),
        ({"torch_sees": 1}, 2, "CUDA_VISIBLE_DEVICES"),
        ({"torch_sees": 1}, 1, ""),
        ({"torch_cuda": "", "torch_sees": 0}, 1, "CUDA build"),
        ({"driver": "", "driver_cuda": 0, "handles": (), "torch_sees": 0}, 1, "driver"),
        ({"driver_cuda": 12040, "torch_sees": 0}, 1, "driver for CUDA 13.0"),
    ],
    ids=["well", "hidden", "one is enough", "CPU build", "no driver", "old driver"],
)
def test_gpus_that_torch_cannot_use(changes: dict[str, Any], workers: int, remedy: str) -> None:
    """Each reason why torch sees fewer GPUs than there are has its own remedy."""
    check = gpus.usable(replace(WELL, **changes), workers)
    assert check.ok == (not remedy)
    assert remedy in check.remedy


def test_a_machine_without_gpus_is_not_asked_about_them() -> None:
    """No GPU is no finding, unless the configuration wants one; and a run on the CPU does not look at GPUs."""
    none = replace(WELL, cards=0, driver="", handles=(), torch_sees=0)
    assert list(gpus.gpu_checks(none, config_of())) == []
    assert list(gpus.gpu_checks(none, None)) == []
    assert list(gpus.gpu_checks(WELL, config_of("train.device=cpu"))) == []
    (check,) = gpus.gpu_checks(none, config_of("train.device=cuda"))
    assert (check.name, check.ok) == ("gpus", False)
    assert check.found.startswith("train.device = 'cuda'")


def test_a_card_without_a_driver_is_seen_on_the_bus(tmp_path: Path) -> None:
    """The PCI bus shows an NVIDIA card also where no driver does; a sound device of the same card is none."""
    for name, vendor, kind in (
        ("a", "0x10de", "0x030200"),
        ("b", "0x10de", "0x040300"),
        ("c", "0x8086", "0x030000"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    assert gpus.read_gpus(tmp_path).cards == 1


@pytest.mark.parametrize(
    ("mask", "errors", "remapped", "expected"),
    [
        (0, 0, (0, 0, 0, 0), ""),
        (pynvml.nvmlClocksEventReasonSwPowerCap, 0, (3, 0, 0, 0), ""),
        (pynvml.nvmlClocksEventReasonHwThermalSlowdown, 0, (0, 0, 0, 0), "hardware_thermal"),
        (0, 3, (0, 0, 0, 0), "3 uncorrected memory errors"),
        (0, 0, (0, 1, 0, 1), "could not be replaced"),
        (0, 0, (0, 0, 1, 0), "at the next reset"),
    ],
)
def test_health_of_a_gpu(mask: int, errors: int, remapped: tuple[int, ...], expected: str) -> None:
    """Memory errors and clocks that the hardware holds down are told; a power cap is no trouble."""
    nvml = SimpleNamespace(
        NVMLError=pynvml.NVMLError,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_VOLATILE_ECC=0,
        nvmlDeviceGetName=lambda handle: "H200",
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: mask,
        nvmlDeviceGetTotalEccErrors=lambda handle, kind, counter: errors,
        nvmlDeviceGetRemappedRows=lambda handle: remapped,
    )
    check = gpus.health(0, None, nvml)
    assert check.ok == (not expected)
    assert expected in check.found


# ---- leaving in time -------------------------------------------------------------------------------

PLAIN = Machine(
    dmi={"sys_vendor": "", "product_name": "", "bios_version": "", "chassis_asset_tag": ""},
    mithril=False,
    supervisor="",
)
ON_AWS = replace(PLAIN, dmi={**PLAIN.dmi, "sys_vendor": "Amazon EC2"})


@pytest.mark.parametrize(
    ("up", "watched", "ok", "limit"),
    [
        # A share of 300 MB, with the margin of the agent's own plan: 390 MB within 25 s, or the lead.
        (15.7e6, (), True, "25.0 s, elastic.leave_timeout_s"),
        (15.5e6, (), False, "25.0 s, elastic.leave_timeout_s"),
        (15.7e6, ("aws",), True, "25.0 s, elastic.leave_timeout_s"),
        (4e6, ("gcp",), False, "30.0 s, the notice of gcp"),
    ],
)
def test_a_checkpoint_that_cannot_be_saved_in_time(
    up: float, watched: tuple[str, ...], ok: bool, limit: str
) -> None:
    """The share of a node is uploaded within the shorter of its own limit and its platform's notice, or it is told."""
    leave_s = 40 if watched == ("gcp",) else 25
    config = config_of(f"elastic.leave_timeout_s={leave_s}")
    check = saving.checkpoint(config, NEEDS, Speed(up, up), watched)
    assert check.ok == ok
    assert check.expected == f"at most {limit}"
    assert "100,000,000 parameters" in check.found


@pytest.mark.parametrize(
    ("notices", "where", "ok", "found"),
    [
        ("auto", PLAIN, True, "no source"),
        ("off", PLAIN, True, "no source"),
        ("off", ON_AWS, False, "leaves out"),
        ("auto", replace(ON_AWS, supervisor="kubernetes"), True, "kubernetes sends a signal"),
        ("aws:http://127.0.0.1:9", ON_AWS, False, "aws does not answer"),
        ("file:/tmp/no-such-notice-here", PLAIN, True, "file:/tmp/no-such-notice-here"),
    ],
)
def test_notices_of_the_platform(notices: str, where: Machine, ok: bool, found: str) -> None:
    """A cloud whose notices are not watched, or do not come, is told: the node would be lost without a word."""
    elastic = ElasticSection(notices=(notices,) if ":" in notices else notices)
    check = saving.notices(elastic, where, "node")
    assert (check.ok, found in check.found) == (ok, True), check


def test_this_machine_is_read() -> None:
    """The facts come from the kernel, in a form that the check takes."""
    assert saving.notices(ElasticSection(notices="off"), read_machine(), "a").name == "notices"


# ---- texts -----------------------------------------------------------------------------------------


def test_amounts_are_short() -> None:
    """Three digits and a unit."""
    assert [size(each) for each in (0, 1023, 1024, 64 * 2**20, 2.9 * GIB, 2**44)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "64 MiB",
        "2.9 GiB",
        "16 TiB",
    ]
    assert [rate(each) for each in (1.04e6, 93e6, 1234e6)] == ["1.0 MB/s", "93 MB/s", "1,234 MB/s"]
    assert [seconds(each) for each in (0.0123, 3.14, 3600)] == ["12.3 ms", "3.1 s", "3,600 s"]


def test_a_requirement_becomes_a_check() -> None:
    """The parts of an error's sentence are those of a check."""

    def refuse() -> str:
        raise ConfigError("data.cache = 'x': no\ndirectory; expected a directory of your own")

    assert required("cache", "room", "mend it", refuse) == Check(
        "cache", False, "data.cache = 'x': no directory", "a directory of your own", "mend it"
    )
    assert required("cache", "room", "mend it", lambda: "fine") == judged(
        "cache", True, "fine", "room", "mend it"
    )
