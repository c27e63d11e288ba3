"""GPU health from NVML. A stand-in for NVML: there is no GPU where the tests run, so none of this has seen one."""

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from elastic_pt.telemetry.catalogue import Metrics
from elastic_pt.telemetry.gpu import GpuWatch

WAIT_S = 20.0


def handle_of(gpu: int) -> Any:
    """A pointer as NVML gives it: each call makes another object for the same device."""
    return ctypes.cast(ctypes.c_void_p(0x1000 + gpu), pynvml.c_nvmlDevice_t)


class Driver:
    """What pynvml offers, for two GPUs. Constants, handles and the error are pynvml's own."""

    def __init__(self) -> None:
        self.gone: set[int] = set()
        self.without_events: set[int] = set()
        self.heard: list[int] = []
        self.uncorrected = [5, 0]
        self.xids: list[tuple[int, int]] = []
        self.reasons = 0

    def __getattr__(self, name: str) -> Any:
        # Only constants: a function that this class lacks must not reach the machine's driver.
        found = getattr(pynvml, name)
        assert name == "NVMLError" or isinstance(found, int), name
        return found

    def _of(self, handle: Any) -> int:
        """The index of a GPU that answers."""
        address = ctypes.cast(handle, ctypes.c_void_p).value
        assert address is not None
        if address - 0x1000 in self.gone:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return address - 0x1000

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return handle_of(index)

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return f"GPU-{self._of(handle)}5a1"

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return ("NVIDIA H200", "NVIDIA A100")[self._of(handle)]

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        self._of(handle)
        return SimpleNamespace(gpu=75, memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        self._of(handle)
        return SimpleNamespace(used=10, total=100)

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:
        return 60 + 0 * self._of(handle)

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        return 350_000 + 0 * self._of(handle)

    def nvmlDeviceGetTotalEccErrors(self, handle: Any, kind: int, counter: int) -> int:
        return self.uncorrected[self._of(handle)]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any) -> int:
        return self.reasons + 0 * self._of(handle)

    def nvmlEventSetCreate(self) -> object:
        return object()

    def nvmlDeviceRegisterEvents(self, handle: Any, kinds: int, events: object) -> None:
        assert kinds == pynvml.nvmlEventTypeXidCriticalError
        gpu = self._of(handle)
        if gpu in self.without_events:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        self.heard.append(gpu)

    def nvmlEventSetWait_v2(self, events: object, timeout_ms: int) -> Any:
        if not self.xids:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)
        gpu, xid = self.xids.pop(0)
        return SimpleNamespace(device=handle_of(gpu), eventData=xid)


class NoDriver(Driver):
    """A machine without a driver."""

    def nvmlInit(self) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def watch_of(metrics: Metrics, driver: Driver, visible: str | None = None) -> GpuWatch:
    """A watch of this driver that keeps no name."""
    return GpuWatch(metrics, lambda _: None, visible, driver)


def shown(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """The GPU samples that are served, by name and labels."""
    return {
        (sample.name.removeprefix("elastic_pt_gpu_"), *sample.labels.values()): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name.startswith("elastic_pt_gpu_")
    }


def test_each_gpu_is_read() -> None:
    """Values come in base units, for each GPU, and critical errors count for the GPU that had them."""
    driver, metrics = Driver(), Metrics()
    driver.reasons = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle
    watch = watch_of(metrics, driver)
    assert watch.open()
    watch.listen()
    watch.look()
    driver.uncorrected[0] += 2
    driver.xids = [(1, 31), (1, 48)]
    watch.look()
    watch.take_events()
    found = shown(metrics)
    assert found["utilization_ratio", "0"] == 0.75
    assert found["memory_used_bytes", "1"] == 10
    assert found["memory_total_bytes", "1"] == 100
    assert found["temperature_celsius", "0"] == 60
    assert found["power_watts", "0"] == 350
    assert (found["ecc_uncorrected_total", "0"], found["ecc_uncorrected_total", "1"]) == (2, 0)
    assert (found["xid_errors_total", "0"], found["xid_errors_total", "1"]) == (0, 2)
    throttled = {each[2] for each, value in found.items() if each[0] == "throttled" and value}
    assert throttled == {"power_cap"}


def test_a_gpu_that_is_gone_is_not_shown() -> None:
    """A stale temperature would look healthy; the counters stay, and the other GPU is still read."""
    driver, metrics = Driver(), Metrics()
    watch = watch_of(metrics, driver)
    watch.open()
    watch.look()
    driver.gone = {1}
    watch.look()
    counters = {"ecc_uncorrected_total", "xid_errors_total"}
    assert {each[0] for each in shown(metrics) if each[1] == "1"} == counters
    assert ("temperature_celsius", "0") in shown(metrics)
    driver.gone = set()
    watch.look()
    assert ("temperature_celsius", "1") in shown(metrics)


@pytest.mark.parametrize("told", [[(1, 79)], []], ids=["by an event", "by the look"])
def test_a_gpu_that_falls_off_the_bus_counts_once(told: list[tuple[int, int]]) -> None:
    """NVML then answers nothing about that GPU, not even its index. Waiting for events may fail too."""
    driver, metrics = Driver(), Metrics()
    watch = watch_of(metrics, driver)
    watch.open()
    watch.listen()
    driver.gone, driver.xids = {1}, told
    for _ in range(2):
        watch.look()
        watch.take_events()
    found = shown(metrics)
    assert (found["xid_errors_total", "0"], found["xid_errors_total", "1"]) == (0, 1)


def test_an_error_of_a_gpu_without_a_name_counts() -> None:
    """An event is out of NVML's queue once it was read: it must count somewhere, and the next one too."""
    driver, metrics = Driver(), Metrics()
    watch = watch_of(metrics, driver)
    watch.open()
    watch.listen()
    assert shown(metrics)["xid_errors_total", "unknown"] == 0
    driver.xids = [(7, 79), (0, 48)]
    watch.take_events()
    found = shown(metrics)
    assert (found["xid_errors_total", "unknown"], found["xid_errors_total", "0"]) == (1, 1)


def test_a_gpu_without_events_does_not_silence_the_others() -> None:
    """NVML refuses to listen to some models."""
    driver = Driver()
    driver.without_events = {0}
    watch = watch_of(Metrics(), driver)
    watch.open()
    watch.listen()
    assert driver.heard == [1]


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, {"0", "1"}),
        ("1", {"1"}),
        (" 0, 1", {"0", "1"}),
        ("GPU-15", {"1"}),
        ("", set()),
        ("-1", set()),
        ("MIG-GPU-05a1/1/0", {"0", "1"}),
    ],
)
def test_an_agent_shows_its_own_gpus(visible: str | None, gpus: set[str]) -> None:
    """Two agents on one machine, each with GPUs of its own, must not count those of the other."""
    metrics = Metrics()
    watch = watch_of(metrics, Driver(), visible)
    assert watch.open() == bool(gpus)
    watch.look()
    assert {each[1] for each in shown(metrics)} == gpus


def test_without_a_driver_there_are_no_series() -> None:
    """A machine without GPUs serves nothing of them, and the thread ends at once."""
    metrics = Metrics()
    watch = watch_of(metrics, NoDriver())
    watch.start()
    watch.close()
    assert shown(metrics) == {}
    assert not watch._thread.is_alive()


def test_a_driver_that_hangs_does_not_hold_up_the_start() -> None:
    """NVML is first asked in the thread: an agent joins its run whatever the driver does."""
    hung, name = threading.Event(), threading.Event()

    class Hung(Driver):
        def nvmlInit(self) -> None:
            assert hung.wait(WAIT_S)

    watch = GpuWatch(Metrics(), lambda found: found == "NVIDIA H200" and name.set(), None, Hung())
    watch.start()
    assert not name.is_set()
    hung.set()
    assert name.wait(WAIT_S)
    watch.close()


@pytest.mark.parametrize(
    "name", ["nvmlInit", "nvmlEventSetWait_v2", "nvmlClocksEventReasonHwSlowdown"]
)
def test_the_library_has_what_is_used(name: str) -> None:
    """The names that the stand-in stands for exist in the installed library."""
    assert hasattr(pynvml, name)
    assert all(hasattr(pynvml, each) for each in vars(Driver) if each.startswith("nvml"))
