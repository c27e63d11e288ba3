"""The sizes of the parts: `full` for a GPU of 80 GB, `tiny` to test every line on a CPU in minutes."""

from dataclasses import dataclass
from typing import Final

from elastic_pt.config import Config, parse_config

CPU_SLOWER: Final = 4.0
"""Factor for all time limits on a CPU: compilation on a few busy cores takes long."""


@dataclass(frozen=True)
class Shape:
    """A model and the number of tokens in a step."""

    name: str
    layers: int
    width: int
    heads: int
    sequence_length: int
    micro_batch: int
    slots: int = 4

    def config(self, device: str, *overrides: str) -> Config:
        """A configuration with the device's usual type (bfloat16 on CUDA)."""
        text = f"""
[run]
url = "unused"
[data]
url = "unused"
sequence_length = {self.sequence_length}
[model]
layers = {self.layers}
width = {self.width}
heads = {self.heads}
kv_heads = {self.heads}
[train]
global_batch = {self.micro_batch * self.slots}
micro_batch = {self.micro_batch}
device = "{device}"
"""
        return parse_config(text, source="benchmarks/cuda", overrides=overrides)


@dataclass(frozen=True)
class Size:
    """All sizes of one run of the benchmark."""

    vocabulary: int
    speed: tuple[Shape, ...]
    """Shapes for the step time. The first one is also profiled."""
    numerics: Shape
    """Shape of the comparison of exact and native arithmetic."""
    snapshot: Shape
    """Shape of the state that is staged, uploaded and restored."""
    timed_steps: int
    digest_model: tuple[str, ...]
    """Overrides of `chaos_tests.scenario.make_config`: a small model for the runs that are compared."""
    recoveries: int
    skipped_cases: tuple[str, ...] = ()
    """Cases of the part `digests` that are left out."""


FULL: Final = Size(
    vocabulary=50_304,
    speed=(
        Shape("125M", layers=12, width=768, heads=12, sequence_length=1024, micro_batch=16),
        Shape("350M", layers=24, width=1024, heads=16, sequence_length=1024, micro_batch=16),
        Shape("1B", layers=18, width=2048, heads=16, sequence_length=2048, micro_batch=4),
    ),
    numerics=Shape("125M", layers=12, width=768, heads=12, sequence_length=1024, micro_batch=16),
    # 355 million parameters of 12 bytes: weights and two moments in float32.
    snapshot=Shape("350M", layers=24, width=1024, heads=16, sequence_length=1024, micro_batch=8),
    timed_steps=10,
    digest_model=("model.layers=4", "model.width=256", "data.sequence_length=256"),
    recoveries=5,
)
TINY: Final = Size(
    vocabulary=512,
    speed=(
        Shape("tiny", layers=2, width=64, heads=2, sequence_length=64, micro_batch=2),
        Shape("small", layers=2, width=128, heads=2, sequence_length=64, micro_batch=2),
    ),
    numerics=Shape("tiny", layers=2, width=64, heads=2, sequence_length=64, micro_batch=2),
    snapshot=Shape("small", layers=2, width=128, heads=2, sequence_length=64, micro_batch=2),
    timed_steps=3,
    digest_model=(),
    recoveries=1,
    # Each generation compiles again, which takes a minute on a CPU.
    skipped_cases=("W=1 worker killed, compiled", "W=2 one node, worker killed, compiled"),
)
SIZES: Final = {"full": FULL, "tiny": TINY}
