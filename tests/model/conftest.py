"""Small models, and the same models in transformers, loaded through our export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from elastic_pt.config import ModelSection
from elastic_pt.model.export import export
from elastic_pt.model.initialize import fill_
from elastic_pt.model.transformer import Transformer, build_on_meta

VOCABULARY = 211


@pytest.fixture
def tokenizer_json() -> bytes:
    """A byte-level tokenizer with one special token."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return json.dumps(json.loads(tokenizer.to_str())).encode()


@pytest.fixture
def build() -> Callable[..., Transformer]:
    """Build an initialised model; keyword arguments go to `ModelSection`."""

    def make(seed: int = 0, **fields: Any) -> Transformer:
        shape = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "ffn_width": 96} | fields
        config = ModelSection.model_validate(shape)
        model = build_on_meta(config, VOCABULARY).to_empty(device="cpu")
        fill_(model, layers=config.layers, seed=seed)
        return model

    return make


@pytest.fixture
def counterpart(tmp_path: Path, tokenizer_json: bytes) -> Callable[[Transformer], Any]:
    """The transformers model with the same weights."""

    def make(model: Transformer) -> Any:
        out = tmp_path / f"counterpart-{len(list(tmp_path.iterdir()))}"
        weights = dict(model.named_parameters())
        export(weights, model.config, model.vocabulary, tokenizer_json, out, context_length=128)
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)

    return make
