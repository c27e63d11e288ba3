"""The name of a training state: no two states of a run have the same generation and step."""

from typing import NamedTuple


class State(NamedTuple):
    """The training state after a step, as the workers of one generation computed it."""

    generation: int
    step: int
