"""The platform of this node: everything that decides its bits, as names and a small computation (the probe).

Names alone are not enough. MKL takes another code path on another vendor's processor, with another result in the
last bit, and possibly with the same names. So in exact mode a process forked from the agent takes two small
training steps (forward, backward, norm, update) with the model, the optimizer, the data type, the threads and,
where they are small, the shapes of the run. The SHA-256 of all results is the probe, which nodes compare.

The step is small, and other shapes may use other kernels. So the names that choose kernels are compared as well, and
the other names explain why a probe differs (`identity.EXPLAINING`). Compiled code is not part of the step,
because compiling takes a minute: with `train.compile` the compiler and the processor's model are compared instead.

Untested so far: the probe and the names on CUDA.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

import numpy
import torch

from elastic_pt.config import Config, ModelSection, TrainSection, parse_config
from elastic_pt.model import initialize
from elastic_pt.model.loss import LossSums
from elastic_pt.model.optimizer import ExactAdamW
from elastic_pt.model.parallel import optimize_blocks, resolve_compute_dtype, resolve_device
from elastic_pt.model.transformer import Transformer, build_on_meta
from elastic_pt.train.exact import RowSquares, make_deterministic

WHAT: Final = "the small training step that shows what this node computes"
_STEPS: Final = 2
_LEARNING_RATE: Final = 1e-3
_WIDTH_MAX: Final = 256
_INNER_WIDTH_MAX: Final = 704
_TOKENS_MAX: Final = 256
_LENGTH_MAX: Final = 128
_VOCABULARY_MAX: Final = 512
_COMMAND_TIMEOUT_S: Final = 10.0

_CPU_VARIABLES: Final = re.compile(
    r"ATEN_CPU_CAPABILITY|OPENBLAS_CORETYPE|BLIS_(ARCH_TYPE|MODEL_TYPE|(JC|PC|IC|JR|IR)_NT)"
    r"|MKL_(CBWR|ENABLE_INSTRUCTIONS|DEBUG_CPU_TYPE|THREADING_LAYER|DOMAIN_NUM_THREADS|NUM_STRIPES)"
    r"|(ONEDNN|DNNL)_(MAX_CPU_ISA|CPU_ISA_HINTS|DEFAULT_FPMATH_MODE|GRAPH_SDPA_FORCE_PRIMITIVE)"
    r"|TORCH_(MKLDNN_MATMUL_MIN_(DIM|SIZE)|LINEAR_FLATTEN_3D)|OMP_(DYNAMIC|THREAD_LIMIT)"
    r"|KMP_(DETERMINISTIC_REDUCTION|DYNAMIC_MODE|DEVICE_THREAD_LIMIT)|GLIBC_TUNABLES"
)
_CUDA_VARIABLES: Final = re.compile(
    r"CUBLAS_(WORKSPACE_CONFIG|EMULAT\w+|FIXEDPOINT_EMULATION_\w+|FP32_EMULATED_\w+)"
    r"|CUBLASLT_WORKSPACE_SIZE|NVIDIA_TF32_OVERRIDE|DISABLE_ADDMM_CUDA_LT"
    r"|TORCH_(ALLOW_TF32_CUBLAS_OVERRIDE|BLAS_PREFER_\w+|LINALG_PREFER_\w+|LINEAR_FLATTEN_3D)"
    r"|TORCH_CUDNN_(USE_HEURISTIC_MODE_B|V8_API_DISABLED)"
)
_COMPILE_VARIABLES: Final = re.compile(
    r"(TORCHINDUCTOR|TRITON)_(?!COMPILE_THREADS$|HOME$|WORKER_|REDIS_"
    r"|\w*(VERBOSE|LOG|DEBUG|DUMP|TIMEOUT|CACHE(?!_BLOCKING)))\w+"
)
"""There are about a hundred, and the probe does not compile: all except those that are known to choose no kernel."""
_DEFAULTS: Final = re.compile(
    r"(OMP_DYNAMIC|KMP_DETERMINISTIC_REDUCTION)=(false|no|off|0)"
    r"|(ONEDNN|DNNL)_(MAX_CPU_ISA=(default|all)|CPU_ISA_HINTS=no_hints|DEFAULT_FPMATH_MODE=strict)"
    r"|(TORCH_(?!MKLDNN)\w+|DISABLE_ADDMM_CUDA_LT|CUBLAS_EMULATE_\w+)=0"
    # Only glibc.cpu.* chooses functions; the other tunables are about memory and threads.
    r"|GLIBC_TUNABLES=((?!glibc\.cpu\.).)*",
    re.IGNORECASE,
)
"""Settings with the same effect as no setting."""


def platform_of_workers(config_text: str, vocabulary: int) -> dict[str, str]:
    """The platform of this node, by name. Runs in a process forked from the agent, which ends after it.

    Native numerics does not guarantee bits: then only the version of torch and the kind of processor are returned.
    """
    config = parse_config(config_text, source="the agent")
    train, device = config.train, resolve_device(config.train)
    if train.numerics != "exact":
        return _kind(device)
    names = names_of(train, device)
    make_deterministic(train, device)
    return names | {"probe": probe(config, vocabulary, device)}


def platform_of_machine(train: TrainSection) -> dict[str, str]:
    """The platform of this node without the probe, for comparison; empty if the run promises no bits."""
    return names_of(train, resolve_device(train)) if train.numerics == "exact" else {}


def names_of(train: TrainSection, device: torch.device) -> dict[str, str]:
    """All names, without the probe."""
    cuda = device.type == "cuda"
    vendor, model = processor_in(Path("/proc/cpuinfo"))
    names = _kind(device) | {
        "processor model": model,
        "environment": variables(os.environ, cuda=cuda, compiled=train.compile),
    }
    names |= _cuda_names() if cuda else {"vendor": vendor, "libraries": _cpu_libraries()}
    if train.compile:
        names["compiler"] = _triton() if cuda else f"{_compiler()} for {model}"
    return names


def _kind(device: torch.device) -> dict[str, str]:
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "torch": torch.__version__,
        "processor": "cuda" if device.type == "cuda" else processor,
    }


def probe(config: Config, vocabulary: int, device: torch.device) -> str:
    """SHA-256 of the results of two small training steps. Call `make_deterministic` before."""
    train = config.train.model_copy(update={"compile": False})
    section, vocabulary = small(config.model), min(vocabulary, _VOCABULARY_MAX)
    model = build_on_meta(section, vocabulary)
    optimize_blocks(model, train)
    model.to_empty(device=device)
    initialize.fill_(model, layers=section.layers, seed=config.run.seed)
    optimizer = ExactAdamW(
        model.named_parameters(),
        beta1=train.beta1,
        beta2=train.beta2,
        epsilon=train.epsilon,
        weight_decay=train.weight_decay,
    )
    length = min(config.data.sequence_length, _LENGTH_MAX)
    batch = max(1, min(train.micro_batch, _TOKENS_MAX // length))
    generator = numpy.random.Generator(numpy.random.Philox(key=config.run.seed))
    digest = hashlib.sha256()
    for _ in range(_STEPS):
        tokens_BT = generator.integers(0, vocabulary, (batch, length + 1))
        _step(model, optimizer, train, torch.from_numpy(tokens_BT).to(device), digest)
    return digest.hexdigest()


def _step(
    model: Transformer,
    optimizer: ExactAdamW,
    train: TrainSection,
    tokens_BT: torch.Tensor,
    digest: "hashlib._Hash",
) -> None:
    """One step, as `train.step` takes it, without a process group."""
    dtype = resolve_compute_dtype(train, tokens_BT.device)
    # As FSDP2 does: the pass computes with cast weights, and gradients arrive as float32.
    weights = {name: each.to(dtype) for name, each in model.named_parameters()}
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:].contiguous()
    sums = torch.func.functional_call(model, weights, (inputs_BT, targets_BT, train.z_loss))
    assert isinstance(sums, LossSums)
    (sums.total * (1.0 / targets_BT.numel())).backward()  # type: ignore[no-untyped-call]
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    squares = RowSquares((each.shape[0], 0) for each in gradients)
    vector = torch.zeros(squares.total_rows, dtype=torch.float64, device=tokens_BT.device)
    squares.write(vector, gradients)
    norm = RowSquares.norm(vector)
    digest.update(repr((float(sums.cross_entropy), float(sums.z_loss), norm)).encode())
    optimizer.step(_LEARNING_RATE, min(1.0, 1.0 / norm))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        for each in (parameter.grad, parameter.detach(), *optimizer.state(name)):
            digest.update(each.contiguous().cpu().numpy().tobytes())
    optimizer.zero_grad()


def small(model: ModelSection) -> ModelSection:
    """One block of the run's shape; a large one with fewer heads and narrower."""
    head_width = min(model.head_width, _WIDTH_MAX)
    heads = min(model.heads, max(1, _WIDTH_MAX // head_width))
    queries_per_key = model.heads // model.kv_heads
    return model.model_copy(
        update={
            "layers": 1,
            "width": heads * head_width,
            "heads": heads,
            "kv_heads": heads // queries_per_key if heads % queries_per_key == 0 else 1,
            "ffn_width": min(model.inner_width, _INNER_WIDTH_MAX),
        }
    )


def variables(environment: Mapping[str, str], *, cuda: bool, compiled: bool) -> str:
    """The environment variables that choose kernels, in one line: one value, so that a missing variable differs too."""
    families = [_CUDA_VARIABLES if cuda else _CPU_VARIABLES]
    families += [_COMPILE_VARIABLES] if compiled else []
    return ", ".join(
        f"{name}={value}"
        for name, value in sorted(environment.items())
        if any(family.fullmatch(name) for family in families)
        and not _DEFAULTS.fullmatch(f"{name}={value}")
    )


def processor_in(path: Path) -> tuple[str, str]:
    """Vendor and model of the processor, as Linux reports them; on Arm both are numbers."""
    found: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    vendor = found.get("vendor_id") or found.get("CPU implementer") or "unknown"
    parts = ("model name", "cpu family", "model", "CPU part")
    return vendor, ", ".join(f"{name} {found[name]}" for name in parts if name in found)


def _cpu_libraries() -> str:
    """The libraries that torch multiplies matrices with, as they are loaded."""
    found = re.findall(r"- (Intel\(R\) .*|OpenBLAS.*)", torch.__config__.show())
    return ", ".join(
        re.sub(r"Intel\(R\) | for Intel.*| \(Git.*", "", each).strip() for each in found
    )


def _cuda_names() -> dict[str, str]:
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    path = Path("/proc/driver/nvidia/version")
    version = path.read_text(errors="replace") if path.exists() else ""
    driver = re.search(r"Module.*?\s(\d+\.[\d.]+)\s", version)
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {
        # A node may hold several kinds; each worker has its own.
        "accelerator": ", ".join(sorted({f"{x.name} ({x.major}.{x.minor})" for x in devices})),
        "libraries": f"CUDA {torch.version.cuda}, cuDNN {cudnn}",
        "driver": driver[1] if driver else "unknown",
    }


def _triton() -> str:
    try:
        return f"triton {metadata.version('triton')}"
    except metadata.PackageNotFoundError:
        return "no triton"


def _compiler() -> str:
    """The C++ compiler that torch.compile calls."""
    command = shutil.which(os.environ.get("CXX", "g++"))
    if command is None:
        return "no compiler"
    told = subprocess.run(
        [command, "--version"], capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S
    )
    return (told.stdout.splitlines() or ["unknown compiler"])[0]
