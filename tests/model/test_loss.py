"""The chunked cross-entropy against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_pt.model import loss as loss_module
from elastic_pt.model.loss import IGNORED, chunk_rows, cross_entropy_sums


def case(count: int, width: int, vocabulary: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).mul(0.3).requires_grad_()
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    return hidden, weight, targets


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = hidden @ weight.t()
    penalty = (torch.logsumexp(logits, 1).square() * (targets != IGNORED)).sum() * z_loss
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"), penalty


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 90),
    width=st.integers(1, 40),
    vocabulary=st.integers(2, 120),
    z_loss=st.sampled_from([0.0, 1e-4, 0.1]),
    seed=st.integers(0, 1000),
)
def test_equals_plain(count: int, width: int, vocabulary: int, z_loss: float, seed: int) -> None:
    """Values and both gradients equal those of F.cross_entropy plus z-loss, for any number of chunks."""
    hidden, weight, targets = case(count, width, vocabulary, seed)
    targets[::5] = IGNORED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "ROWS_MULTIPLE", 16)
        patch.setattr(loss_module, "CHUNK_BYTES", 4 * vocabulary * 16)
        assert chunk_rows(vocabulary) == 16
        sums = cross_entropy_sums(hidden, weight, targets, z_loss)
    entropy, penalty = plain(hidden, weight, targets, z_loss)
    torch.testing.assert_close(sums.cross_entropy, entropy, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.z_loss, penalty, rtol=1e-5, atol=1e-4)
    of_tokens = F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(sums.cross_entropy_N, of_tokens.detach(), rtol=1e-5, atol=1e-4)
    ours = torch.autograd.grad(sums.total / 7, [hidden, weight])
    theirs = torch.autograd.grad((entropy + penalty) / 7, [hidden, weight])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_evaluation_gives_the_same_bits() -> None:
    """A call without gradients returns the same sums as a call with gradients, bit for bit."""
    hidden, weight, targets = case(70, 24, 50, 0)
    with torch.no_grad():
        without = cross_entropy_sums(hidden, weight, targets, 1e-3)
    with_gradients = cross_entropy_sums(hidden, weight, targets, 1e-3)
    assert not without.total.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(without, with_gradients, strict=True))


def test_only_the_inputs_that_need_it_get_a_gradient() -> None:
    """A frozen output layer gets no gradient. The other gradient is unchanged."""
    hidden, weight, targets = case(20, 8, 30, 0)
    both = torch.autograd.grad(cross_entropy_sums(hidden, weight, targets).total, [hidden, weight])
    sums = cross_entropy_sums(hidden, weight.detach(), targets)
    assert torch.equal(torch.autograd.grad(sums.total, [hidden])[0], both[0])


def test_large_logits_stay_finite() -> None:
    """Logits beyond the range of exp give the right loss."""
    hidden = torch.tensor([[1000.0], [-1000.0]])
    weight = torch.tensor([[1.0], [-1.0]])
    sums = cross_entropy_sums(hidden, weight, torch.tensor([0, 0]))
    assert sums.total == 2000.0


def test_bfloat16_accumulates_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bfloat16 inputs the loss and the weight gradient lose only the rounding of each product."""
    monkeypatch.setattr(loss_module, "ROWS_MULTIPLE", 16)
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 64 * 16)
    hidden, weight, targets = case(2048, 32, 64, 0)
    narrow = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    sums = cross_entropy_sums(narrow[0], narrow[1], targets)
    sums.total.backward()
    wide = [t.detach().float().requires_grad_() for t in narrow]
    entropy, _ = plain(wide[0], wide[1], targets, 0.0)
    entropy.backward()
    assert sums.total.dtype == torch.float32
    assert narrow[1].grad is not None
    assert wide[1].grad is not None
    assert narrow[1].grad.dtype == torch.bfloat16
    torch.testing.assert_close(sums.total, entropy, rtol=2e-3, atol=0.0)
    error = (narrow[1].grad.float() - wide[1].grad).norm() / wide[1].grad.norm()
    assert error < 4e-3, error


def test_a_second_backward_is_refused() -> None:
    """One backward pass uses the gradients. A second pass is an error and gives no wrong number."""
    hidden, weight, targets = case(5, 4, 6, 0)
    sums = cross_entropy_sums(hidden, weight, targets)
    sums.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already used"):
        sums.total.backward()


def test_chunk_rows_depend_on_the_vocabulary() -> None:
    """A chunk's logits take at most 32 MiB, unless 128 rows take more."""
    assert chunk_rows(128_256) == 128
    assert chunk_rows(8192) == 1024
    assert chunk_rows(30_000) == 256
