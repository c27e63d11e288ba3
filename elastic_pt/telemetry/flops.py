"""Model FLOPs utilization (MFU): the useful FLOPs per second as a share of the devices' peak.

FLOPs per token, forward and backward, by the two usual formulas. Recomputation is not useful work and does not count.

    parameters  6·N                    N: parameters of the blocks, without embeddings and output layer
                                       (Kaplan et al. 2020, section 2.1; the C = 6·N·D of Hoffmann et al. 2022)
    palm        6·N + 12·L·H·Q·T       N: with the output layer, which is a matrix product too. L layers, H heads of
                                       width Q, T tokens per sequence: attention (Chowdhery et al. 2022, appendix B)

`palm` counts attention as if each token saw the whole sequence, as the paper does. Figures that count only the half
below the causal mask (6·L·H·Q·T) lie between the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from elastic_pt.config import ModelSection

_PEAKS: Final = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)
"""Dense bfloat16 FLOP/s by NVIDIA's datasheets, by a part of the device's name. The first match counts. The datasheets of
Hopper print twice as much, which is with sparsity."""


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs per token of one model, by formula, and the peak of one device."""

    per_token: Mapping[str, float]
    peak_flops: float
    """FLOP/s."""

    def mfu(self, tokens_per_s: float, devices: int) -> dict[str, float]:
        """The utilization by formula, for the tokens of all devices together."""
        return {
            formula: flops * tokens_per_s / (self.peak_flops * devices)
            for formula, flops in self.per_token.items()
        }


def flops_per_token(model: ModelSection, vocabulary: int, sequence_length: int) -> dict[str, float]:
    """FLOPs per token by formula."""
    attention = model.width * model.head_width * (2 * model.heads + 2 * model.kv_heads)
    blocks = model.layers * (attention + 3 * model.width * model.inner_width)
    output = vocabulary * model.width
    scores = model.layers * model.heads * model.head_width * sequence_length
    return {"parameters": 6.0 * blocks, "palm": 6.0 * (blocks + output) + 12.0 * scores}


def peak_flops_of(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name; None if it is not known here."""
    return next((peak for name, peak in _PEAKS if name in device), None)
