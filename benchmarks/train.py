"""Tokens per second and peak memory of our training step and of transformers' Llama, in one run.

    python benchmarks/train.py [--device cuda] [--width 512 --layers 8 ...] [--json FILE]

Both sides do the same work on the same weights and tokens: forward, backward, clipping and AdamW, on the same
device with the same number of threads. The reference is `LlamaForCausalLM` with its own loss (SDPA attention),
`clip_grad_norm_` and torch's fused AdamW. The steps of the two sides alternate. The speed is the median of the ratios
of adjacent pairs, so a drift of the machine cancels out. Peak memory is the memory of one process per side minus the
memory at its start: resident memory on the CPU, allocated memory on CUDA.

It measures only the step: no sharding, no data loading.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from elastic_pt.config import ModelSection
from elastic_pt.model.export import foreign_parts
from elastic_pt.model.initialize import fill_
from elastic_pt.model.optimizer import ExactAdamW
from elastic_pt.model.transformer import Transformer, build_on_meta

Step = Callable[[torch.Tensor], float]
BETAS, EPSILON, DECAY, CLIP, LEARNING_RATE = (0.9, 0.95), 1e-8, 0.1, 1.0, 1e-3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def build_ours(options: argparse.Namespace) -> Transformer:
    config = ModelSection(
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        kv_heads=options.kv_heads,
        tied_embeddings=not options.untied,
    )
    model = build_on_meta(config, options.vocabulary).to_empty(device=options.device)
    fill_(model, layers=config.layers, seed=0)
    return model


def our_step(options: argparse.Namespace) -> Step:
    model = build_ours(options)
    optimizer = ExactAdamW(
        model.named_parameters(),
        beta1=BETAS[0],
        beta2=BETAS[1],
        epsilon=EPSILON,
        weight_decay=DECAY,
    )

    def step(rows: torch.Tensor) -> float:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            sums = model(rows[:, :-1], rows[:, 1:])
        loss = sums.total / rows[:, 1:].numel()
        loss.backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]
        )
        optimizer.step(LEARNING_RATE, min(1.0, CLIP / (norm.item() + 1e-6)))
        optimizer.zero_grad()
        return float(loss.item())

    return step


def their_step(options: argparse.Namespace) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = build_ours(options)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=ours.config.inner_width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.length,
        rms_norm_eps=ours.config.norm_epsilon,
        tie_word_embeddings=ours.config.tied_embeddings,
    )
    model = LlamaForCausalLM._from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="sdpa"
    ).to(options.device)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            for foreign, part in foreign_parts(name, parameter, ours.config):
                weights[foreign].copy_(part)
    del ours
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)

    def step(rows: torch.Tensor) -> float:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
            loss = model(
                rows[:, :-1], labels=rows[:, :-1], shift_labels=rows[:, 1:].contiguous()
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


STEPS: dict[str, Callable[[argparse.Namespace], Step]] = {"ours": our_step, "theirs": their_step}


def batch(options: argparse.Namespace, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (options.batch, options.length + 1)
    return torch.randint(0, options.vocabulary, shape, generator=generator).to(options.device)


def timed(step: Step, rows: torch.Tensor) -> tuple[float, float]:
    """Seconds and loss of one step. `.item()` in the step waits for the device."""
    start = time.perf_counter()
    loss = step(rows)
    if rows.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, loss


def peak_bytes(side: str, options: argparse.Namespace) -> int:
    """Bytes of memory that three steps need, with model and optimizer, without the memory at the start."""
    torch.set_num_threads(options.threads)
    tiny = argparse.Namespace(
        **vars(options) | {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1}
    )
    tiny.vocabulary, tiny.length = 64, 16
    # Imports, thread pools and the allocator count as memory at the start.
    STEPS[side](tiny)(batch(tiny, 0))
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step = STEPS[side](options)
    for seed in range(3):
        step(batch(options, seed))
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    steps = {side: build(options) for side, build in STEPS.items()}
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    difference = 0.0
    for pair in range(-2, options.pairs):
        rows = batch(options, pair + 2)
        order = ("ours", "theirs") if pair % 2 else ("theirs", "ours")
        results = {side: timed(steps[side], rows) for side in order}
        difference = max(difference, abs(results["ours"][1] - results["theirs"][1]))
        if pair >= 0:  # The first two pairs warm up.
            for side in order:
                seconds[side].append(results[side][0])
    ratios = [t / o for o, t in zip(seconds["ours"], seconds["theirs"], strict=True)]
    tokens = options.batch * options.length
    return {
        "speed_ratio": statistics.median(ratios),
        "speed_ratios": ratios,
        "largest_loss_difference": difference,
        **{f"{side}_tokens_per_s": tokens / statistics.median(s) for side, s in seconds.items()},
    }


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}}
    result["torch"] = torch.__version__
    context = multiprocessing.get_context("spawn")
    for side in STEPS:
        with context.Pool(1) as pool:
            result[f"{side}_peak_bytes"] = pool.apply(peak_bytes, (side, options))
    result["peak_ratio"] = result["ours_peak_bytes"] / result["theirs_peak_bytes"]
    result |= measure_speed(options)
    for side in STEPS:
        speed, peak = result[f"{side}_tokens_per_s"], result[f"{side}_peak_bytes"]
        print(f"{side:>7}: {speed:10.0f} tokens/s   peak {peak / 1e6:8.0f} MB")
    print(
        f"  ratio: {result['speed_ratio']:10.2f} x speed    {result['peak_ratio']:13.2f} x memory"
    )
    print(f"  losses differ by at most {result['largest_loss_difference']:.1e}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
