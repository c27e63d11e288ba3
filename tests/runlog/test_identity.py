"""Nodes of one run agree on everything that decides the bits; otherwise the error names what differs."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import elastic_pt
from elastic_pt.config import Config, parse_config
from elastic_pt.data.manifest import Manifest
from elastic_pt.errors import ConfigError
from elastic_pt.membership.decision.status import difference
from elastic_pt.runlog.identity import (
    CONFIG_KEY,
    IDENTITY_KEY,
    agree_on_identity,
    fingerprint,
    read_run_config,
)
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
def test_node_with_another_value_is_refused_by_name(
    store: Store, overrides: tuple[str, ...], platform: dict[str, str], named: str
) -> None:
    """Another value, torch or processor is refused. The message has its name, the value here and that of the run."""
    agree_on_identity(store, config(), DATA, PLATFORM)
    with pytest.raises(ConfigError, match=named):
        agree_on_identity(store, config(*overrides), DATA, PLATFORM | platform)


EXACT_PLATFORM = PLATFORM | {
    "vendor": "GenuineIntel",
    "environment": "",
    "processor model": "Xeon 1",
    "probe": "1f",
}
"""The platform as this version records it; `PLATFORM` is as the first version did."""


@pytest.mark.parametrize(
    ("differs", "named"),
    [
        ({"vendor": "AuthenticAMD", "probe": "2a"}, "vendor = 'AuthenticAMD': the run at"),
        (
            {"environment": "MKL_CBWR=AVX2"},
            "environment = 'MKL_CBWR=AVX2': .* has ''; .* with the same variables",
        ),
        ({"probe": "2a"}, "probe = '2a': .* has '1f'.*nothing that has a name.*reopen --platform"),
        ({"probe": "2a", "processor model": "Xeon 2"}, r"probe = .*'Xeon 2' \(there 'Xeon 1'\)"),
        ({"processor model": "Xeon 2"}, ""),
    ],
)
def test_another_probe_is_refused_but_not_another_processor_name(
    store: Store, differs: dict[str, str], named: str
) -> None:
    """I9: A node that computes other bits is refused with the cause. Another name of the processor alone is accepted."""
    agree_on_identity(store, config(), DATA, EXACT_PLATFORM)
    mine = fingerprint(config(), DATA, EXACT_PLATFORM)
    other = EXACT_PLATFORM | differs
    if not named:
        agree_on_identity(store, config(), DATA, other)
        assert fingerprint(config(), DATA, other) == mine
        return
    with pytest.raises(ConfigError, match=named):
        agree_on_identity(store, config(), DATA, other)
    assert differing(fingerprint(config(), DATA, other), mine) == differs.keys() - {
        "processor model"
    }


def test_settings_are_compared_before_the_platform(store: Store) -> None:
    """Another setting may change the probe. Then the message must name the setting."""
    agree_on_identity(store, config(), DATA, EXACT_PLATFORM)
    with pytest.raises(ConfigError, match=r"run\.seed = 3"):
        agree_on_identity(store, config("run.seed=3"), DATA, EXACT_PLATFORM | {"probe": "2a"})


@pytest.mark.parametrize("bound", [{}, PLATFORM], ids=["identity", "generation"])
def test_names_missing_in_the_recorded_platform_are_not_compared(
    store: Store, bound: dict[str, str]
) -> None:
    """A run of an earlier version, which recorded fewer names of its platform, accepts nodes with more names."""
    agree_on_identity(store, config(), DATA, PLATFORM)
    agree_on_identity(store, config(), DATA, EXACT_PLATFORM, bound)
    with pytest.raises(ConfigError, match="torch = '3'"):
        agree_on_identity(store, config(), DATA, EXACT_PLATFORM | {"torch": "3"}, bound)


@pytest.mark.parametrize(
    ("first", "named"),
    [
        (EXACT_PLATFORM, "vendor = 'AuthenticAMD': the run at .* has 'GenuineIntel'"),
        (EXACT_PLATFORM | {"accelerator": "H100"}, "accelerator = None: the run at .* has 'H100'"),
    ],
    ids=["same names", "more names"],
)
def test_newest_generation_replaces_the_whole_platform(
    store: Store, first: dict[str, str], named: str
) -> None:
    """After another platform was accepted, no name of the first one counts. Even the run's first node is refused."""
    agree_on_identity(store, config(), DATA, first)
    cpu = EXACT_PLATFORM | {"vendor": "AuthenticAMD", "probe": "2a"}
    with pytest.raises(ConfigError, match=named):
        agree_on_identity(store, config(), DATA, cpu)
    agree_on_identity(store, config(), DATA, cpu, None)
    agree_on_identity(store, config(), DATA, cpu, cpu)
    with pytest.raises(
        ConfigError, match=r"vendor = 'GenuineIntel': the run at .* has 'AuthenticAMD'"
    ):
        agree_on_identity(store, config(), DATA, first, cpu)


def test_settings_that_do_not_affect_the_bits_may_differ(store: Store) -> None:
    """Nodes may have their own telemetry, elastic and checkpoint sections."""
    agree_on_identity(store, config(), DATA, PLATFORM)
    other = config("telemetry.metrics_port=9400", "elastic.nodes_min=2", "checkpoint.keep=9")
    agree_on_identity(store, other, DATA, PLATFORM)
    assert fingerprint(other, DATA, PLATFORM) == fingerprint(config(), DATA, PLATFORM)


def test_nodes_with_other_links_are_refused(store: Store) -> None:
    """Nodes with and without TLS would never meet. A run of a version without the key has the default."""
    agree_on_identity(store, config("elastic.tls=false"), DATA, PLATFORM)
    agree_on_identity(store, config("elastic.tls=false"), DATA, PLATFORM)
    with pytest.raises(ConfigError, match=r"elastic\.tls = true: the run at .* has false"):
        agree_on_identity(store, config(), DATA, PLATFORM)
    recorded = store.read(CONFIG_KEY).decode()
    store.write(CONFIG_KEY, recorded.replace("tls = false\n", "").encode())
    agree_on_identity(store, config(), DATA, PLATFORM)


def test_native_runs_do_not_compare_the_platform(store: Store) -> None:
    """Without exact numerics there are no bits to keep, so torch and processor may differ."""
    native = config("train.numerics='native'")
    agree_on_identity(store, native, DATA, PLATFORM)
    agree_on_identity(store, native, DATA, {"torch": "2.10", "processor": "cuda"})


def test_run_directory_has_the_configuration_to_join(store: Store) -> None:
    """The run directory has the first node's configuration, without what its telemetry section has for that node alone."""
    started = config("train.steps=7", "telemetry.metrics_port=9400")
    agree_on_identity(store, started, DATA, PLATFORM)
    joined = read_run_config(store, [])
    assert joined.train.steps == 7
    assert joined.telemetry == config().telemetry


def test_node_that_joins_by_url_has_the_price_of_the_run(store: Store) -> None:
    """Price and peak belong to the type of machine. A machine of another type sets its own."""
    machine = ("telemetry.price_per_hour=3.5", "telemetry.peak_flops=1e12")
    agree_on_identity(store, config(*machine), DATA, PLATFORM)
    joined = read_run_config(store, [])
    assert joined.telemetry == config(*machine).telemetry
    other = read_run_config(store, ["telemetry.price_per_hour=1.25"])
    assert other.telemetry.price_per_hour == 1.25


def test_refused_node_publishes_no_configuration(store: Store) -> None:
    """The configuration of a node that was refused never becomes the run's."""
    agree_on_identity(store, config(), DATA, PLATFORM)
    store.delete(CONFIG_KEY)
    with pytest.raises(ConfigError, match="seed"):
        agree_on_identity(store, config("run.seed=3"), DATA, PLATFORM)
    assert store.size(CONFIG_KEY) is None


def test_first_node_records_what_decides_the_bits(store: Store) -> None:
    """`identity.json` has every value by name, so that a refusal can name it."""
    agree_on_identity(store, config("run.seed=3"), DATA, PLATFORM)
    identity = json.loads(store.read(IDENTITY_KEY))
    assert identity["run.seed"] == 3
    assert identity["torch"] == PLATFORM["torch"]
    assert identity["data.url (fingerprint)"] == DATA.fingerprint


def test_a_run_keeps_its_data_order(store: Store) -> None:
    """A new run records order version 2. A run whose identity has none was begun with version 1, and goes on with it."""
    assert agree_on_identity(store, config(), DATA, PLATFORM) == 2
    identity = json.loads(store.read(IDENTITY_KEY))
    assert identity.pop("data.order") == 2
    store.write(IDENTITY_KEY, json.dumps(identity).encode())
    assert agree_on_identity(store, config(), DATA, PLATFORM) == 1


def test_an_unknown_data_order_is_refused(store: Store) -> None:
    """A node that cannot read in the order of the run does not take part."""
    agree_on_identity(store, config(), DATA, PLATFORM)
    identity = json.loads(store.read(IDENTITY_KEY)) | {"data.order": 3}
    store.write(IDENTITY_KEY, json.dumps(identity).encode())
    with pytest.raises(ConfigError, match=r"data\.order = 3: recorded by the run at .*; expected"):
        agree_on_identity(store, config(), DATA, PLATFORM)


def test_another_shuffle_window_is_refused(store: Store) -> None:
    """The window decides the order of rows. Its default leaves the identity of older runs as it is."""
    agree_on_identity(store, config(), DATA, PLATFORM)
    assert "data.shuffle_window_tokens" not in json.loads(store.read(IDENTITY_KEY))
    with pytest.raises(ConfigError, match=r"data\.shuffle_window_tokens = 4096: .* has 1073741824"):
        agree_on_identity(store, config("data.shuffle_window_tokens=4096"), DATA, PLATFORM)


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    """The fields in which two fingerprints differ; both must have the same fields."""
    assert one.keys() == other.keys()
    return {name for name in one if one[name] != other[name]}


@pytest.mark.parametrize(
    ("overrides", "data", "platform", "fields"),
    [
        ((), {}, {"torch": "2.14.0"}, {"torch"}),
        (("train.numerics='native'",), {}, {"torch": "2.14.0"}, {"torch"}),
        (("train.numerics='native'",), {}, {"processor": "cuda"}, {"processor"}),
        (("run.seed=3",), {}, {}, {"config"}),
        (("train.learning_rate=0.5",), {}, {}, {"config"}),
        (("train.compute_dtype='bfloat16'",), {}, {}, {"train.compute_dtype", "config"}),
        ((), {"vocab_size": 301}, {}, {"data", "config"}),
        (("elastic.takeover_s=9", "telemetry.metrics_port=9400"), {}, {}, set()),
    ],
)
def test_fingerprint_shows_which_field_differs(
    overrides: tuple[str, ...],
    data: dict[str, object],
    platform: dict[str, str],
    fields: set[str],
) -> None:
    """Each value that nodes of one world must share changes its own field, and no other value changes a field."""
    numerics = [each for each in overrides if each.startswith("train.numerics")]
    mine = fingerprint(config(*numerics), DATA, PLATFORM)
    other = fingerprint(
        config(*overrides),
        dataclasses.replace(DATA, **data),
        PLATFORM | platform,  # type: ignore[arg-type]
    )
    assert differing(mine, other) == fields


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of this project's source, which the fingerprint reads instead."""
    copy = tmp_path / "elastic_pt"
    source = Path(elastic_pt.__file__).parent
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(elastic_pt, "__file__", str(copy / "__init__.py"))
    return copy


def test_changed_source_file_changes_only_the_code_field(package: Path) -> None:
    """A changed byte, a new file or a renamed file changes `code`. A file that is not source does not."""
    mine = fingerprint(config(), DATA, PLATFORM)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "agent.cpython-311.pyc").write_bytes(b"compiled")
    assert fingerprint(config(), DATA, PLATFORM) == mine
    seen = {mine["code"]}
    membership = package / "membership" / "decision" / "decide.py"
    for change in (
        lambda: membership.write_bytes(membership.read_bytes() + b"\n"),
        lambda: (package / "membership" / "news.py").write_text(""),
        # The order of the files stays the same: the name itself counts.
        lambda: membership.rename(membership.with_name("membership_.py")),
    ):
        change()
        other = fingerprint(config(), DATA, PLATFORM)
        assert differing(mine, other) == {"code"}
        seen.add(other["code"])
    assert len(seen) == 4


def test_code_does_not_depend_on_the_install_path(package: Path) -> None:
    """The same source in another directory gives the same `code`."""
    here = fingerprint(config(), DATA, PLATFORM)["code"]
    moved = package.rename(package.with_name("installed_elsewhere"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elastic_pt, "__file__", str(moved / "__init__.py"))
        assert fingerprint(config(), DATA, PLATFORM)["code"] == here


def test_evaluations_may_change_but_not_differ(store: Store) -> None:
    """Evaluations are no part of the identity, so a later start may have others. A node that joins with others is refused, and
    the message names the key: forward passes are collective."""
    agree_on_identity(store, config("evaluation.every_steps=10"), DATA, PLATFORM)
    agree_on_identity(store, config("evaluation.rows=7"), DATA, PLATFORM)
    assert config("evaluation.every_steps=10").fingerprint() == config().fingerprint()
    here = fingerprint(config("evaluation.every_steps=10"), DATA, PLATFORM)
    for override, named in (
        ("evaluation.every_steps=20", "evaluation.every_steps = '20', where the run has '10'"),
        ("evaluation.rows=7", "evaluation."),
    ):
        there = fingerprint(config(override), DATA, PLATFORM)
        assert named in difference(here, there)
    assert not difference(here, fingerprint(config("evaluation.every_steps=10"), DATA, PLATFORM))
