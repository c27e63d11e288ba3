"""What the configuration derives from its keys."""

from elastic_pt.config import Config, parse_config


def config(*overrides: str) -> Config:
    """The smallest configuration, with overrides."""
    text = '[run]\nurl = "run"\n[data]\nurl = "data"\n'
    return parse_config(text, source="test", overrides=overrides)


def test_slots_are_those_of_a_step() -> None:
    """V follows from the batch: no world has more workers than a step has micro-batches."""
    assert config("train.global_batch=12", "train.micro_batch=3").train.slots == 4
