"""Number of parameters and checkpoint size of a model, computed from its configuration alone."""

from dataclasses import dataclass

from elastic_pt.config import ModelSection

_FLOAT_BYTES = 4
_STATE_TENSORS = 3
"""Master weights and AdamW's two moments."""


@dataclass(frozen=True)
class Footprint:
    """Sizes of one model."""

    parameters: int
    checkpoint_bytes: int
    """Weights and optimizer state of all workers together."""


def footprint(model: ModelSection, vocabulary: int) -> Footprint:
    """The sizes of a model with a vocabulary of `vocabulary` tokens."""
    attention = model.width * model.head_width * (2 * model.heads + 2 * model.kv_heads)
    norms = 2 * model.width + (2 * model.head_width if model.qk_norm else 0)
    block = attention + 3 * model.width * model.inner_width + norms
    embedding = vocabulary * model.width
    tables = 1 if model.tied_embeddings else 2
    parameters = model.layers * block + tables * embedding + model.width
    return Footprint(parameters, parameters * _FLOAT_BYTES * _STATE_TENSORS)
