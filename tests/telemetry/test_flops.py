"""Model FLOPs utilization agrees with figures computed by hand from the papers' formulas."""

import pytest

from elastic_pt.config import ModelSection
from elastic_pt.telemetry.flops import ModelFlops, flops_per_token, peak_flops_of

LLAMA_3_2_1B = ModelSection(
    layers=16, width=2048, heads=32, kv_heads=8, ffn_width=8192, tied_embeddings=True
)
VOCABULARY = 128_256


def test_a_known_model_on_a_known_gpu() -> None:
    """Llama-3.2-1B, T = 4096, 66k tokens/s on one H200 (989 TFLOP/s): 39 % without and 60 % with output layer and attention.

    By hand: a block has 2048 · 64 · (2 · 32 + 2 · 8) + 3 · 2048 · 8192 = 60,817,408 parameters in matrices, 16 of them
    973,078,528; the output layer 128,256 · 2048 = 262,668,288. Attention: 12 · 16 · 32 · 64 · 4096 = 1,610,612,736.
    """
    per_token = flops_per_token(LLAMA_3_2_1B, VOCABULARY, 4096)
    assert per_token == {
        "parameters": 6 * 973_078_528,
        "palm": 6 * (973_078_528 + 262_668_288) + 1_610_612_736,
    }
    peak = peak_flops_of("NVIDIA H200")
    assert peak == 989e12
    found = ModelFlops(per_token, peak).mfu(66_000, devices=1)
    assert found == pytest.approx({"parameters": 0.3896, "palm": 0.6023}, abs=1e-4)
    # Half of the attention lies below the causal mask: the 55 % that is published for this shape and speed.
    causal = per_token["palm"] - 1_610_612_736 / 2
    assert causal * 66_000 / peak == pytest.approx(0.5486, abs=1e-4)


def test_devices_share_the_tokens() -> None:
    """Eight devices at eight times the tokens per second are used as much as one."""
    flops = ModelFlops({"parameters": 6e9}, 312e12)
    assert flops.mfu(80_000, 8) == pytest.approx(flops.mfu(10_000, 1))


def test_an_unknown_device_has_no_peak() -> None:
    """A guess would be worse than no figure; variants of a name do not take each other's peak."""
    assert peak_flops_of("") is None
    assert peak_flops_of("NVIDIA GeForce GTX 1080") is None
    assert peak_flops_of("NVIDIA H100 PCIe") == 756e12
    assert peak_flops_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops_of("NVIDIA A100-SXM4-80GB") == 312e12
