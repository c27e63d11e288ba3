"""The exported directory, read by transformers and by our code."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_pt.config import ModelSection
from elastic_pt.errors import ConfigError
from elastic_pt.model.export import export, foreign_parts, load_exported
from elastic_pt.model.transformer import Transformer

Build = Callable[..., Transformer]


def write(model: Transformer, tokenizer_json: bytes, out: Path, shard_bytes: int = 10**9) -> None:
    export(
        ((name, p.detach()) for name, p in model.named_parameters()),
        model.config,
        model.vocabulary,
        tokenizer_json,
        out,
        context_length=77,
        max_shard_bytes=shard_bytes,
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_round_trip_keeps_the_bits(
    build: Build, tokenizer_json: bytes, tmp_path: Path, tied: bool, qk_norm: bool, shard_bytes: int
) -> None:
    """transformers and `load_exported` load exactly the model's weights, bit for bit."""
    model = build(tied_embeddings=tied, qk_norm=qk_norm)
    out = tmp_path / "model"
    write(model, tokenizer_json, out, shard_bytes)
    assert (len(list(out.glob("model-*.safetensors"))) > 1) == (shard_bytes < 10**9)
    assert (out / "model.safetensors.index.json").exists()
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        for foreign, part in foreign_parts(name, parameter.detach(), model.config):
            assert torch.equal(theirs.pop(foreign), part)
    assert not theirs
    assert loaded.config.max_position_embeddings == 77
    assert loaded.config.tie_word_embeddings == tied
    again = load_exported(out)
    assert again.config.model_dump() | {"ffn_width": 0} == model.config.model_dump() | {
        "ffn_width": 0
    }
    ours = dict(model.named_parameters())
    assert all(torch.equal(p, ours.pop(name)) for name, p in again.named_parameters())
    assert not ours


def test_tokenizer_loads(build: Build, tokenizer_json: bytes, tmp_path: Path) -> None:
    """AutoTokenizer encodes like our tokenizer and has the end-of-text token. Generation runs."""
    out = tmp_path / "model"
    write(build(), tokenizer_json, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("abba")["input_ids"] == [0, 1, 1, 0]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 2)
    assert tokenizer.model_max_length == 77
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == 2
    new = model.generate(torch.tensor([[0, 1]]), max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert new.shape == (1, 5)


@pytest.mark.parametrize("adds", [True, False])
def test_the_exported_tokenizer_adds_no_tokens(
    build: Build, tokenizer_json: bytes, tmp_path: Path, adds: bool
) -> None:
    """A post-processor that adds tokens is left out, because training data has none. Another one stays."""
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    template = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 2)]
    )
    tokenizer.post_processor = template if adds else processors.ByteLevel()
    given = tokenizer.to_str().encode()
    write(build(), given, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("abba")["input_ids"] == [0, 1, 1, 0]
    assert ((tmp_path / "model" / "tokenizer.json").read_bytes() == given) == (not adds)


def test_a_used_directory_is_refused(build: Build, tokenizer_json: bytes, tmp_path: Path) -> None:
    """An export into a directory with files is refused."""
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ConfigError, match="exists already"):
        write(build(), tokenizer_json, tmp_path)


def test_a_failed_export_leaves_no_directory(
    build: Build, tokenizer_json: bytes, tmp_path: Path
) -> None:
    """If weights are missing or of another model, no directory appears."""
    model = build()
    weights = dict(model.named_parameters())
    del weights["blocks.1.attention.qkv.weight"]
    with pytest.raises(ConfigError, match=r"missing: blocks\.1\.attention\.qkv\.weight"):
        export(weights, model.config, 211, tokenizer_json, tmp_path / "out", context_length=8)
    with pytest.raises(ConfigError, match="not one of this model's"):
        export(
            {"x": torch.zeros(1)},
            model.config,
            211,
            tokenizer_json,
            tmp_path / "out",
            context_length=8,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"not json", b"[]", b"{}"])
def test_a_bad_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    """A broken tokenizer is refused in one line, before any file is written."""
    with pytest.raises(ConfigError, match="tokenizer"):
        export({}, ModelSection(), 10, content, tmp_path / "out", context_length=8)
    assert not list(tmp_path.iterdir())


def test_a_broken_directory_is_refused(build: Build, tokenizer_json: bytes, tmp_path: Path) -> None:
    """The error of a load names the file that is missing, damaged or incomplete."""
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_exported(tmp_path)
    out = tmp_path / "model"
    write(build(), tokenizer_json, out)
    shard = out / "model-00001-of-00001.safetensors"
    weights = shard.read_bytes()
    shard.write_bytes(weights[:100])
    with pytest.raises(ConfigError, match=shard.name):
        load_exported(out)
    shard.write_bytes(weights)
    shape = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(shape | {"vocab_size": 5}))
    with pytest.raises(ConfigError, match="do not fit"):
        load_exported(out)
