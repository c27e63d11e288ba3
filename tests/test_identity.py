"""Nodes of one run agree on everything that decides the bits, or are told what differs."""

from pathlib import Path

import pytest

from elastic_pt.config import Config, parse_config
from elastic_pt.data.manifest import Manifest
from elastic_pt.errors import ConfigError
from elastic_pt.identity import CONFIG_KEY, agree_on_identity, read_run_config
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

PLATFORM = {"torch": "2.13.0", "processor": "x86_64 AVX2"}
DATA = Manifest(300, "uint16", "<|endoftext|>", 0, "tokenizer-0.json", "0" * 64, 0.01, (), {})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A run directory."""
    return open_store(f"file://{tmp_path}")


def config(*overrides: str) -> Config:
    """The smallest configuration, with overrides."""
    text = '[run]\nurl = "run"\n[data]\nurl = "data"\n'
    return parse_config(text, source="test", overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "platform", "named"),
    [
        (("train.learning_rate=0.5",), {}, r"train\.learning_rate = 0\.5: the run .* has 0\.002"),
        (("run.seed=3",), {}, r"run\.seed = 3"),
        ((), {"torch": "2.14.0"}, r"torch = '2\.14\.0': the run .* has '2\.13\.0'"),
        ((), {"processor": "aarch64 DEFAULT"}, r"processor = 'aarch64 DEFAULT'"),
    ],
)
def test_a_node_that_differs_is_refused_by_name(
    store: Store, overrides: tuple[str, ...], platform: dict[str, str], named: str
) -> None:
    """Another value, torch or processor is refused, naming it, what it is here and what it is in the run."""
    agree_on_identity(store, config(), DATA, PLATFORM)
    with pytest.raises(ConfigError, match=named):
        agree_on_identity(store, config(*overrides), DATA, PLATFORM | platform)


def test_what_does_not_touch_the_bits_may_differ(store: Store) -> None:
    """Nodes may have their own telemetry, elastic and checkpoint sections; native numerics allows another torch."""
    mine = agree_on_identity(store, config(), DATA, PLATFORM)
    other = config("telemetry.metrics_port=9400", "elastic.nodes_min=2", "checkpoint.keep=9")
    assert agree_on_identity(store, other, DATA, PLATFORM) == mine


def test_native_runs_do_not_compare_the_platform(store: Store) -> None:
    """Without exact numerics there are no bits to keep, so torch and processor may differ."""
    native = config("train.numerics='native'")
    mine = agree_on_identity(store, native, DATA, PLATFORM)
    assert agree_on_identity(store, native, DATA, {"torch": "2.10", "processor": "cuda"}) == mine


def test_a_run_can_be_joined_by_its_url(store: Store) -> None:
    """The run directory has the configuration that started it, without the first node's own telemetry."""
    started = config("train.steps=7", "telemetry.metrics_port=9400")
    agree_on_identity(store, started, DATA, PLATFORM)
    joined = read_run_config(store, [])
    assert joined.train.steps == 7
    assert joined.telemetry == config().telemetry


def test_a_refused_node_publishes_nothing(store: Store) -> None:
    """The configuration of a node that was refused never becomes the run's."""
    agree_on_identity(store, config(), DATA, PLATFORM)
    store.delete(CONFIG_KEY)
    with pytest.raises(ConfigError, match="seed"):
        agree_on_identity(store, config("run.seed=3"), DATA, PLATFORM)
    assert store.size(CONFIG_KEY) is None
