"""Cross-entropy over a large vocabulary. It never holds the logits of all tokens.

The plain implementation holds the logits [N, V], their log-softmax and their gradient: three times N·V floats, by far
the largest tensors in a step of a small model. Here all operations run on one chunk of rows at a time:

    logits_c = hidden_c · Wᵀ ─► log-sum-exp, loss ─► softmax − onehot, in place ─► hidden grad, weight grad +=

The gradients are ready when forward ends. Backward only multiplies them by the incoming factor.

With z-loss weight z and s = log-sum-exp of a row, the loss of the row is  s − logit[target] + z·s², and its
gradient with respect to the logits is  softmax·(1 + 2·z·s) − onehot(target).

The number of rows in a chunk depends only on the shapes, so the order of the sums does too. Sums over tokens and the
accumulated weight gradient are float32 for any input type.

Shapes: N tokens, D width, V vocabulary, C rows of a chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""The value of a target that does not count, as in `torch.nn.functional.cross_entropy`."""

CHUNK_BYTES = 32 * 2**20
"""Size of a chunk's float32 logits, if this gives at least the minimum of rows."""

ROWS_MULTIPLE = 128
"""Minimum rows of a chunk: each chunk reads the whole weight matrix."""


class LossSums(NamedTuple):
    """Sums over the tokens of a call, float32 scalars, and their parts. Only `total` has gradients."""

    total: Tensor
    """Cross-entropy plus weighted z-loss."""
    cross_entropy: Tensor
    z_loss: Tensor
    """Already weighted; 0 without z-loss."""
    cross_entropy_N: Tensor
    """Of each token, float32."""

    def of_rows(self, rows: int) -> Tensor:
        """Cross-entropy of each of the `rows` equally long rows of the call, summed in float64."""
        return self.cross_entropy_N.view(rows, -1).double().sum(1)


def chunk_rows(vocabulary: int) -> int:
    """Number of rows with about `CHUNK_BYTES` of float32 logits; a positive multiple of 128."""
    return max(1, CHUNK_BYTES // (4 * vocabulary * ROWS_MULTIPLE)) * ROWS_MULTIPLE


def cross_entropy_sums(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_loss: float = 0.0
) -> LossSums:
    """Sums of cross-entropy and z-loss over N tokens. Targets equal to `IGNORED` do not count.

    With gradients enabled, this call computes the gradients, and one backward pass may follow.
    """
    wanted = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    if wanted:
        sums = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, z_loss)  # type: ignore[no-untyped-call]
        return LossSums(*sums)
    return _forward(hidden_ND, weight_VD, targets_N, z_loss, None, None)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in forward and returns them once in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_loss: float
    ) -> LossSums:
        ctx.hidden_grad_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        ctx.weight_grad_VD = None
        if ctx.needs_input_grad[1]:
            ctx.weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        ctx.weight_dtype = weight_VD.dtype
        sums = _forward(
            hidden_ND, weight_VD, targets_N, z_loss, ctx.hidden_grad_ND, ctx.weight_grad_VD
        )
        ctx.mark_non_differentiable(sums.cross_entropy, sums.z_loss, sums.cross_entropy_N)
        return sums

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, scale: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        # In place, to avoid a second [V, D] tensor. So only one backward pass is possible.
        hidden_grad_ND, weight_grad_VD = ctx.hidden_grad_ND, ctx.weight_grad_VD
        if hidden_grad_ND is None and weight_grad_VD is None:
            raise RuntimeError("the gradients of this loss were already used by a backward pass")
        ctx.hidden_grad_ND = ctx.weight_grad_VD = None
        if hidden_grad_ND is not None:
            hidden_grad_ND.mul_(scale)
        if weight_grad_VD is not None:
            weight_grad_VD = weight_grad_VD.mul_(scale).to(ctx.weight_dtype)
        return hidden_grad_ND, weight_grad_VD, None, None


def _forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float,
    hidden_grad_ND: Tensor | None,
    weight_grad_VD: Tensor | None,
) -> LossSums:
    """Compute the loss sums and fill the given gradients. The weight's gradient must be zeros in float32."""
    count, vocabulary = targets_N.shape[0], weight_VD.shape[0]
    rows = min(chunk_rows(vocabulary), max(count, 1))
    losses_N = torch.empty(count, dtype=torch.float32, device=hidden_ND.device)
    penalties_N = torch.empty_like(losses_N)
    buffer_CV = torch.empty(rows, vocabulary, dtype=hidden_ND.dtype, device=hidden_ND.device)
    for start in range(0, count, rows):
        chunk = slice(start, min(start + rows, count))
        hidden_CD = hidden_ND[chunk]
        product_CV = torch.mm(hidden_CD, weight_VD.t(), out=buffer_CV[: hidden_CD.shape[0]])
        logits_CV = product_CV.float()
        gradient_CV = _loss_of_chunk(
            logits_CV, targets_N[chunk], z_loss, losses_N[chunk], penalties_N[chunk]
        )
        if hidden_grad_ND is None and weight_grad_VD is None:
            continue
        product_CV.copy_(gradient_CV)
        if hidden_grad_ND is not None:
            torch.mm(product_CV, weight_VD, out=hidden_grad_ND[chunk])
        if weight_grad_VD is not None:
            _add_product_(weight_grad_VD, product_CV.t(), hidden_CD)
    cross_entropy, penalty = losses_N.sum(), penalties_N.sum()
    return LossSums(cross_entropy + penalty, cross_entropy, penalty, losses_N)


def _loss_of_chunk(
    logits_CV: Tensor, targets_C: Tensor, z_loss: float, losses_C: Tensor, penalties_C: Tensor
) -> Tensor:
    """Write each row's loss and z-loss. Replaces the logits, in place, by their gradient and returns it."""
    counted_C1 = (targets_C != IGNORED).unsqueeze(1)
    index_C1 = targets_C.unsqueeze(1).where(counted_C1, 0)
    target_logits_C1 = logits_CV.gather(1, index_C1)
    highest_C1 = logits_CV.amax(dim=1, keepdim=True)
    sum_C1 = logits_CV.sub_(highest_C1).exp_().sum(dim=1, keepdim=True)
    normaliser_C1 = highest_C1 + sum_C1.log()
    losses_C.copy_((normaliser_C1 - target_logits_C1).where(counted_C1, 0.0).squeeze(1))
    penalties_C.copy_((z_loss * normaliser_C1.square()).where(counted_C1, 0.0).squeeze(1))
    factor_C1 = ((1.0 + 2.0 * z_loss * normaliser_C1) / sum_C1).where(counted_C1, 0.0)
    logits_CV.mul_(factor_C1)
    return logits_CV.scatter_add_(1, index_C1, -counted_C1.to(logits_CV.dtype))


def _add_product_(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """`sum += left · right`, accumulated in float32 even if the factors are narrower."""
    if left_VC.dtype == sum_VD.dtype:
        sum_VD.addmm_(left_VC, right_CD)
    else:
        sum_VD.add_(torch.mm(left_VC, right_CD))
