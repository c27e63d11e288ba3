"""A small corpus and a run on it, made once per session by the commands themselves."""

import random
from pathlib import Path

import pytest
from command_line import CONFIG, STEPS, Trained, elastic_pt


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made-up documents."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        rng = random.Random(number)
        words = ("".join(rng.choices("abcdeé", k=rng.randint(1, 6))) for _ in range(120))
        (folder / f"{number}.txt").write_text(" ".join(words))
    (folder / "empty.txt").write_text("")
    return folder


@pytest.fixture(scope="session")
def prepared(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Prepared data and a configuration for it; no run yet."""
    root = tmp_path_factory.mktemp("trained")
    options = ("--vocab-size", 300, "--held-out", 0.2)
    result = elastic_pt("prepare", texts, "--out", root / "data", *options)
    assert result.exit_code == 0, result
    (root / "run.toml").write_text(CONFIG.format(run=root / "run", data=root / "data"))
    return Trained(root)


@pytest.fixture(scope="session")
def trained(prepared: Trained) -> Trained:
    """The run of that configuration, completed."""
    result = elastic_pt("local", prepared.config, "--nodes", 1)
    assert result.exit_code == 0, result
    assert f"completed at step {STEPS}" in result.out
    return prepared
