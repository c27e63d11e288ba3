"""Values that the configuration derives from its keys."""

from elastic_pt.config import Config, parse_config


def config(*overrides: str) -> Config:
    """The smallest configuration, with overrides."""
    text = '[run]\nurl = "run"\n[data]\nurl = "data"\n'
    return parse_config(text, source="test", overrides=overrides)


def test_slots_are_global_batch_over_micro_batch() -> None:
    """V is the number of micro-batches of a step, and the most workers that a world can use."""
    assert config("train.global_batch=12", "train.micro_batch=3").train.slots == 4
