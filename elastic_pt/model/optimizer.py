"""AdamW with bits that do not depend on how a parameter is cut into shards.

A rank updates its rows of each parameter, and the first and last row depend on the number of ranks. So the result of an
element must not depend on its place in the tensor. A kernel that does several operations at once breaks this: a
multiply and an add may become one operation with a single rounding in a vector loop, but two operations in the loop's
scalar tail (`addcmul`, `addcdiv`, `lerp`, `add` with alpha, fused optimizers). So every operation here is a single
operation that IEEE 754 rounds correctly: multiply, add, subtract, divide or square root of float32. Its result is the
same on every code path.

    m ← m·β1 + g·(1−β1)        v ← v·β2 + (g·g)·(1−β2)
    p ← p·(1 − η·λ) − (m / (√v + ε·√c2)) · (η·√c2 / c1)          c1 = 1−β1ᵗ,  c2 = 1−β2ᵗ

This is AdamW (Loshchilov & Hutter 2019), with the bias corrections moved into the two scalars. Fourteen
passes over memory would be slow, so the update runs block by block: a block stays in the cache for all passes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

CPU_BLOCK_ELEMENTS = 48 * 1024
"""For each thread. Four arrays and a scratch array take 960 KiB, about the second-level cache of a core."""

DEVICE_BLOCK_ELEMENTS = 16 * 1024 * 1024
"""On an accelerator. There, blocks only limit the scratch memory."""


@dataclass(frozen=True)
class _Slot:
    """One parameter's rows on this rank, and their moments in the same shape."""

    parameter: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decays: bool


class _Factors(NamedTuple):
    """The scalars of one step, rounded to float32 once.

    They are tensors, because each operation would convert a Python number again. They stay on the CPU: kernels of any
    device accept CPU scalars as arguments.
    """

    scale: Tensor | float
    beta1: Tensor | float
    rest1: Tensor | float
    beta2: Tensor | float
    rest2: Tensor | float
    epsilon: Tensor | float
    step_size: Tensor | float
    keep: Tensor | float


class ExactAdamW:
    """AdamW over the float32 rows that this rank holds of each parameter.

    Parameters are plain tensors or DTensors, contiguous and float32. Weight decay applies to matrices (two dimensions or
    more) and not to vectors. The state is `step_count` and two moments per name. A checkpoint reads and writes them in
    place through `state`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        beta1: float,
        beta2: float,
        epsilon: float,
        weight_decay: float,
    ) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.epsilon, self.weight_decay = epsilon, weight_decay
        self.step_count = 0
        self._slots: dict[str, _Slot] = {}
        for name, parameter in named_parameters:
            rows = local_rows(parameter)
            if rows.dtype != torch.float32 or not rows.is_contiguous():
                raise ValueError(
                    f"{name}: master weights must be contiguous float32, not {rows.dtype}"
                )
            self._slots[name] = _Slot(
                parameter, torch.zeros_like(rows), torch.zeros_like(rows), parameter.ndim >= 2
            )

    def state(self, name: str) -> tuple[Tensor, Tensor]:
        """`(exp_avg, exp_avg_sq)` of this rank's rows: the live tensors, which may be overwritten in place."""
        slot = self._slots[name]
        return slot.exp_avg, slot.exp_avg_sq

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Update all parameters from their `.grad` times `gradient_scale` (clipping).

        Parameters without a gradient and their moments do not change. Does not communicate.
        """
        self.step_count += 1
        factors = {
            decays: self._factors(learning_rate, gradient_scale, decays) for decays in (True, False)
        }
        for slot in self._slots.values():
            if slot.parameter.grad is not None:
                _update(slot, local_rows(slot.parameter.grad), factors[slot.decays])

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for slot in self._slots.values():
            slot.parameter.grad = None

    def _factors(self, learning_rate: float, gradient_scale: float, decays: bool) -> _Factors:
        correction1 = 1.0 - self.beta1**self.step_count
        correction2_root = math.sqrt(1.0 - self.beta2**self.step_count)
        values = _Factors(
            gradient_scale,
            self.beta1,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            self.epsilon * correction2_root,
            learning_rate * correction2_root / correction1,
            1.0 - learning_rate * self.weight_decay if decays else 1.0,
        )
        return _Factors(*torch.tensor(values, dtype=torch.float32, device="cpu").unbind())


def _update(slot: _Slot, gradient: Tensor, factors: _Factors) -> None:
    rows = local_rows(slot.parameter)
    size = _block_elements(rows.device)
    scratch = torch.empty(min(size, rows.numel()), dtype=torch.float32, device=rows.device)
    scales, decays = bool(factors.scale != 1.0), bool(factors.keep != 1.0)
    blocks = (
        tensor.view(-1).split(size)  # type: ignore[no-untyped-call]
        for tensor in (rows, gradient.contiguous(), slot.exp_avg, slot.exp_avg_sq)
    )
    for p, g, m, v in zip(*blocks, strict=True):
        t = scratch[: p.numel()]
        if scales:
            g = torch.mul(g, factors.scale)
        m.mul_(factors.beta1).add_(torch.mul(g, factors.rest1, out=t))
        v.mul_(factors.beta2).add_(torch.mul(g, g, out=t).mul_(factors.rest2))
        _square_root(v, t).add_(factors.epsilon)
        torch.div(m, t, out=t).mul_(factors.step_size)
        if decays:
            p.mul_(factors.keep)
        p.sub_(t)


def _square_root(x: Tensor, out: Tensor) -> Tensor:
    # torch.sqrt on the CPU is wrong in the last bit for every sixth number (measured with torch 2.13). numpy uses
    # the processor's correctly rounded instruction, and is several times as fast.
    if x.device.type == "cpu":
        numpy.sqrt(x.numpy(), out=out.numpy())
        return out
    return torch.sqrt(x, out=out)


def local_rows(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, or the tensor itself. Shares its memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    rows: Tensor = tensor.to_local()
    return rows


def _block_elements(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_BLOCK_ELEMENTS * torch.get_num_threads()
    return DEVICE_BLOCK_ELEMENTS
