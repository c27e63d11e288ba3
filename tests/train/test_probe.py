"""The probe: what a node computes, as a digest that is the same on equal machines and another on other kernels."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_pt.config import ModelSection, parse_config
from elastic_pt.model.optimizer import ExactAdamW
from elastic_pt.train.probe import names_of, probe, processor_in, small, variables

WAIT_S = 120.0
PROBE = """
import json, sys
from elastic_pt.train.probe import platform_of_workers
print(json.dumps(platform_of_workers(sys.argv[1], 300)))
"""
SPIN = "while True: pass"


def config(*lines: str) -> str:
    """A small configuration whose `[train]` section has these lines."""
    model = "[model]\nwidth = 64\nheads = 2\nkv_heads = 1\n"
    return "\n".join(('[run]\nurl = "r"\n[data]\nurl = "d"', model, "[train]", *lines))


@functools.cache
def platform_with(*lines: str, **environment: str) -> dict[str, str]:
    """What a node with these variables says of its platform, in a process of its own as in an agent's child."""
    told = subprocess.run(
        [sys.executable, "-c", PROBE, config('device = "cpu"', *lines)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert told.returncode == 0, told.stderr
    # Libraries that are told to be verbose write there too.
    (line,) = (each for each in told.stdout.splitlines() if each.startswith("{"))
    found: dict[str, str] = json.loads(line)
    return found


def test_equal_machines_have_equal_probes_under_any_load() -> None:
    """The probe is a function of machine and configuration: no time, load or memory address shows in it."""
    quiet = platform_with("threads = 2")
    busy = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(3)]
    try:
        assert platform_with.__wrapped__("threads = 2") == quiet
    finally:
        for each in busy:
            each.kill()
            each.wait()


@pytest.mark.parametrize(
    ("variable", "lines", "shows_in"),
    [
        ("MKL_CBWR=COMPATIBLE", (), "environment"),
        ("ATEN_CPU_CAPABILITY=default", (), "processor"),
        ("ONEDNN_MAX_CPU_ISA=SSE41", ('compute_dtype = "bfloat16"',), "environment"),
    ],
)
def test_another_code_path_changes_the_probe_and_a_name(
    variable: str, lines: tuple[str, ...], shows_in: str
) -> None:
    """I9: a node whose libraries take another code path has another probe, and a name that explains it."""
    name, _, value = variable.partition("=")
    mine, other = platform_with(*lines), platform_with(*lines, **{name: value})
    if "DEFAULT" in mine["processor"] or "Math Kernel" not in mine["libraries"]:
        pytest.skip("this machine has no other code path")
    assert mine["probe"] != other["probe"]
    assert mine[shows_in] != other[shows_in]
    assert variable in other["environment"]


def test_the_probe_depends_on_data_type_but_not_on_the_number_of_steps() -> None:
    """Another data type changes the probe; another number of steps, which no single step depends on, does not."""
    float32 = platform_with()
    assert platform_with("steps = 7") == float32
    assert platform_with('compute_dtype = "bfloat16"')["probe"] != float32["probe"]


@pytest.mark.parametrize("kind", ["weight", "moment"])
def test_one_bit_of_the_last_update_shows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe covers every number that the steps produce, to the last bit of the last update."""
    parsed = parse_config(config('device = "cpu"'), source="x")
    before = probe(parsed, 300, torch.device("cpu"))
    assert probe(parsed, 300, torch.device("cpu")) == before
    step = ExactAdamW.step

    def with_another_bit(self: ExactAdamW, rate: float, scale: float = 1.0) -> None:
        step(self, rate, scale)
        if self.step_count == 2:
            slot = next(iter(self._slots.values()))
            tensor = slot.parameter if kind == "weight" else slot.exp_avg
            tensor.detach().view(torch.int32)[0, 0] ^= 1

    monkeypatch.setattr(ExactAdamW, "step", with_another_bit)
    assert probe(parsed, 300, torch.device("cpu")) != before


def test_native_numerics_has_no_probe() -> None:
    """With native numerics, nodes compare only the version of torch and the kind of processor."""
    assert platform_with('numerics = "native"').keys() == {"torch", "processor"}


def test_compiled_runs_compare_compiler_and_processor() -> None:
    """The probe is not compiled, so the names of the compiler and of the processor model are compared."""
    train = parse_config(config("compile = true"), source="x").train
    names = names_of(train, torch.device("cpu"))
    assert names["processor model"] in names["compiler"]
    assert "compiler" not in platform_with()


@pytest.mark.parametrize(
    ("cuda", "compiled", "shown"),
    [
        (False, False, "ATEN_CPU_CAPABILITY=avx2, MKL_CBWR=AVX2, OMP_DYNAMIC=true"),
        (
            False,
            True,
            "ATEN_CPU_CAPABILITY=avx2, MKL_CBWR=AVX2, OMP_DYNAMIC=true, TORCHINDUCTOR_FREEZING=1",
        ),
        (True, False, "CUBLAS_WORKSPACE_CONFIG=:4096:8, NVIDIA_TF32_OVERRIDE=1"),
    ],
)
def test_variables_that_choose_kernels_are_reported(cuda: bool, compiled: bool, shown: str) -> None:
    """Only the environment variables that may choose another kernel on this device count, in a fixed order."""
    environment = {
        "OMP_DYNAMIC": "true",
        "MKL_CBWR": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "NVIDIA_TF32_OVERRIDE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TORCHINDUCTOR_FREEZING": "1",
    }
    assert variables(environment, cuda=cuda, compiled=compiled) == shown


HARMLESS = {
    "MKL_INTERFACE_LAYER": "LP64,GNU",
    "MKL_VERBOSE": "1",
    "MKL_NUM_THREADS": "3",
    "OMP_NUM_THREADS": "3",
    "ONEDNN_JIT_PROFILE": "1",
    "ONEDNN_JIT_DUMP": "1",
    "GLIBC_TUNABLES": "glibc.malloc.check=1",
    "CUDNN_VERSION": "9.1",
    "CUDNN_HOME": "/opt/cudnn",
    "CUDNN_PATH": "/opt/cudnn",
    "CUBLAS_VERSION": "12.6",
    "CUBLAS_LOGINFO_DBG": "1",
    "TRITON_DUMP_DIR": "/tmp/x",
    "TRITON_HOME": "/tmp/x",
    "TRITON_CACHE_DIR": "/tmp/x",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/x",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "HOME": "/root",
    # These choose kernels, but are what they are by default.
    "OMP_DYNAMIC": "FALSE",
    "ONEDNN_MAX_CPU_ISA": "DEFAULT",
    "DNNL_CPU_ISA_HINTS": "no_hints",
    "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",
}


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
@pytest.mark.parametrize("name", HARMLESS)
def test_variables_that_choose_no_kernel_are_not_reported(name: str, cuda: bool) -> None:
    """Paths, versions, logs, variables that the agent sets and explicit defaults are not reported."""
    assert variables({name: HARMLESS[name]}, cuda=cuda, compiled=True) == ""


def test_variables_that_choose_no_kernel_do_not_change_the_probe() -> None:
    """A variable that is not reported does not change the computed bits either."""
    assert platform_with(**{name: HARMLESS[name] for name in HARMLESS if name != "HOME"}) == (
        platform_with()
    )


@pytest.mark.parametrize(
    "variable",
    [
        "TORCH_MKLDNN_MATMUL_MIN_SIZE=0",
        "MKL_DOMAIN_NUM_THREADS=MKL_BLAS=1",
        "GLIBC_TUNABLES=glibc.malloc.check=1:glibc.cpu.hwcaps=-AVX2_Usable",
        "DNNL_MAX_CPU_ISA=AVX2",
        "TORCHINDUCTOR_CPP_GEMM_CACHE_BLOCKING=4,1,10",
        "TORCHINDUCTOR_CPP_DYNAMIC_THREADS=1",
    ],
)
def test_variables_with_harmless_looking_names_are_reported(variable: str) -> None:
    """A variable counts although its name looks like a cache or thread setting, or its value is a default elsewhere."""
    name, _, value = variable.partition("=")
    assert variables({name: value}, cuda=False, compiled=True) == variable


@given(
    st.integers(1, 64), st.integers(1, 16), st.integers(1, 512), st.booleans(), st.integers(0, 9999)
)
def test_the_probe_takes_any_shape_and_stays_small(
    kv_heads: int, queries_per_key: int, half_head: int, qk_norm: bool, ffn_width: int
) -> None:
    """For any model shape the probe's shape is valid, has one layer and bounded sizes, and equals the model's where that is small."""
    heads = kv_heads * queries_per_key
    shape: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "qk_norm": qk_norm}
    model = ModelSection(width=heads * 2 * half_head, ffn_width=ffn_width, **shape)
    found = small(model)
    ModelSection.model_validate(found.model_dump())
    assert found.layers == 1
    assert found.width <= 256
    assert found.inner_width <= 704
    assert (found.kv_heads == found.heads) == (
        model.kv_heads == model.heads or found.heads == found.kv_heads == 1
    )
    if model.width <= 256:
        kept = ("width", "heads", "kv_heads", "qk_norm", "head_width")
        assert [getattr(found, x) for x in kept] == [getattr(model, x) for x in kept]


def test_vendor_and_model_come_from_proc_cpuinfo(tmp_path: Path) -> None:
    """Vendor and model come from /proc/cpuinfo on x86 and Arm; without that file they are unknown."""
    info = tmp_path / "cpuinfo"
    assert processor_in(info) == ("unknown", "")
    info.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n")
    assert processor_in(info) == ("GenuineIntel", "cpu family 6, model 143")
    info.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n")
    assert processor_in(info) == ("0x41", "CPU part 0xd4f")
