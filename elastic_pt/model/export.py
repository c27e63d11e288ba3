"""Exports the model as a directory that Hugging Face tools can load, and loads such a directory.

    config.json  generation_config.json  tokenizer.json  tokenizer_config.json  special_tokens_map.json
    model-00001-of-00003.safetensors …  model.safetensors.index.json

The weights keep their bits: float32, under the names of Llama, or of Qwen3 if queries and keys are normalised. Two of
our matrices are several matrices there: the export splits their rows, and the load joins them. Tensors come one by one,
and a shard is written when it is full, so memory holds one shard. The directory is written under a temporary name and
renamed when it is complete.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from elastic_pt.config import ModelSection
from elastic_pt.errors import ConfigError
from elastic_pt.model.transformer import Transformer, build_on_meta

SHARD_BYTES_MAX = 4 * 10**9

_TOP_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "attention.output.weight": ("self_attn.o_proj.weight",),
    "attention.query_norm.weight": ("self_attn.q_norm.weight",),
    "attention.key_norm.weight": ("self_attn.k_norm.weight",),
    "feed_forward_norm.weight": ("post_attention_layernorm.weight",),
    "feed_forward.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "feed_forward.down.weight": ("mlp.down_proj.weight",),
}


def export(
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: ModelSection,
    vocabulary: int,
    tokenizer_json: bytes,
    out: Path,
    *,
    context_length: int,
    end_of_text: str | None = None,
    max_shard_bytes: int = SHARD_BYTES_MAX,
) -> None:
    """Write the directory `out`, which must not exist or be empty.

    `weights` gives each parameter of `Transformer(config, vocabulary)` once, in any order, as a full float32
    tensor. `context_length` is the sequence length in training. `end_of_text` is the token that ends a
    text. Its default is the tokenizer's only special token, if there is exactly one. The exported tokenizer has no
    post-processor that adds tokens to a text, because training data has no such tokens.

    Raises `ConfigError` for a directory with files, an unusable tokenizer, or weights of another model, and `OSError` if
    the directory cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists already; expected a new or empty directory")
    json_files = _json_files(config, vocabulary, tokenizer_json, context_length, end_of_text)
    tokenizer_json = _as_trained(tokenizer_json)
    out.parent.mkdir(parents=True, exist_ok=True)
    # A unique name, so that no existing directory next to `out` is changed.
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    partial.chmod(0o755)
    try:
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        _write_weights(_checked(pairs, config, vocabulary), config, partial, max_shard_bytes)
        (partial / "tokenizer.json").write_bytes(tokenizer_json)
        for name, content in json_files.items():
            _write_json(partial / name, content)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_exported(directory: Path) -> Transformer:
    """The model in an exported directory, on the CPU in float32. Raises `ConfigError` if `export` did not write it."""
    config, vocabulary = _read_config(directory)
    shards = _shards_by_name(directory)
    model = build_on_meta(config, vocabulary)
    values: dict[str, Tensor] = {}
    for name in model.state_dict():
        parts = [_read_tensor(shards, foreign, directory) for foreign in foreign_names(name)]
        values[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    try:
        model.load_state_dict(values, assign=True)
    except RuntimeError as error:
        raise ConfigError(
            f"{directory}: weights do not fit config.json: {error}; expected an exported directory"
        ) from error
    return model


def foreign_names(name: str) -> tuple[str, ...]:
    """Names of our parameter's rows in a Hugging Face Llama or Qwen3, from the first row on."""
    if name in _TOP_NAMES:
        return (_TOP_NAMES[name],)
    blocks, number, leaf = name.split(".", 2)
    assert blocks == "blocks", name
    return tuple(f"model.layers.{number}.{foreign}" for foreign in _BLOCK_NAMES[leaf])


def foreign_parts(name: str, full: Tensor, config: ModelSection) -> Iterator[tuple[str, Tensor]]:
    """Split one full parameter into its Hugging Face tensors."""
    names = foreign_names(name)
    if name.endswith("attention.qkv.weight"):
        rows = [
            heads * config.head_width for heads in (config.heads, config.kv_heads, config.kv_heads)
        ]
    else:
        rows = [full.shape[0] // len(names)] * len(names)
    yield from zip(names, full.split(rows), strict=True)  # type: ignore[no-untyped-call]


def _checked(
    pairs: Iterable[tuple[str, Tensor]], config: ModelSection, vocabulary: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights. Raises `ConfigError` unless every parameter comes exactly once, as float32 in its shape."""
    missing = {name: p.shape for name, p in build_on_meta(config, vocabulary).named_parameters()}
    for name, full in pairs:
        if missing.pop(name, None) != full.shape or full.dtype != torch.float32:
            raise ConfigError(
                f"weight {name} {tuple(full.shape)} {full.dtype}: not one of this model's; "
                "expected each of them once, in float32"
            )
        yield name, full
    if missing:
        raise ConfigError(
            f"weights are missing: {', '.join(sorted(missing))}; expected all of the model"
        )


def _write_weights(
    pairs: Iterable[tuple[str, Tensor]], config: ModelSection, out: Path, max_shard_bytes: int
) -> None:
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total_bytes = waiting_bytes = parameters = 0

    def flush() -> None:
        try:
            save_file(waiting, out / f"{len(shards)}.part", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        shards.append(list(waiting))
        waiting.clear()

    for name, full in pairs:
        for foreign, part in foreign_parts(name, full.detach().cpu(), config):
            if waiting and waiting_bytes + part.nbytes > max_shard_bytes:
                flush()
                waiting_bytes = 0
            waiting[foreign] = part.contiguous()
            waiting_bytes += part.nbytes
            total_bytes += part.nbytes
            parameters += part.numel()
    flush()
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for number, file in enumerate(files):
        (out / f"{number}.part").rename(out / file)
        # The library makes it readable only by its owner.
        (out / file).chmod(0o644)
    index = {name: file for names, file in zip(shards, files, strict=True) for name in names}
    metadata = {"total_parameters": parameters, "total_size": total_bytes}
    content = {"metadata": metadata, "weight_map": dict(sorted(index.items()))}
    _write_json(out / "model.safetensors.index.json", content)


def _json_files(
    config: ModelSection,
    vocabulary: int,
    tokenizer_json: bytes,
    context_length: int,
    end_of_text: str | None,
) -> dict[str, dict[str, Any]]:
    """The contents of the JSON files of the directory, by name; without the index of the weights."""
    end_id, end_token = _end_of_text(tokenizer_json, end_of_text)
    special = {} if end_token is None else {"bos_token": end_token, "eos_token": end_token}
    ids = {"bos_token_id": end_id, "eos_token_id": end_id}
    shape = {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.inner_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": config.norm_epsilon,
        # transformers 4 reads rope_theta, transformers 5 reads rope_parameters.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": context_length,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "dtype": "float32",
        "use_cache": True,
        **ids,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    return {
        "config.json": shape,
        "generation_config.json": {"do_sample": True, **ids},
        "tokenizer_config.json": tokenizer,
        "special_tokens_map.json": special,
    }


def _end_of_text(tokenizer_json: bytes, wanted: str | None) -> tuple[int | None, str | None]:
    """Id and text of the token that ends a text."""
    try:
        added = json.loads(tokenizer_json).get("added_tokens") or []
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"tokenizer: {error}; expected a tokenizer.json of the tokenizers library"
        ) from error
    special = {entry["content"]: int(entry["id"]) for entry in added if entry.get("special")}
    if wanted is None:
        if len(special) != 1:
            return None, None
        (wanted,) = special
    if wanted not in special:
        raise ConfigError(f"end-of-text token {wanted!r}: expected one of {', '.join(special)}")
    return special[wanted], wanted


def _as_trained(tokenizer_json: bytes) -> bytes:
    """The tokenizer; without its post-processor if that adds tokens to a text."""
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(
            f"tokenizer: {error}; expected a tokenizer.json of the tokenizers library"
        ) from error
    if tokenizer.num_special_tokens_to_add(is_pair=False) == 0:
        return tokenizer_json
    content = json.loads(tokenizer_json)
    content["post_processor"] = None
    return json.dumps(content, ensure_ascii=False, indent=2).encode("utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_config(directory: Path) -> tuple[ModelSection, int]:
    path = directory / "config.json"
    try:
        shape = json.loads(path.read_text(encoding="utf-8"))
        config = ModelSection(
            layers=shape["num_hidden_layers"],
            width=shape["hidden_size"],
            heads=shape["num_attention_heads"],
            kv_heads=shape["num_key_value_heads"],
            ffn_width=shape["intermediate_size"],
            rope_theta=shape["rope_parameters"]["rope_theta"],
            norm_epsilon=shape["rms_norm_eps"],
            qk_norm=shape["model_type"] == "qwen3",
            tied_embeddings=shape["tie_word_embeddings"],
        )
        return config, int(shape["vocab_size"])
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected an exported directory") from error
    except KeyError as error:
        raise ConfigError(f"{path}: {error} is missing; expected an exported directory") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; expected an exported directory") from error


def _shards_by_name(directory: Path) -> dict[str, Path]:
    """The file of each tensor."""
    index = directory / "model.safetensors.index.json"
    try:
        if index.exists():
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: directory / file for name, file in files.items()}
        single = directory / "model.safetensors"
        with safe_open(single, framework="pt") as content:
            return dict.fromkeys(content.keys(), single)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(
            f"{directory}: no readable weights: {error}; expected an exported directory"
        ) from error


def _read_tensor(shards: dict[str, Path], name: str, directory: Path) -> Tensor:
    try:
        with safe_open(shards[name], framework="pt") as content:
            tensor: Tensor = content.get_tensor(name)
            return tensor
    except KeyError as error:
        raise ConfigError(
            f"{directory}: weight {name} is in none of its files; expected an exported directory"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{shards[name]}: weight {name} cannot be read: {error}; expected an exported directory"
        ) from error
