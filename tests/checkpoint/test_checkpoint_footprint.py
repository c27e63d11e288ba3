"""The computed sizes are those of the real model."""

import pytest

from elastic_pt.checkpoint.footprint import footprint
from elastic_pt.config import ModelSection
from elastic_pt.model.transformer import build_on_meta


@pytest.mark.parametrize(
    "model",
    [
        ModelSection(),
        ModelSection(tied_embeddings=False, qk_norm=True, layers=3, width=96, heads=6, kv_heads=3),
        ModelSection(ffn_width=100, kv_heads=4),
    ],
)
def test_footprint_equals_the_real_model(model: ModelSection) -> None:
    """The footprint's parameters and checkpoint bytes are those of the real model."""
    built = sum(parameter.numel() for parameter in build_on_meta(model, 1000).parameters())
    planned = footprint(model, 1000)
    assert planned.parameters == built
    assert planned.checkpoint_bytes == 12 * built
