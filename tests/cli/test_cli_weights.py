"""`digest`, `eval`, `generate` and `export`: uses of committed checkpoints."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from command_line import STEPS, Trained, assert_one_line_mistake, elastic_pt

from elastic_pt.config import load_config
from elastic_pt.data.manifest import read_manifest
from elastic_pt.model.export import load_exported
from elastic_pt.report.history import read_steps
from elastic_pt.report.status import open_run
from elastic_pt.store.open import open_store

GREEDY = ("--prompt", "abc", "--max-tokens", 8, "--temperature", 0)


@pytest.fixture(scope="session")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's model, exported."""
    out = tmp_path_factory.mktemp("export") / "model"
    result = elastic_pt("export", trained.run, "--out", out)
    assert result.exit_code == 0, result
    return out


def test_digest_prints_one_exact_line(trained: Trained) -> None:
    """Scripts parse `step=N sha256=…`; each step has its own digest, and the newest is the default."""
    newest = elastic_pt("digest", trained.run)
    assert newest.exit_code == 0
    assert newest.err == ""
    assert re.fullmatch(rf"step={STEPS} sha256=[0-9a-f]{{64}}\n", newest.out)
    assert elastic_pt("digest", trained.run, "--step", STEPS).out == newest.out
    before = trained.kept[1]
    earlier = elastic_pt("digest", trained.run, "--step", before).out
    assert earlier.startswith(f"step={before} ")
    assert earlier.split("sha256=")[1] != newest.out.split("sha256=")[1]


def damage(run: Path, kind: str, step: int) -> None:
    """Damage one committed checkpoint."""
    (shard,) = run.glob(f"ckpt/{step:010d}-*/shard-*.safetensors")
    if kind == "missing":
        shard.unlink()
    elif kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif kind == "flipped":
        data = bytearray(shard.read_bytes())
        data[3 * len(data) // 4] ^= 16
        shard.write_bytes(data)
    elif kind == "swapped":
        others = set(run.glob("ckpt/*/shard-*.safetensors")) - {shard}
        shard.write_bytes(others.pop().read_bytes())
    else:
        (manifest,) = run.glob(f"ckpt/{step:010d}-*/manifest.json")
        manifest.write_text(manifest.read_text().replace('"step":', '"Step":', 1))


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped", "swapped", "manifest"])
def test_digest_falls_back_to_an_older_checkpoint(
    kind: str, trained: Trained, tmp_path: Path
) -> None:
    """A damaged newest checkpoint is passed over, with the reason on standard error."""
    copy = tmp_path / "run"
    shutil.copytree(trained.run, copy)
    damage(copy, kind, STEPS)
    result = elastic_pt("digest", copy)
    assert result.exit_code == 0
    before = elastic_pt("digest", trained.run, "--step", trained.kept[1])
    assert result.out == before.out
    assert result.err.startswith(f"passed over step {STEPS}: ")
    assert result.err.count("\n") == 1
    assert_one_line_mistake(
        elastic_pt("digest", copy, "--step", STEPS), f"step {STEPS}", exit_code=4
    )


def test_digest_without_a_usable_checkpoint_fails(trained: Trained, tmp_path: Path) -> None:
    """If every checkpoint is damaged, one line has the reasons and the exit code is 4."""
    copy = tmp_path / "run"
    shutil.copytree(trained.run, copy)
    for step in trained.kept:
        damage(copy, "missing", step)
    assert_one_line_mistake(elastic_pt("digest", copy), "no usable checkpoint", exit_code=4)


def test_digest_of_a_step_that_is_not_kept_names_the_kept_steps(trained: Trained) -> None:
    """The error about a --step without a checkpoint lists the steps that are kept."""
    assert_one_line_mistake(
        elastic_pt("digest", trained.run, "--step", 3), "--step 3", f"{STEPS}, "
    )


def test_exported_weights_equal_the_checkpoint(trained: Trained, exported: Path) -> None:
    """The exported weights are those of the checkpoint, bit for bit, with the run's tokenizer."""
    from elastic_pt.report.artifacts import open_trained
    from elastic_pt.report.status import open_run

    weights = open_trained(open_run(f"file://{trained.run}"), None, None).model().state_dict()
    found = load_exported(exported).state_dict()
    assert weights.keys() == found.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor.cpu(), found[name]), name
    assert (exported / "tokenizer.json").read_bytes() == next(
        trained.data.glob("tokenizer-*.json")
    ).read_bytes()
    assert json.loads((exported / "config.json").read_text())["max_position_embeddings"] == 16
    assert_one_line_mistake(elastic_pt("export", trained.run, "--out", exported), "exists already")


def test_export_to_an_unwritable_directory_is_refused(trained: Trained, tmp_path: Path) -> None:
    """A directory that cannot be created is a user's mistake: one line with --out and the path."""
    (tmp_path / "file").write_text("")
    for out in ("/proc/x", tmp_path / "file" / "model"):
        assert_one_line_mistake(elastic_pt("export", trained.run, "--out", out), f"--out {out}")


def test_generate_gives_equal_text_from_run_and_export(trained: Trained, exported: Path) -> None:
    """The same weights and seed give the same text, from a run or from an export."""
    from_run = elastic_pt("generate", trained.run, *GREEDY)
    assert from_run.exit_code == 0
    assert from_run.out.startswith("abc")
    assert len(from_run.out) > len("abc\n")
    assert elastic_pt("generate", exported, *GREEDY).out == from_run.out
    sampled = [
        elastic_pt("generate", exported, "--prompt", "", "--temperature", 2, "--seed", seed).out
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert_one_line_mistake(
        elastic_pt("generate", exported, *GREEDY, "--step", STEPS), f"--step {STEPS}"
    )


def test_eval_averages_over_every_held_out_token_once(trained: Trained) -> None:
    """Loss, perplexity and bits per byte equal plain cross-entropy over all held-out tokens."""
    result = elastic_pt("eval", trained.run, "--json").json
    data = read_manifest(open_store(str(trained.data)))
    assert (result["step"], result["tokens"]) == (STEPS, data.tokens("held_out"))
    expected = plain_nats(trained)
    assert result["loss"] == pytest.approx(expected / data.tokens("held_out"), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(
        expected / math.log(2) / data.held_out_bytes, rel=1e-5
    )
    assert "bits per byte" in elastic_pt("eval", trained.run, "--step", trained.kept[1]).out


def test_eval_repeats_the_evaluations_of_the_run(trained: Trained) -> None:
    """With the run's rows, `eval` gives the held-out loss that the run has measured at that step, but for the rounding of
    its larger batches. The history has one at each multiple of the cadence and at the last step."""
    run = open_run(str(trained.run))
    history = read_steps(run.store, run.log.records())
    found = {line["step"]: line for line in history if "held_out_loss" in line}
    assert list(found) == [100, 200, STEPS]
    for step in (200, STEPS):
        result = elastic_pt("eval", trained.run, "--rows", 150, "--step", step, "--json").json
        assert result["loss"] == pytest.approx(found[step]["held_out_loss"], rel=1e-6, abs=0.0)
        (rows, loss), *_ = found[step]["held_out_sources"].values()
        assert rows == 150
        assert loss == found[step]["held_out_loss"]
    everything = elastic_pt("eval", trained.run, "--json").json
    assert everything["loss"] != result["loss"]
    assert everything["tokens"] > result["tokens"] == 150 * 16


def test_eval_without_held_out_text_is_refused(
    trained: Trained, texts: Path, tmp_path: Path
) -> None:
    """Data without held-out text is an error, not a perfect score."""
    (tokenizer,) = trained.data.glob("tokenizer-*.json")
    options = ("--tokenizer", tokenizer, "--held-out", 0)
    assert elastic_pt("prepare", texts, "--out", tmp_path / "all", *options).exit_code == 0
    assert_one_line_mistake(
        elastic_pt("eval", trained.run, "--data", tmp_path / "all"), "nothing was held out"
    )


def plain_nats(trained: Trained) -> float:
    """Cross-entropy in nats, summed over the held-out stream, one window at a time, from full logits."""
    from elastic_pt.report.artifacts import open_trained
    from elastic_pt.report.status import open_run

    opened = open_trained(open_run(f"file://{trained.run}"), None, None)
    model = opened.model().cpu()
    length = load_config(trained.config).data.sequence_length
    stream = [
        token
        for shard in sorted(trained.data.glob("shards/*/held-out-*.bin"))
        for token in numpy.fromfile(shard, dtype="<u2").tolist()
    ]
    tokens = torch.tensor([opened.data.end_token_id, *stream])
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(stream), length):
            window = tokens[start : start + length + 1]
            logits = model.logits(model(window[None, :-1])[0])
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return total


def test_data_option_replaces_data_that_has_moved(trained: Trained, tmp_path: Path) -> None:
    """If a run's data has moved, one error line asks for --data, and with --data the command works."""
    copy = tmp_path / "run"
    shutil.copytree(trained.run, copy)
    config = copy / "config.toml"
    config.write_text(config.read_text().replace(f"file://{trained.data}", "file:///gone/away"))
    for command in (
        ("generate", copy, *GREEDY),
        ("eval", copy),
        ("export", copy, "--out", tmp_path / "m"),
    ):
        assert_one_line_mistake(elastic_pt(*command), "data.url", "/gone/away", "--data")
    moved = elastic_pt("generate", copy, *GREEDY, "--data", trained.data)
    assert moved.out == elastic_pt("generate", trained.run, *GREEDY).out
    assert elastic_pt("digest", copy).out == elastic_pt("digest", trained.run).out


def test_data_with_another_tokenizer_is_refused(
    trained: Trained, texts: Path, tmp_path: Path
) -> None:
    """Another tokenizer would turn tokens into other text, so it is refused in one line."""
    other = tmp_path / "other"
    prepared = elastic_pt("prepare", texts, "--out", other, "--vocab-size", 280, "--held-out", 0.2)
    assert prepared.exit_code == 0
    assert_one_line_mistake(
        elastic_pt("generate", trained.run, *GREEDY, "--data", other), "another tokenizer"
    )


@pytest.mark.parametrize(
    "url", ["s3://bucket/model", "s3:/bucket/model", "gs://bucket/model", "file:/x", "s3:"]
)
def test_export_to_a_url_is_refused(
    url: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--out` is a local directory. A URL is refused, and no folder with its name is created."""
    monkeypatch.chdir(tmp_path)
    assert_one_line_mistake(elastic_pt("export", trained.run, "--out", url), "--out", "a URL")
    assert list(tmp_path.iterdir()) == []


def test_export_changes_nothing_beside_its_directory(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory and a path below a file are refused. A directory <out>.partial is not touched."""
    monkeypatch.chdir(tmp_path)
    assert_one_line_mistake(elastic_pt("export", trained.run, "--out", "."), "--out .", "expected")
    (tmp_path / "file").write_text("mine")
    inside = tmp_path / "file" / "model"
    assert_one_line_mistake(elastic_pt("export", trained.run, "--out", inside), "--out", "expected")
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "notes").write_text("mine")
    assert elastic_pt("export", trained.run, "--out", tmp_path / "model").exit_code == 0
    assert (tmp_path / "model.partial" / "notes").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model", "model.partial"]


@pytest.mark.parametrize(
    "url",
    [
        "s3:/bucket/run",
        "S3://bucket/run",
        "file:/run",
        "gs:/b",
        "s3:",
        "s3://",
        "s3:///",
        "file:///",
    ],
)
def test_malformed_url_is_refused_and_makes_no_folder(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A malformed URL is refused by every command and in the configuration. No folder with its name is created."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(f'[run]\nurl = "{url}"\n[data]\nurl = "data"\n')
    for arguments in (
        ("config", "run.toml"),
        ("run", "run.toml"),
        ("status", url),
        ("storage-check", url),
        ("prepare", "run.toml", "--out", url),
    ):
        assert_one_line_mistake(elastic_pt(*arguments), url, "expected")
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
