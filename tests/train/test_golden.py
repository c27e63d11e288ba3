"""Digests that were recorded once: a change that must not alter numerics leaves them as they are.

The bits depend on the processor and on torch, so digests are kept by platform. To add one, run the tests on it and
copy what they print. On a platform without record only the equality of the exact runs is checked.
"""

from pathlib import Path
from typing import Final

import pytest
import torch

from elastic_pt.train.probe import names_of
from tests.train.world import config_for, train_through

pytestmark = pytest.mark.distributed

RUNS: Final[dict[str, tuple[tuple[str, ...], list[tuple[int, int]]]]] = {
    "one worker": ((), [(1, 6)]),
    "three workers": ((), [(3, 6)]),
    "resized": ((), [(1, 2), (3, 4), (2, 6)]),
    "qk_norm, untied": (("model.qk_norm=true", "model.tied_embeddings=false"), [(2, 6)]),
    "native": (('train.numerics="native"',), [(2, 6)]),
}
"""Overrides of the tiny configuration, and the worlds as (workers, last step)."""

_ANY_WORLD: Final = "74b6897a0f11c6fea22b219660932da5dac7a295d44478e65740290d6d1e9af4"
GOLDEN: Final[dict[tuple[str, str, str], dict[str, str]]] = {
    ("2.13.0+cpu", "x86_64 AVX512", "model name AMD EPYC, cpu family 25, model 17"): {
        "one worker": _ANY_WORLD,
        "three workers": _ANY_WORLD,
        "resized": _ANY_WORLD,
        "qk_norm, untied": "be21d85c826292e973f3a08a9cf32942923eca9756e844640f9dfdc47aaccedf",
        "native": "e666d010307a502f60b4ef50dc274c64391bb6874e98524e2daa18c5c2936fcc",
    },
}
"""By torch, kind and model of the processor."""


@pytest.mark.parametrize("name", RUNS)
def test_digest_equals_the_recorded_one(name: str, tmp_path: Path) -> None:
    """A small run ends with the bits that it had when its digest was recorded."""
    overrides, worlds = RUNS[name]
    config = config_for(tmp_path, "train.steps=6", *overrides)
    found, _ = train_through(config, worlds)
    names = names_of(config.train, torch.device("cpu"))
    platform = (names["torch"], names["processor"], names["processor model"])
    print(f"{platform}: {name!r}: {found!r}")
    if platform in GOLDEN:
        assert found == GOLDEN[platform][name]
    elif config.train.numerics == "exact":
        two_workers, _ = train_through(
            config_for(tmp_path / "two", "train.steps=6", *overrides), [(2, 6)]
        )
        assert found == two_workers
