"""Health of this node's GPUs, read through NVML by a slow thread. Agent process; NVML needs no CUDA context.

Without a driver there are no series. An error of NVML removes the series of that GPU, or of one value, until a later look
succeeds. A driver that hangs holds up this thread alone, also at the start: what is served then is the last look.
"""

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import pynvml
import structlog

from elastic_pt.telemetry.catalogue import Metrics

INTERVAL_S: Final = 10.0
_EVENT_TIMEOUT_MS: Final = 1000
_EVENTS_MAX: Final = 100
"""Events that one look takes from NVML's queue."""
_CLOSE_TIMEOUT_S: Final = 2.0
_FELL_OFF_THE_BUS: Final = 79
"""The Xid of a GPU that does not answer any more."""
_UNKNOWN: Final = "unknown"
_REASONS: Final = {
    "power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
    "hardware_slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
    "software_thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
    "hardware_thermal": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "power_brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
}
"""Bits of NVML's mask of reasons for lower clocks (`nvmlClocksEventReasons`), without those that are no trouble."""

log = structlog.get_logger("elastic_pt.telemetry.gpu")


def slowed_by(handle: Any, nvml: Any = pynvml) -> dict[str, bool]:
    """Each reason for lower clocks, and whether it acts now. Raises `NVMLError`."""
    mask = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    return {reason: bool(mask & bit) for reason, bit in _REASONS.items()}


def uncorrected_errors(handle: Any, nvml: Any = pynvml) -> int:
    """Uncorrected memory errors since the driver was loaded. Raises `NVMLError`, also for a GPU without ECC."""
    return int(
        nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
    )


class GpuWatch:
    """Sets the gpu metrics every `INTERVAL_S` seconds, in its own thread."""

    def __init__(
        self,
        metrics: Metrics,
        on_name: Callable[[str], None],
        visible: str | None = None,
        nvml: Any = pynvml,
    ) -> None:
        """`on_name` learns the name of the first GPU, in the thread. `visible` is CUDA_VISIBLE_DEVICES; None if it is not set.

        Its numbers are taken as NVML's. CUDA's order is another one only on machines with GPUs of several models.
        """
        self._metrics = metrics
        self._on_name = on_name
        # The name of a part of a GPU (MIG) does not tell which one: then all are shown.
        named = None if visible is None or "MIG-" in visible else visible.split(",")
        self._visible = named and [each.strip() for each in named]
        self._nvml = nvml
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpus", daemon=True)
        self._handles: dict[str, Any] = {}
        self._uncorrected: dict[str, int] = {}
        self._lost: set[str] = set()
        self._events: Any = None

    def start(self) -> None:
        """Start the thread. It ends at once on a machine without a GPU that has a driver."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)

    def open(self) -> bool:
        """Connect to the driver. False without one, or without a GPU."""
        nvml = self._nvml
        try:
            nvml.nvmlInit()
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                if self._visible is None or self._sees(str(index), nvml.nvmlDeviceGetUUID(handle)):
                    self._handles[str(index)] = handle
            for handle in list(self._handles.values())[:1]:
                self._on_name(str(nvml.nvmlDeviceGetName(handle)))
        except nvml.NVMLError as error:
            log.debug("no_gpus", cause=str(error))
        return bool(self._handles)

    def _sees(self, index: str, uuid: str) -> bool:
        return any(
            each == index or (each.startswith("GPU-") and uuid.startswith(each))
            for each in self._visible or ()
        )

    def look(self) -> None:
        """Read every GPU once."""
        for gpu, handle in self._handles.items():
            self._look_at(gpu, handle)

    def _run(self) -> None:
        if not self.open():
            return
        with suppress(self._nvml.NVMLError):
            self.listen()
        while not self._closing.is_set():
            # Any error: telemetry must never end an agent, and the next look may succeed.
            try:
                self.look()
                self.take_events()
            except Exception as error:
                log.warning("gpus_not_read", cause=str(error))
            self._closing.wait(INTERVAL_S)

    # ---- one GPU ---------------------------------------------------------------------------------

    def _look_at(self, gpu: str, handle: Any) -> None:
        nvml, metrics = self._nvml, self._metrics
        read: dict[Any, Callable[[], float]] = {
            metrics.gpu_utilization_ratio: lambda: (
                nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
            ),
            metrics.gpu_memory_used_bytes: lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            metrics.gpu_memory_total_bytes: lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
            metrics.gpu_temperature_celsius: lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
            metrics.gpu_power_watts: lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        }
        for gauge, value in read.items():
            try:
                gauge.labels(gpu).set(value())
            except nvml.NVMLError as error:
                # Not every GPU has every value, and a GPU may fall off the bus.
                with suppress(KeyError):
                    gauge.remove(gpu)
                if error.value == nvml.NVML_ERROR_GPU_IS_LOST:
                    self._critical_error(gpu, _FELL_OFF_THE_BUS)
        with suppress(nvml.NVMLError):
            self._count_uncorrected(gpu, handle)
        try:
            for reason, acts in slowed_by(handle, nvml).items():
                metrics.gpu_throttled.labels(gpu, reason).set(acts)
        except nvml.NVMLError:
            metrics.gpu_throttled.remove_by_labels({"gpu": gpu})

    def _count_uncorrected(self, gpu: str, handle: Any) -> None:
        """NVML counts since the driver was loaded, and starts again with it."""
        total = uncorrected_errors(handle, self._nvml)
        before = self._uncorrected.get(gpu, total)
        self._uncorrected[gpu] = total
        self._metrics.gpu_ecc_uncorrected.labels(gpu).inc(
            total - before if total >= before else total
        )

    # ---- events ----------------------------------------------------------------------------------

    def listen(self) -> None:
        """Ask NVML for critical errors. Raises `NVMLError` where it cannot tell."""
        nvml = self._nvml
        events = nvml.nvmlEventSetCreate()
        for gpu in (*self._handles, _UNKNOWN):
            self._metrics.gpu_xid_errors.labels(gpu)
        for handle in self._handles.values():
            # Some models have no events; the others are heard all the same.
            with suppress(nvml.NVMLError):
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
        self._events = events

    def take_events(self) -> None:
        """Count the critical errors since the last look."""
        nvml = self._nvml
        if self._events is None:
            return
        for _ in range(_EVENTS_MAX):
            try:
                event = nvml.nvmlEventSetWait_v2(self._events, _EVENT_TIMEOUT_MS)
            except nvml.NVMLError:
                # No event within the timeout, or a GPU is lost, which the look tells.
                return
            # By its handle: NVML tells no index of a GPU that has fallen off the bus.
            named = {_address(handle): gpu for gpu, handle in self._handles.items()}
            self._critical_error(named.get(_address(event.device), _UNKNOWN), event.eventData)

    def _critical_error(self, gpu: str, xid: int) -> None:
        """Count it. That a GPU is lost counts once: an event tells it, or each look, or both."""
        if xid == _FELL_OFF_THE_BUS and gpu != _UNKNOWN:
            if gpu in self._lost:
                return
            self._lost.add(gpu)
        self._metrics.gpu_xid_errors.labels(gpu).inc()
        log.error("gpu_xid_error", gpu=gpu, xid=xid)


def _address(handle: Any) -> int | None:
    """NVML's pointers are equal if they point to the same device; those of ctypes are not."""
    return ctypes.cast(handle, ctypes.c_void_p).value
