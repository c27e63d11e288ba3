"""The state of training between two steps, and how it maps to the tensors of a checkpoint.

The resumable part contains no rank and no world size: the full weights, the two AdamW moments, how many steps are
done, how many of them updated the weights, and how many were skipped in a row up to now. The learning rate, the
data position and every random number follow from the step and the seed. A worker holds the rows `shard_rows` of
each tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from elastic_pt.config import Config
from elastic_pt.model import initialize
from elastic_pt.model.optimizer import ExactAdamW, local_rows
from elastic_pt.model.parallel import parallelize, resolve_compute_dtype
from elastic_pt.model.transformer import Transformer, build_on_meta
from elastic_pt.train.clock import StepClock, time_collectives
from elastic_pt.train.exact import Rounds, RowSquares, install_exact_reduction, sum_without_scaling


@dataclass(frozen=True)
class Slice:
    """A worker's rows of one tensor of the state."""

    rows: Tensor
    """The memory in use, not a copy."""
    global_shape: tuple[int, ...]
    first_row: int


class TrainState:
    """Model, optimizer and position. Worker process; every rank builds one."""

    def __init__(
        self, config: Config, vocabulary: int, mesh: DeviceMesh, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        self.rank = mesh.get_rank()
        self.world_size = mesh.size()
        self.steps_done = 0
        self.skipped_in_a_row = 0
        self.rounds = Rounds(config.train.slots, self.world_size)
        self.clock = StepClock()
        self.model = _build(config, vocabulary, mesh, device)
        exact = config.train.numerics == "exact"
        time_collectives(self.model, self.clock, reduce_scatter=not exact)
        if exact:
            install_exact_reduction(self.model, self.rounds, self.clock)
        self.optimizer = ExactAdamW(
            self.model.named_parameters(),
            beta1=config.train.beta1,
            beta2=config.train.beta2,
            epsilon=config.train.epsilon,
            weight_decay=config.train.weight_decay,
        )
        self.row_squares = RowSquares(
            (parameter.shape[0], self._span(parameter)[0]) for parameter in self.model.parameters()
        )

    def initialize(self) -> None:
        """Set the weights to their values of step 0; does not communicate."""
        initialize.fill_(self.model, layers=self.config.model.layers, seed=self.config.run.seed)

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """Every tensor of a checkpoint by name, with this worker's rows of it (the memory in use)."""
        for name, parameter in self.model.named_parameters():
            exp_avg, exp_avg_sq = self.optimizer.state(name)
            first, end = self._span(parameter)
            shape = tuple(parameter.shape)
            parts = {"model": local_rows(parameter), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            for kind, rows in parts.items():
                assert rows.shape[0] == end - first
                yield f"{kind}/{name}", Slice(rows.detach(), shape, first)

    def _span(self, parameter: Tensor) -> tuple[int, int]:
        rows = initialize.shard_rows(parameter.shape[0], self.rank, self.world_size)
        return rows.start, rows.stop


def _build(config: Config, vocabulary: int, mesh: DeviceMesh, device: torch.device) -> Transformer:
    model = build_on_meta(config.model, vocabulary)
    parallelize(model, mesh, config.train, resolve_compute_dtype(config.train, device))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            sum_without_scaling(module)
    model.to_empty(device=device)
    return model
