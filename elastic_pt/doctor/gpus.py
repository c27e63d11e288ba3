"""Checks of this machine's GPUs: driver, torch, and health. NVML needs no CUDA context; torch counts devices without one.

Command line's process.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pynvml
import torch

from elastic_pt.config import Config
from elastic_pt.doctor.check import Check, judged, one_line, required
from elastic_pt.doctor.requirements import require_device, workers_of
from elastic_pt.telemetry.gpu import slowed_by, uncorrected_errors

_PCI: Final = Path("/sys/bus/pci/devices")
_NVIDIA: Final = "0x10de"
_DISPLAY_CLASS: Final = "0x03"
_BROKEN: Final = ("hardware_slowdown", "hardware_thermal", "power_brake")
"""Reasons for lower clocks that a healthy GPU in a healthy machine does not have."""


@dataclass(frozen=True)
class Gpus:
    """What the kernel, the driver and torch say about the GPUs of this machine."""

    cards: int
    """NVIDIA cards on the PCI bus that the kernel shows."""
    driver: str
    """Its version; empty without a driver."""
    driver_cuda: int
    """The newest CUDA version of the driver, as 1000 x major + 10 x minor; 0 without one."""
    handles: tuple[Any, ...]
    """Of NVML, one a GPU."""
    torch_cuda: str
    """The CUDA version that torch is built for; empty for its CPU build."""
    torch_sees: int


def read_gpus(pci: Path = _PCI, nvml: Any = pynvml) -> Gpus:
    """Ask kernel, driver and torch."""
    driver, driver_cuda, handles = "", 0, ()
    with suppress(nvml.NVMLError):
        nvml.nvmlInit()
        driver = str(nvml.nvmlSystemGetDriverVersion())
        driver_cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        count = range(nvml.nvmlDeviceGetCount())
        handles = tuple(nvml.nvmlDeviceGetHandleByIndex(index) for index in count)
    return Gpus(
        cards=sum(_is_card(each) for each in pci.glob("*")),
        driver=driver,
        driver_cuda=driver_cuda,
        handles=handles,
        torch_cuda=torch.version.cuda or "",
        torch_sees=torch.cuda.device_count(),
    )


def _is_card(device: Path) -> bool:
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == _NVIDIA and kind.startswith(_DISPLAY_CLASS)


def gpu_checks(gpus: Gpus, config: Config | None, nvml: Any = pynvml) -> Iterator[Check]:
    """Whether torch can use the GPUs, and their health. Nothing on a machine without GPUs, unless the run wants one."""
    there = max(gpus.cards, len(gpus.handles))
    if not there:
        if config is not None and config.train.device == "cuda":
            yield missing(config)
        return
    if config is not None and config.train.device == "cpu":
        return
    yield usable(gpus, 1 if config is None else workers_of(config))
    for index, handle in enumerate(gpus.handles):
        yield health(index, handle, nvml)


def missing(config: Config) -> Check:
    """The run wants a GPU, and this machine has none."""

    def look() -> str:
        require_device(config)
        return "a device of torch"

    remedy = (
        "use a machine with an NVIDIA GPU; in a container give it the GPUs (docker run --gpus all)"
    )
    return required("gpus", "a GPU", remedy, look)


def usable(gpus: Gpus, workers: int) -> Check:
    """Whether torch sees the GPUs of this machine. Pure."""
    there = max(gpus.cards, len(gpus.handles))
    driver = f"driver {gpus.driver} (CUDA {_version(gpus.driver_cuda)})"
    build = f"torch for CUDA {gpus.torch_cuda}" if gpus.torch_cuda else "the CPU build of torch"
    found = f"GPUs: {there}, {driver if gpus.driver else 'no driver'}, {build}, which sees {gpus.torch_sees}"
    ok, remedy = gpus.torch_sees >= max(1, min(workers, there)), ""
    if not gpus.driver:
        remedy = (
            "install NVIDIA's driver (nvidia-smi must work); in a container: docker run --gpus all"
        )
    elif not gpus.torch_cuda:
        remedy = "install torch's CUDA build (README, Installing), or set train.device = 'cpu'"
    elif gpus.driver_cuda // 1000 < int(gpus.torch_cuda.partition(".")[0]):
        remedy = (
            f"install a driver for CUDA {gpus.torch_cuda} or later, or a torch for an earlier CUDA"
        )
    else:
        remedy = "check CUDA_VISIBLE_DEVICES, and whether a GPU has fallen off the bus (nvidia-smi)"
    return judged(
        "gpus",
        ok,
        found,
        "torch sees each GPU of the workers, with a driver as new as its CUDA",
        remedy,
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def health(index: int, handle: Any, nvml: Any = pynvml) -> Check:
    """Memory errors, memory that could not be replaced, and clocks that the hardware holds down."""
    name, troubles = "a GPU", []
    try:
        name = str(nvml.nvmlDeviceGetName(handle))
        troubles += [
            each for each, acts in slowed_by(handle, nvml).items() if acts and each in _BROKEN
        ]
    except nvml.NVMLError as error:
        troubles.append(one_line(str(error)))
    with suppress(nvml.NVMLError):
        if count := uncorrected_errors(handle, nvml):
            troubles.append(f"{count} uncorrected memory errors since the driver was loaded")
    with suppress(nvml.NVMLError):
        _, _, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
        troubles += ["a row of memory could not be replaced"] * bool(failed)
        troubles += ["a row of memory is replaced at the next reset"] * bool(pending)
    return judged(
        "gpu_health",
        not troubles,
        f"GPU {index}, {name}: {'; '.join(troubles) or 'no memory errors, full clocks'}",
        "no uncorrected memory errors, and no clocks held down by the hardware",
        "reset the GPU or restart the machine; if it comes back, replace it. Xid errors: dmesg | grep Xid",
    )
