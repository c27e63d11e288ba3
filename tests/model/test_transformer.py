"""The decoder compared with transformers' Llama and Qwen3."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from elastic_pt.model.optimizer import ExactAdamW
from elastic_pt.model.transformer import Transformer, build_on_meta

Build = Callable[..., Transformer]
Counterpart = Callable[[Transformer], Any]

VARIANTS: list[dict[str, Any]] = [
    {},
    {"tied_embeddings": False, "kv_heads": 4},
    {"qk_norm": True, "rope_theta": 500_000.0, "norm_epsilon": 1e-6},
    {"qk_norm": True, "kv_heads": 1, "tied_embeddings": False},
]


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 211, (batch, length), generator=torch.Generator().manual_seed(seed))


def scatter_weights_(model: Transformer) -> None:
    """Make norm gains differ from one, so that a missing gain changes the result."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(
    build: Build, counterpart: Counterpart, variant: dict[str, Any]
) -> None:
    """With the same weights, every logit equals that of transformers' Llama or Qwen3 within 1e-5."""
    model = build(**variant)
    scatter_weights_(model)
    tokens_BT = tokens(2, 100)
    with torch.no_grad():
        ours = model.logits(model(tokens_BT))
        theirs = counterpart(model)(tokens_BT).logits
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS[1:3])
def test_fifty_steps_equal_a_plain_loop(
    build: Build, counterpart: Counterpart, variant: dict[str, Any]
) -> None:
    """The losses of fifty training steps equal those of a plain torch loop with transformers' model within 1e-5."""
    model = build(**variant)
    theirs = counterpart(model).train()
    ours_optimizer = ExactAdamW(
        model.named_parameters(), beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1
    )
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    theirs_optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    differences = []
    for step in range(50):
        rows = tokens(4, 33, seed=step % 5)
        inputs, targets = rows[:, :-1], rows[:, 1:]

        loss = model(inputs, targets).total / targets.numel()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        ours_optimizer.step(1e-3, min(1.0, 1.0 / (float(norm) + 1e-6)))
        ours_optimizer.zero_grad()

        logits = theirs(inputs).logits
        their_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        their_loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        theirs_optimizer.step()
        theirs_optimizer.zero_grad()
        differences.append(abs(float(loss.detach() - their_loss.detach())))
    assert max(differences) <= 1e-5
    assert float(loss.detach()) < 4.5, "the loss did not fall, so the comparison proves nothing"


def test_hidden_states_ignore_later_tokens(build: Build) -> None:
    """A hidden state depends only on its own token and earlier tokens."""
    model = build()
    first, second = tokens(1, 20), tokens(1, 20)
    second[0, 10:] = 5
    with torch.no_grad():
        assert torch.equal(model(first)[:, :10], model(second)[:, :10])


def test_parameters_are_the_only_state(build: Build) -> None:
    """A model built on the meta device needs only its parameters."""
    model = build()
    rebuilt = build_on_meta(model.config, model.vocabulary).to_empty(device="cpu")
    assert not list(rebuilt.buffers())
    rebuilt.load_state_dict(model.state_dict())
    tokens_BT = tokens(2, 30)
    with torch.no_grad():
        assert torch.equal(rebuilt(tokens_BT), model(tokens_BT))


def test_loss_is_pure(build: Build) -> None:
    """The bits of a micro-batch's loss and gradients do not depend on earlier micro-batches."""
    model = build()

    def run(seed: int) -> list[torch.Tensor]:
        rows = tokens(3, 41, seed)
        sums = model(rows[:, :-1], rows[:, 1:], z_loss=1e-3)
        return [sums.total, *torch.autograd.grad(sums.total, list(model.parameters()))]

    alone = run(1)
    run(2)
    assert all(torch.equal(a, b) for a, b in zip(alone, run(1), strict=True))
