"""Part `speed`: step time, tokens/s, MFU, memory, and the slowest kernels. W = 1, numerics = exact.

Model FLOPs per token, forward and backward, by the two usual formulas:

    6N      6 · parameters (Kaplan et al. 2020; the tied embedding counts once, as the output layer)
    PaLM    6 · parameters + 12 · layers · width · sequence length (Chowdhery et al. 2022: attention included)

MFU is model FLOPs per second divided by the dense bfloat16 peak of the datasheet. The first row is a measured matrix
product. It shows how much of that peak this device reaches.
"""

import argparse
import resource
import statistics
import time
from typing import Final

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile

from benchmarks.cuda.alone import (
    process_group,
    random_tokens,
    step,
    synchronize,
    training_state,
)
from benchmarks.cuda.report import Report
from benchmarks.cuda.sizes import SIZES, Shape
from elastic_pt.telemetry.flops import peak_flops_of

_WARM_UP_STEPS: Final = 3
_PROFILED_STEPS: Final = 2
_TOP: Final = 12


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure eager steps of all shapes, a profile, then compiled steps, the largest shape first."""
    size, device = SIZES[options.size], torch.device(options.device)
    with process_group(device) as mesh:
        with report.attempt("matrix product"):
            _matrix_product(device, report, 8192 if options.size == "full" else 256)
        for shape in size.speed:
            with report.attempt(f"{shape.name} eager"):
                _measure(shape, size.vocabulary, size.timed_steps, mesh, device, report, False)
        with report.attempt(f"{size.speed[0].name} profile"):
            _profile(size.speed[0], size.vocabulary, mesh, device, report)
        for shape in reversed(size.speed):
            with report.attempt(f"{shape.name} compiled"):
                _measure(shape, size.vocabulary, size.timed_steps, mesh, device, report, True)


def _matrix_product(device: torch.device, report: Report, n: int) -> None:
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(_WARM_UP_STEPS + 10):
        started_s = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - started_s)
    rate = 2 * n**3 / statistics.median(seconds[_WARM_UP_STEPS:])
    peak = _peak(device)
    of_peak = f", {rate / peak:.0%} of the datasheet's peak" if peak else ""
    report.row(
        "matrix product", f"{rate / 1e12:.1f} TFLOP/s in bfloat16, {n} x {n}{of_peak}", rate=rate
    )


def _measure(
    shape: Shape,
    vocabulary: int,
    steps: int,
    mesh: DeviceMesh,
    device: torch.device,
    report: Report,
    compiled: bool,
) -> None:
    overrides = ("train.compile=true",) if compiled else ()
    with training_state(shape, vocabulary, mesh, device, *overrides) as state:
        tokens = random_tokens(state.config, vocabulary, device)
        started_s = time.perf_counter()
        step(state, tokens)
        first_step_s = time.perf_counter() - started_s
        for _ in range(_WARM_UP_STEPS - 1):
            step(state, tokens)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(steps):
            started_s = time.perf_counter()
            step(state, tokens)
            seconds.append(time.perf_counter() - started_s)
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
    step_s = statistics.median(seconds)
    step_tokens = shape.slots * shape.micro_batch * shape.sequence_length
    attention = 12 * shape.layers * shape.width * shape.sequence_length
    flops = {
        "6N": 6 * parameters * step_tokens / step_s,
        "PaLM": (6 * parameters + attention) * step_tokens / step_s,
    }
    peak = _peak(device)
    mfu = {name: rate / peak for name, rate in flops.items()} if peak else {}
    memory = _peak_memory(device)
    shown = ", ".join(f"MFU {name} {share:.1%}" for name, share in mfu.items())
    report.row(
        f"{shape.name} {'compiled' if compiled else 'eager'}",
        f"{step_s * 1e3:.1f} ms/step, {step_tokens / step_s:,.0f} tokens/s, "
        f"{shown or 'no MFU: peak of this device unknown'}, peak memory {memory / 1e9:.2f} GB, "
        f"first step {first_step_s:.1f} s",
        parameters=parameters,
        step_s=step_s,
        steps_s=seconds,
        first_step_s=first_step_s,
        tokens_per_s=step_tokens / step_s,
        model_flops_per_s=flops,
        mfu=mfu,
        peak_memory_bytes=memory,
        step_tokens=step_tokens,
    )


def _profile(
    shape: Shape, vocabulary: int, mesh: DeviceMesh, device: torch.device, report: Report
) -> None:
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with training_state(shape, vocabulary, mesh, device) as state:
        tokens = random_tokens(state.config, vocabulary, device)
        for _ in range(_WARM_UP_STEPS):
            step(state, tokens)
        with profile(activities=activities) as profiled:
            for _ in range(_PROFILED_STEPS):
                step(state, tokens)
    times = {
        each.key: (each.self_device_time_total if cuda else each.self_cpu_time_total, each.count)
        for each in profiled.key_averages()
    }
    total = sum(microseconds for microseconds, _ in times.values()) or 1.0
    top = sorted(times.items(), key=lambda item: -item[1][0])[:_TOP]
    for place, (name, (microseconds, count)) in enumerate(top, start=1):
        report.row(
            f"{shape.name} profile {place}",
            f"{microseconds / total:6.1%}  {microseconds / 1e3 / _PROFILED_STEPS:9.3f} ms/step  "
            f"{count // _PROFILED_STEPS:6d} calls/step  {name[:70]}",
            name=name,
            share=microseconds / total,
        )


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: of tensors on CUDA, of the whole process (resident) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
