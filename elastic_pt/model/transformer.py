"""A decoder like Llama, without code for devices, sharding or training.

    tokens ─► embedding ─► [ x + attention(norm(x)) ─► x + feed_forward(norm(x)) ] × layers ─► norm ─► hidden
                                                                            hidden, targets ─► loss sums

The loss is part of `forward`, because it needs the output weight, which FSDP2 gathers only while the root module runs.
It never holds the logits of more than a chunk of tokens (see `loss`). There is no dropout. The parameters are the only
stored state: each forward pass computes the rotary tables from the configuration. So a model built on the meta device
needs only its parameters.

The projections of queries, keys and values are one matrix, and so are those of gate and up: one large
product is faster than several small ones. `export` splits them.

Shapes: B sequences, T tokens, D width, H query heads, K key/value heads, d head width, F inner width,
V vocabulary, N = B·T.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_pt.config import ModelSection
from elastic_pt.model.loss import LossSums, cross_entropy_sums


class Norm(nn.Module):
    """RMSNorm over the last dimension, with a gain."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x [..., width]`; same shape and type."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class Projection(nn.Module):
    """A matrix without bias, in the layout of `torch.nn.Linear`. Not initialised."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in))

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., width_in]` to `[..., width_out]`."""
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """A table of token vectors. Not initialised."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Token ids to vectors [B, T, D]."""
        return F.embedding(tokens_BT, self.weight)


def rotary_tables(length: int, head_width: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and sines of the rotary embedding, float32 [2, T, 1, d/2] (Su et al. 2021, as in Llama)."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width
    frequencies = 1.0 / (theta**exponents)
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)
    return torch.stack((angles.cos(), angles.sin())).unsqueeze(2)


def rotate(x_BTHd: Tensor, tables: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of each head by the angle of their position. Computes in float32, keeps the type."""
    cosines, sines = tables
    first, second = x_BTHd.chunk(2, dim=-1)
    turned = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
    return turned.type_as(x_BTHd)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions. Normalises queries and keys if `qk_norm` is set."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width = config.head_width
        self.qkv = Projection(
            config.width, (config.heads + 2 * config.kv_heads) * config.head_width
        )
        self.output = Projection(config.heads * config.head_width, config.width)
        self.query_norm: Norm | None = None
        self.key_norm: Norm | None = None
        if config.qk_norm:
            self.query_norm = Norm(config.head_width, config.norm_epsilon)
            self.key_norm = Norm(config.head_width, config.norm_epsilon)

    def forward(self, x_BTD: Tensor, tables: Tensor) -> Tensor:
        """Mix tokens; [B, T, D] in and out."""
        batch, length, _ = x_BTD.shape
        heads_BTHd = self.qkv(x_BTD).view(batch, length, -1, self.head_width)
        query, key, value = heads_BTHd.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, tables), rotate(key, tables)
        mixed_BHTd = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.heads != self.kv_heads,
        )
        merged: Tensor = self.output(mixed_BHTd.transpose(1, 2).reshape(batch, length, -1))
        return merged


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.gate_up = Projection(config.width, 2 * config.inner_width)
        self.down = Projection(config.inner_width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Computes each token independently; [B, T, D] in and out."""
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate_BTF) * up_BTF)
        return out


class Block(nn.Module):
    """One decoder layer, pre-norm, with two residual branches."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.attention_norm = Norm(config.width, config.norm_epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = Norm(config.width, config.norm_epsilon)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: Tensor, tables: Tensor) -> Tensor:
        """[B, T, D] in and out."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), tables)
        out: Tensor = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        return out


class Transformer(nn.Module):
    """The decoder. Parameters are not initialised: use `initialize.fill_` or a checkpoint."""

    def __init__(self, config: ModelSection, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.embedding = Embedding(vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config.width, config.norm_epsilon)
        self.head = None if config.tied_embeddings else Projection(config.width, vocabulary)

    @property
    def output_weight(self) -> nn.Parameter:
        """The output layer's matrix [V, D]. With tied embeddings it is the embedding's matrix."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor | None = None, z_loss: float = 0.0
    ) -> Tensor | LossSums:
        """Final hidden states [B, T, D], or the loss sums over all tokens if there are targets.

        Targets equal to `loss.IGNORED` do not count. With gradients enabled, this call computes the gradients of the
        loss. The result is a pure function of weights and tokens: its bits depend on nothing else.
        """
        tables = rotary_tables(
            tokens_BT.shape[1], self.config.head_width, self.config.rope_theta, tokens_BT.device
        )
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, tables)
        hidden_BTD: Tensor = self.norm(x_BTD)
        if targets_BT is None:
            return hidden_BTD
        return cross_entropy_sums(
            hidden_BTD.flatten(0, 1), self.output_weight, targets_BT.flatten(), z_loss
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]. For a few positions of an unsharded model."""
        return F.linear(hidden, self.output_weight)


def build_on_meta(config: ModelSection, vocabulary: int) -> Transformer:
    """The model on the meta device: shapes and names without memory."""
    with torch.device("meta"):
        return Transformer(config, vocabulary)
