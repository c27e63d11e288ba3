"""This version reads, joins and completes a run of an earlier version, with the same bits."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_pt import config as config_module
from elastic_pt.config import parse_config
from elastic_pt.errors import ConfigError
from elastic_pt.runlog.identity import agree_on_identity, read_run_config
from elastic_pt.store.open import open_store
from elastic_pt.train.probe import names_of

STORED = Path(__file__).parent / "stored_run" / "0.1"
DIGEST_AT_20 = "step=20 sha256="
DIGEST_AT_END = "ce5f1352e209643dc7e9e240a6d4e031dd6d7653abe4a77974f21c3176344b54"
DEFAULT_FINGERPRINT = "4c34c72b88f336b22d0f656f820705ad9592e1bc01822c88e00d3b338cb6cf00"
WAIT_S = 120.0


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A copy of the stored run, changed to this machine's processor and version of torch."""
    shutil.copytree(STORED / "run", tmp_path / "run")
    shutil.copytree(STORED / "data", tmp_path / "data")
    path = tmp_path / "run" / "identity.json"
    identity = json.loads(path.read_text())
    config = parse_config((STORED / "run" / "config.toml").read_text(), source="x")
    here = names_of(config.train, torch.device("cpu"))
    identity |= {name: here[name] for name in ("torch", "processor")}
    path.write_text(json.dumps(identity, indent=1, sort_keys=True))
    return tmp_path


def elastic_pt(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run one command in a separate process."""
    return subprocess.run(
        [sys.executable, "-m", "elastic_pt", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


def test_a_stored_run_is_read(stored: Path) -> None:
    """State, records, checkpoints and digest of an earlier version's run can be read."""
    url = stored / "run"
    status = json.loads(elastic_pt("status", url, "--json").stdout)
    assert (status["state"], status["step"], status["commit"]["step"]) == ("down", 20, 20)
    assert [
        json.loads(line)["kind"] for line in elastic_pt("log", url, "--json").stdout.splitlines()
    ]
    verified = elastic_pt("checkpoints", url, "--verify")
    assert verified.returncode == 0, verified.stderr
    assert elastic_pt("digest", url).stdout.startswith(DIGEST_AT_20)


def test_a_stored_run_is_completed_to_the_same_bits(stored: Path) -> None:
    """A node of this version joins by the URL alone and reaches the digest of the earlier version."""
    url = stored / "run"
    data = ["--set", f"data.url={stored / 'data'}"]
    joined = elastic_pt("run", url, "--node", "second", "--address", "127.0.0.1", *data)
    assert joined.returncode == 0, joined.stderr
    digest = elastic_pt("digest", url).stdout
    assert digest.startswith("step=60 sha256=")
    made_on, here = (
        json.loads((each / "run" / "identity.json").read_text()) for each in (STORED, stored)
    )
    # Another kind of processor or another torch may round differently; the run itself must still complete.
    if (made_on["processor"], made_on["torch"]) == (here["processor"], here["torch"]):
        assert digest == f"step=60 sha256={DIGEST_AT_END}\n"


def test_the_fingerprint_of_an_unchanged_configuration_stays(stored: Path) -> None:
    """Checkpoints of earlier versions have a fingerprint. New keys at their defaults do not change it."""
    default = parse_config('[run]\nurl = "r"\n[data]\nurl = "d"\n', source="x")
    assert default.fingerprint() == DEFAULT_FINGERPRINT
    config = read_run_config(open_store(str(stored / "run")), [])
    (part, *_) = sorted((stored / "run").glob("ckpt/*/part-00000.json"))
    assert config.fingerprint() == json.loads(part.read_text())["state"]["config_fingerprint"]


def test_another_platform_joins_after_reopen_platform(stored: Path) -> None:
    """A run refuses another platform by name until `reopen --platform`."""
    url = stored / "run"
    path = url / "identity.json"
    identity = json.loads(path.read_text())
    path.write_text(json.dumps(identity | {"processor": "extinct"}))
    arguments = ("run", url, "--address", "127.0.0.1", "--set", f"data.url={stored / 'data'}")
    refused = elastic_pt(*arguments)
    assert refused.returncode == 2
    assert "processor = " in refused.stderr
    assert "extinct" in refused.stderr
    reopened = elastic_pt("reopen", url, "--platform", "--why", "none of these are left")
    assert reopened.returncode == 0, reopened.stderr
    assert reopened.stdout.startswith("reopened at step 20")
    (exact,) = elastic_pt("digest", url).stdout.splitlines()
    assert exact.startswith(DIGEST_AT_20)
    joined = elastic_pt(*arguments)
    assert joined.returncode == 0, joined.stderr
    records = [json.loads(line) for line in elastic_pt("log", url, "--json").stdout.splitlines()]
    newest = [each["body"] for each in records if each["kind"] == "GENERATION"][-1]
    assert newest["platform"]["processor"] == identity["processor"]
    (lifted,) = [each["body"] for each in records if each["kind"] == "REOPEN"]
    assert (lifted["step"], lifted["why"]) == (20, "none of these are left")
    first, second = elastic_pt("digest", url).stdout.splitlines()
    assert first.startswith("step=60 sha256=")
    here = identity["processor"]
    assert second == (
        "exact up to step 20; from step 20 on another platform: "
        f"processor = {here!r} after 'extinct' (reopened: none of these are left)"
    )


def test_a_node_that_computes_other_bits_is_refused(stored: Path) -> None:
    """I9: If all names agree but the probe differs, the node is refused, and the error says so."""
    url = stored / "run"
    path = url / "identity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"probe": "0" * 64}))
    arguments = ("run", url, "--address", "127.0.0.1", "--set", f"data.url={stored / 'data'}")
    refused = elastic_pt(*arguments)
    assert refused.returncode == 2, refused.stderr
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: probe = ")
    assert "the same small training step gives other bits on this node" in line


def test_missing_key_of_an_older_run_means_its_first_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is older than a key can be joined only with that key's first default."""
    store = open_store(str(tmp_path))
    text = '[run]\nurl = "r"\n[data]\nurl = "d"\n'
    data: Any = type("Data", (), {"fingerprint": "f", "tokenizer_sha256": "t"})()
    platform = {"torch": "2", "processor": "p"}
    old = parse_config(text, source="x")
    # As if z_loss did not exist when the run began.
    monkeypatch.setattr(config_module, "INTRODUCED", {"train.z_loss": 0.0})
    monkeypatch.setattr("elastic_pt.runlog.identity.INTRODUCED", {"train.z_loss": 0.0})
    agree_on_identity(store, old, data, platform)
    assert "train.z_loss" not in json.loads(store.read("identity.json"))
    agree_on_identity(store, old, data, platform)
    new = parse_config(text, source="x", overrides=["train.z_loss=0.5"])
    assert new.fingerprint() != old.fingerprint()
    with pytest.raises(ConfigError, match=r"train\.z_loss = 0\.5: the run at .* has 0\.0"):
        agree_on_identity(store, new, data, platform)
