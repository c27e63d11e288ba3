"""Samples text from a trained model.

It computes the whole context again for every token. This is fast enough for texts of a few hundred tokens, and the
model needs no cache of keys and values. To serve the model, `export` it.
"""

import torch
from torch import Tensor

from elastic_pt.model.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    token_ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    stop_token: int | None = None,
    context_length: int = 0,
) -> list[int]:
    """Continue `token_ids` (at least one). Returns only the new tokens, without `stop_token`.

    `temperature` 0 takes the most likely token. `top_k` 0 samples from the whole vocabulary. The model's input is at
    most the last `context_length` tokens; 0 is no limit. The same seed gives the same text. The model must be
    unsharded and on one device.
    """
    if not token_ids:
        raise ValueError("token_ids is empty: expected at least one token")
    device = model.output_weight.device
    generator = torch.Generator().manual_seed(seed)
    context = list(token_ids)
    for _ in range(max_new_tokens):
        hidden_BTD: Tensor = model(torch.tensor([context[-context_length:]], device=device))
        logits_V = model.logits(hidden_BTD[0, -1]).float().cpu()
        token = _sample(logits_V, temperature, top_k, generator)
        if token == stop_token:
            break
        context.append(token)
    return context[len(token_ids) :]


def _sample(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits_V.argmax())
    count = min(top_k, logits_V.numel()) if top_k else logits_V.numel()
    highest, tokens = logits_V.topk(count)
    probabilities = torch.softmax(highest / temperature, dim=0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
