"""Sampling."""

from collections.abc import Callable

import pytest
import torch

from elastic_pt.model.generate import generate
from elastic_pt.model.transformer import Transformer

Build = Callable[..., Transformer]


def test_greedy_takes_the_most_likely_token(build: Build) -> None:
    """At temperature 0 each token is the argmax of the logits after all previous tokens."""
    model = build()
    context = [3, 1, 4]
    new = generate(model, context, max_new_tokens=4, temperature=0.0)
    for token in new:
        with torch.no_grad():
            assert token == int(model.logits(model(torch.tensor([context]))[0, -1]).argmax())
        context.append(token)


def test_the_seed_determines_the_text(build: Build) -> None:
    """The same seed gives the same text, another seed gives another text, and top_k 1 is greedy."""
    model = build()
    first = generate(model, [1], max_new_tokens=12, seed=1)
    assert first == generate(model, [1], max_new_tokens=12, seed=1)
    assert first != generate(model, [1], max_new_tokens=12, seed=2)
    greedy = generate(model, [1], max_new_tokens=5, temperature=0.0)
    assert greedy == generate(model, [1], max_new_tokens=5, top_k=1)


def test_limits(build: Build) -> None:
    """The stop token ends the text and is not part of it. An empty prompt is a `ValueError`."""
    model = build()
    full = generate(model, [7, 8], max_new_tokens=6, temperature=0.0)
    assert generate(model, [7, 8], max_new_tokens=6, temperature=0.0, stop_token=full[0]) == []
    with pytest.raises(ValueError, match="empty"):
        generate(model, [], max_new_tokens=1)


def test_the_context_limit_hides_earlier_tokens(build: Build) -> None:
    """With a context limit, tokens before the context do not change the text. Without a limit they do."""
    model = build(tied_embeddings=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)  # With initial weights the context has almost no effect.
    short = generate(model, [7, 8], max_new_tokens=1, temperature=0.0)
    texts = [
        generate(model, [first, 7, 8], max_new_tokens=1, temperature=0.0, context_length=limit)
        for limit in (2, 0)
        for first in range(8)
    ]
    assert all(text == short for text in texts[:8])
    assert any(text != short for text in texts[8:])
