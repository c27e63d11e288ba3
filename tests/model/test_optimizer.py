"""ExactAdamW: the right numbers, and the same bits for any cut of a parameter."""

import itertools
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_pt.model import optimizer as optimizer_module
from elastic_pt.model.optimizer import ExactAdamW

SETTINGS = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}


def gradients(shape: tuple[int, ...], steps: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Magnitudes over many octaves, so that a double rounding is likely to change a bit.
    return [
        torch.randn(shape, generator=generator)
        * torch.exp(4 * torch.randn(shape, generator=generator))
        for _ in range(steps)
    ]


def train(start: torch.Tensor, steps: list[torch.Tensor], clip: float) -> list[torch.Tensor]:
    """Weights and moments after the given gradients. `start` and each gradient may be rows of a larger tensor."""
    parameter = start.clone().requires_grad_()
    optimizer = ExactAdamW([("p", parameter)], **SETTINGS)
    for number, gradient in enumerate(steps):
        parameter.grad = gradient.clone()
        optimizer.step(1e-3 * (number + 1), clip)
    return [parameter.detach(), *optimizer.state("p")]


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 67),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    clip=st.sampled_from([1.0, 0.37]),
    seed=st.integers(0, 1000),
)
def test_bits_do_not_depend_on_the_cut(
    rows: int, width: int, cuts: list[int], clip: float, seed: int
) -> None:
    """An update of a whole matrix and of any row splits gives the same bits, also in vector tails."""
    start = gradients((rows, width), 1, seed + 1)[0]
    steps = gradients((rows, width), 5, seed)
    whole = train(start, steps, clip)
    bounds = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    pieces = [
        train(start[a:b], [gradient[a:b] for gradient in steps], clip)
        for a, b in itertools.pairwise(bounds)
    ]
    for full, *parts in zip(whole, *pieces, strict=True):
        assert torch.equal(full, torch.cat(parts))


@pytest.mark.parametrize("clip", [1.0, 0.37])
def test_every_operation_is_rounded_separately(clip: float) -> None:
    """The bits equal those of the documented formula in numpy, with one correctly rounded operation at a time."""
    start, steps = gradients((61, 53), 1, 5)[0], gradients((61, 53), 4, 6)
    f32 = numpy.float32
    p = start.numpy().copy()
    m, v = numpy.zeros_like(p), numpy.zeros_like(p)
    for number, gradient in enumerate(steps, start=1):
        rate, c1, root = 1e-3 * number, 1 - 0.9**number, math.sqrt(1 - 0.95**number)
        g = gradient.numpy() * f32(clip)
        m = m * f32(0.9) + g * f32(1 - 0.9)
        v = v * f32(0.95) + (g * g) * f32(1 - 0.95)
        change = m / (numpy.sqrt(v) + f32(1e-8 * root)) * f32(rate * root / c1)
        p = p * f32(1 - rate * 0.1) - change
    for ours, expected in zip(train(start, steps, clip), (p, m, v), strict=True):
        assert torch.equal(ours, torch.from_numpy(expected))


def test_bits_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block size, and so the number of threads, does not change the bits."""
    start, steps = torch.randn(333, 701), gradients((333, 701), 3, 0)
    whole = train(start, steps, 0.5)
    monkeypatch.setattr(optimizer_module, "CPU_BLOCK_ELEMENTS", 1003)
    for first, second in zip(whole, train(start, steps, 0.5), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(37, 29), (53,)])
def test_close_to_torch(shape: tuple[int, ...]) -> None:
    """The weights equal those of torch.optim.AdamW within 1e-6. Vectors do not decay."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(shape, generator=generator) for _ in range(30)]
    ours = start.clone().requires_grad_()
    theirs = start.clone().requires_grad_()
    optimizer = ExactAdamW([("p", ours)], **SETTINGS)
    decay = 0.1 if len(shape) > 1 else 0.0
    reference = torch.optim.AdamW(
        [theirs], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay
    )
    for gradient in steps:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step(1e-3)
        reference.step()
    assert (ours - theirs).abs().max() <= 1e-6
    torch.testing.assert_close(optimizer.state("p")[0], reference.state[theirs]["exp_avg"])
    torch.testing.assert_close(optimizer.state("p")[1], reference.state[theirs]["exp_avg_sq"])
    assert optimizer.step_count == 30


def test_state_restores() -> None:
    """Weights, both moments and the step count are the whole state: a restored run continues with the same bits."""
    start, steps = torch.randn(9, 5), gradients((9, 5), 6, 0)
    undisturbed = train(start, steps, 1.0)
    parameter = train(start, steps[:3], 1.0)
    resumed = parameter[0].clone().requires_grad_()
    optimizer = ExactAdamW([("p", resumed)], **SETTINGS)
    optimizer.step_count = 3
    for live, saved in zip(optimizer.state("p"), parameter[1:], strict=True):
        live.copy_(saved)
    for number, gradient in enumerate(steps[3:], start=3):
        resumed.grad = gradient.clone()
        optimizer.step(1e-3 * (number + 1))
    assert torch.equal(resumed, undisturbed[0])


def test_masters_must_be_float32() -> None:
    """A master weight with a narrower type is refused."""
    with pytest.raises(ValueError, match="float32"):
        ExactAdamW([("p", torch.zeros(3, dtype=torch.bfloat16))], **SETTINGS)
