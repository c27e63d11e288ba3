"""The command `data`: overview, rows, steps, search and verification, of runs and of prepared data."""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from command_line import STEPS, Trained, assert_one_line_mistake, elastic_pt

from elastic_pt.cli import data as command
from elastic_pt.cli import data_text
from elastic_pt.data import readings
from elastic_pt.data.prepare import prepare
from elastic_pt.data.sources import SourceSpec
from elastic_pt.data.stored import Damage, StoredTokens, StreamPart, Verified
from elastic_pt.errors import StoreError
from elastic_pt.report import reads, search
from elastic_pt.report.rows import Piece, ShownRow
from elastic_pt.runlog.ignored import DamagedSpan, IgnoredSpan
from elastic_pt.runlog.log import RunLog
from elastic_pt.store.open import open_store

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "stored_run" / "0.1"
PLAN = ("--set", "data.sequence_length=16", "--set", "train.global_batch=8")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources; one document is longer than a row, and one has a word that no other has."""
    root = tmp_path_factory.mktemp("corpus")
    for name, count in (("large", 30), ("small", 6)):
        (root / name).mkdir()
        for number in range(count):
            rng = random.Random(f"{name} {number}")
            words = " ".join("".join(rng.choices("abcde", k=4)) for _ in range(40))
            (root / name / f"{number:02}.txt").write_text(words)
    (root / "small" / "03-needle.txt").write_text("a needle in " + "very much hay " * 20)
    options = ("--out", root / "data", "--vocab-size", 280, "--held-out", 0.1)
    sources = [f"large={root / 'large'}@0.75", f"small={root / 'small'}@0.25"]
    assert elastic_pt("prepare", *sources, *options).exit_code == 0
    return root


def data_of(*arguments: object) -> Any:
    """The JSON of one call that succeeds."""
    result = elastic_pt("data", *arguments, "--json")
    assert (result.exit_code, result.err) == (0, "")
    return result.json


def test_overview_tells_epochs_and_realised_mixture(corpus: Path) -> None:
    """Rows that are read follow the weights, and epochs are these rows over the rows of the source."""
    found = data_of(corpus / "data", *PLAN, "--until", 100)
    assert (found["run_url"], found["step"], found["until"], found["order_version"]) == (
        None,
        0,
        100,
        2,
    )
    read = [source["read"][-1] for source in found["sources"]]
    assert [each["step"] for each in read] == [100, 100]
    assert sum(each["rows"] for each in read) == 800
    for source, each in zip(found["sources"], read, strict=True):
        assert abs(each["share"] - source["weight"]) < 0.01
        assert each["epochs"] == each["rows"] / source["rows"]
        assert source["rows"] == (source["tokens"] - 1) // 16
        assert source["read"][0] == {"step": 0, "rows": 0, "share": None, "epochs": 0}
    text = elastic_pt("data", corpus / "data", *PLAN, "--until", 100).out
    assert found["open_tokens"] == 16 * sum(source["rows"] for source in found["sources"])
    assert f"{found['open_tokens']:,} tokens are read together" in text
    assert "large: weight 0.75; " in text
    assert f"up to step 100: {read[0]['rows']} rows read (0.75 of all)" in text


def test_plan_of_a_run_is_the_one_that_it_recorded(trained: Trained) -> None:
    """Of a run, the plan, the present step and the last one are its own; its configuration file gives the same answer."""
    found = data_of(trained.run)
    assert found["run_url"] == f"file://{trained.run}"
    assert (found["step"], found["until"], found["order_version"]) == (STEPS, STEPS, 2)
    (read,) = found["sources"][0]["read"]
    assert (read["step"], read["rows"]) == (STEPS, 4 * STEPS)
    assert data_of(trained.config) == found
    assert_one_line_mistake(
        elastic_pt("data", trained.config, "--set", "data.sequence_length=8"), "is a run"
    )
    before = data_of(trained.config, "--set", "run.url=/nowhere")
    assert (before["run_url"], before["step"]) == (None, 0)
    assert before["sources"][0]["read"][-1] == read
    assert data_of(trained.run, "--until", 7)["sources"][0]["read"][1]["rows"] == 28


def test_what_a_run_leaves_out_is_told(trained: Trained, tmp_path: Path) -> None:
    """The overview names each damaged span with its rows and its first step, and `status` counts them."""
    run = shutil.copytree(trained.run, tmp_path / "run")
    log = RunLog(open_store(f"file://{run}"), writer="test")
    generation = log.refresh().generation
    assert generation is not None
    name = data_of(trained.run)["sources"][0]["name"]
    length = data_of(trained.run)["sequence_length"]
    span = DamagedSpan(name, (2 * length, 4 * length), "shards/a.bin")
    for path in (run / "log").iterdir():
        if json.loads(path.read_text())["kind"] == "STOP":
            path.unlink()
    following = replace(
        generation, number=generation.number + 1, ignored=(IgnoredSpan(span, 8),), memory=None
    )
    log = RunLog(open_store(f"file://{run}"), writer="test")
    log.append(lambda _: following, generation=generation.number)
    (told,) = data_of(run)["ignored"]
    assert told == {
        "source": name,
        "tokens": [2 * length, 4 * length],
        "file": "shards/a.bin",
        "rows": [1, 3],
        "first_step": 8,
    }
    line = f"left out     {name} tokens {2 * length} to {4 * length - 1} from step 8 on: damaged in shards/a.bin; "
    assert f"{line}in rows {name}:1 to {name}:3" in elastic_pt("data", run).out
    assert elastic_pt("status", run, "--json").json["ignored_spans"] == 1
    assert "data        damaged spans left out: 1" in elastic_pt("status", run).out
    assert data_of(trained.run)["ignored"] == []


def test_run_of_order_version_1_on_data_of_schema_1(tmp_path: Path) -> None:
    """A run of an earlier version is told with its own order, from data that was moved."""
    moved = ("--data", STORED / "data")
    found = data_of(STORED / "run", *moved)
    assert (found["schema"], found["order_version"], found["step"]) == (1, 1, 20)
    step = data_of(STORED / "run", *moved, "--step", 20)
    assert [row["slot"] for row in step["rows"]] == [0, 1, 2, 3]
    row = step["rows"][2]
    name = f"{row['source']}:{row['row']}"
    shown = data_of(STORED / "run", *moved, "--show", name)
    text = "".join(piece["text"] for piece in shown["pieces"])
    begin = text.partition("<|endoftext|>")[0]
    assert row["documents"][0]["text"].startswith(" ".join(begin.split()))
    (where,) = data_of(STORED / "run", *moved, "--where", begin)["documents"]
    assert where["rows"][0] <= row["row"] <= where["rows"][1]
    assert {"row": row["row"], "epoch": 0, "step": 20, "slot": 2} in where["readings"]
    assert data_of(STORED / "run", *moved, "--verify")["problems"] == []
    assert_one_line_mistake(elastic_pt("data", STORED / "run"), "/tmp/stored/data")


def test_search_by_text_and_by_hash_agree(corpus: Path) -> None:
    """A document is found by a piece of its text, and by the hash of all of it; the rows that have it are all listed."""
    text = (corpus / "small" / "03-needle.txt").read_text()
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    by_text = data_of(corpus / "data", *PLAN, "--until", 60, "--where", "needle in very")
    by_hash = data_of(corpus / "data", *PLAN, "--until", 60, "--where", sha256)
    (found,) = by_text["documents"]
    assert [found] == by_hash["documents"]
    assert by_text["complete"]
    assert by_text["read_bytes"] == data_of(corpus / "data", "--verify")["bytes"]
    assert (found["source"], found["split"], found["sha256"]) == ("small", "train", sha256)
    first, last = found["rows"]
    assert last > first
    shown = [
        data_of(corpus / "data", *PLAN, "--show", f"small:{row}") for row in range(first, last + 1)
    ]
    # Neighbours share a token.
    pieces = shown[0]["pieces"] + [piece for row in shown[1:] for piece in row["pieces"][1:]]
    assert text in "".join(piece["text"] for piece in pieces)


def test_readings_are_what_the_steps_read(corpus: Path) -> None:
    """From document to steps and from step to documents: both ways lead to the same rows."""
    (found,) = data_of(corpus / "data", *PLAN, "--until", 12, "--where", "needle")["documents"]
    readings = found["readings"]
    assert readings
    assert len(readings) == found["read_until"]
    first, last = found["rows"]
    read = []
    for step in range(1, 13):
        rows = data_of(corpus / "data", *PLAN, "--step", step)["rows"]
        assert len(rows) == 8
        read += [
            (step, row["slot"], row["row"])
            for row in rows
            if row["source"] == "small" and first <= row["row"] <= last
        ]
    assert sorted((each["step"], each["slot"], each["row"]) for each in readings) == sorted(read)


def test_past_and_coming_readings_are_told_apart(trained: Trained) -> None:
    """People see what was read up to the run's present step, and what a longer run would read."""
    text = elastic_pt("data", trained.run, "--show", "corpus:5").out
    piece = text.splitlines()[-1].replace("│", "")[1:12]
    out = elastic_pt("data", trained.run, "--where", piece, "--until", 10 * STEPS).out
    assert re.search(r"row \d+ was read at step \d+, slot \d, epoch \d", out)
    assert re.search(r"row \d+ will be read at step [\d,]+, slot \d, epoch \d", out)
    assert "times more; --json lists more of them" in out
    assert re.search(r"read and decoded [\d,]+ of [\d,]+ bytes of tokens in \d+\.\d s", out)


def test_first_reading_is_told_however_often_a_document_was_read(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who takes a document out needs the first step that read it; a run far on needs also its last and next readings."""
    read_status = reads.read_status
    monkeypatch.setattr(
        reads, "read_status", lambda run: replace(read_status(run), step=300 * STEPS)
    )
    monkeypatch.setattr(readings, "READINGS_MAX", 20)
    text = elastic_pt("data", trained.run, "--show", "corpus:5").out
    piece = text.splitlines()[-1].replace("│", "")[1:12]
    more = ("--where", piece, "--until", 600 * STEPS)
    found = data_of(trained.run, *more)["documents"][0]
    steps = [each["step"] for each in found["readings"]]
    early = data_of(trained.run, "--where", piece, "--until", 50 * STEPS)["documents"][0]
    assert steps[0] == early["readings"][0]["step"]
    assert len(steps) == 41 < found["read"]
    assert steps == sorted(steps)
    assert steps[20] <= 300 * STEPS < steps[21]
    out = elastic_pt("data", trained.run, *more).out
    assert re.search(rf"first: row \d+ was read at step {steps[0]:,},", out)
    assert re.search(rf"past: row \d+ was read at step {steps[20]:,},", out)
    assert re.search(rf"next: row \d+ will be read at step {steps[21]:,},", out)


def test_held_out_document_is_found_and_never_read(corpus: Path) -> None:
    """A document that was held out is in no row."""
    found = [
        each
        for path in sorted((corpus / "large").iterdir())
        for each in data_of(corpus / "data", *PLAN, "--where", path.read_text())["documents"]
    ]
    assert len(found) == 30
    held_out = [each for each in found if each["split"] == "held_out"]
    assert held_out
    for each in held_out:
        assert (each["rows"], each["read_until"], each["readings"]) == (None, 0, [])
    out = elastic_pt("data", corpus / "data", *PLAN, "--where", held_out[0]["sha256"]).out
    assert "held out: no step trains on it" in out


def test_search_ends_after_many_documents_and_says_so(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A common text gives no endless list."""
    monkeypatch.setattr(search, "DOCUMENTS_MAX", 2)
    found = data_of(corpus / "data", *PLAN, "--where", "a")
    assert (len(found["documents"]), found["complete"]) == (2, False)
    assert (
        "2 documents; there are more"
        in elastic_pt("data", corpus / "data", *PLAN, "--where", "a").out
    )
    monkeypatch.setattr(search, "DOCUMENTS_MAX", 1)
    assert data_of(corpus / "data", *PLAN, "--where", "needle")["complete"]


def test_verify_names_each_damaged_block_and_ends_with_4(corpus: Path, tmp_path: Path) -> None:
    """As `checkpoints --verify`: 0 if every byte is right, 4 and a line per block if not."""
    result = elastic_pt("data", corpus / "data", *PLAN, "--verify")
    assert (result.exit_code, result.err) == (0, "")
    assert result.out.startswith("verified: compared ")
    shutil.copytree(corpus / "data", tmp_path / "data")
    (shard,) = (tmp_path / "data" / "shards" / "large").glob("train-*.bin")
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    result = elastic_pt("data", tmp_path / "data", *PLAN, "--verify")
    assert result.exit_code == 4
    key = shard.relative_to(tmp_path / "data")
    assert re.match(rf"{key}: block 0: corrupt, .*; in rows large:0 to large:\d+\n", result.out)
    result = elastic_pt("data", tmp_path / "data", *PLAN, "--verify", "--json")
    (problem,) = result.json["problems"]
    assert (result.exit_code, problem["file"], problem["block"]) == (4, str(key), 0)
    for option in (("--show", "large:3"), ("--step", 1)):
        assert_one_line_mistake(
            elastic_pt("data", tmp_path / "data", *PLAN, *option), f"{key}: block 0"
        )


def test_neighbouring_damaged_blocks_are_one_problem(corpus: Path, tmp_path: Path) -> None:
    """A damaged shard is one line, not one per block; blocks with an intact one between them are two."""
    store = open_store(str(tmp_path / "data"))
    prepare([SourceSpec("x", (str(corpus / "large"),))], store, vocab_size=280, block_tokens=64)
    (shard,) = (tmp_path / "data" / "shards" / "x").glob("train-*.bin")
    data = bytearray(shard.read_bytes())
    for block in (2, 3, 4, 6):
        data[128 * block] ^= 1
    shard.write_bytes(data)
    problems = elastic_pt("data", tmp_path / "data", *PLAN, "--verify", "--json").json["problems"]
    found = [(each["block"], each["blocks"], each["tokens"]) for each in problems]
    assert found == [(2, 3, [2 * 64, 5 * 64]), (6, 1, [6 * 64, 7 * 64])]
    out = elastic_pt("data", tmp_path / "data", *PLAN, "--verify").out
    assert ": blocks 2 to 4: corrupt, tokens 128 to 319 have" in out
    assert "2 problems: compared" in out


def test_search_goes_on_after_damage_and_names_it(corpus: Path, tmp_path: Path) -> None:
    """What was found is told in spite of a damaged block; the answer is then incomplete, and the code is 4."""
    shutil.copytree(corpus / "data", tmp_path / "data")
    (shard,) = (tmp_path / "data" / "shards" / "large").glob("train-*.bin")
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    result = elastic_pt("data", tmp_path / "data", *PLAN, "--where", "needle", "--json")
    (found,), (damage,) = result.json["documents"], result.json["unsearched"]
    assert (result.exit_code, result.json["complete"], found["source"]) == (4, False, "small")
    assert (damage["block"], damage["tokens"][0]) == (0, 0)
    result = elastic_pt("data", tmp_path / "data", *PLAN, "--where", "needle")
    assert result.exit_code == 4
    assert re.search(r"not searched: .*: block 0: corrupt.* in rows large:0 to", result.out)
    assert "small document" in result.out
    assert "1 document; damaged parts not searched: 1; read" in result.out


@pytest.mark.parametrize("error", [StoreError("away"), KeyboardInterrupt()])
def test_what_was_found_before_an_outage_is_told(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A search of hours that an outage or Ctrl-C ends has told what it found, and says that it is not all."""
    whole = StoredTokens.streams

    def streams(self: StoredTokens) -> Iterator[StreamPart]:
        yield from takewhile(lambda each: each[:2] != (1, "held_out"), whole(self))
        raise error

    def verify(self: StoredTokens) -> Iterator[Verified]:
        yield Verified(7, (Damage("some-file", "corrupt"),))
        raise error

    monkeypatch.setattr(StoredTokens, "streams", streams)
    monkeypatch.setattr(StoredTokens, "verify", verify)
    code = 3 if isinstance(error, StoreError) else 130
    result = elastic_pt("data", corpus / "data", *PLAN, "--where", "needle", "--json")
    assert (result.exit_code, result.err) == (code, "error: away\n" if code == 3 else "")
    assert result.json["complete"] is False
    assert result.json["read_bytes"] > 0
    assert [each["source"] for each in result.json["documents"]] == ["small"]
    text = elastic_pt("data", corpus / "data", *PLAN, "--where", "needle")
    assert text.exit_code == code
    assert "needle" in text.out
    assert re.search(r"^1 document; .* [\d,]+ of [\d,]+ bytes", text.out, re.MULTILINE)
    result = elastic_pt(
        "data", corpus / "data", "--set", "data.sequence_length=16", "--verify", "--json"
    )
    assert (result.exit_code, result.json["complete"]) == (code, False)
    assert (result.json["compared_bytes"], len(result.json["problems"])) == (7, 1)


def test_text_cannot_steer_the_terminal() -> None:
    """A document may have any characters; the terminal gets none that it would obey."""
    assert data_text.printable("a\x1b[2J\r\u202eé\nb") == "a\\x1b[2J\\r\\u202eé\nb"


def test_borders_of_tokens_stay_apart_from_their_texts() -> None:
    """A mark would be drawn on the border, and a token of a joiner alone would not be seen; an emoji stays one."""
    texts = ("e", "\u0301", "\u200d", "👩\u200d🔬", "")
    row = ShownRow("a", 0, (0, 5), (), tuple(Piece([1], each) for each in texts))
    assert data_text.row_lines(row)[-1] == "│e│◌\u0301│\\u200d│👩\u200d🔬││"


def test_mistakes_are_one_line(corpus: Path, trained: Trained, tmp_path: Path) -> None:
    """Each wrong argument is named with its value and what is expected."""
    data = corpus / "data"
    for arguments, told in [
        ((tmp_path,), ["neither prepared data", "expected one of them"]),
        ((data, "--show", "x", "--step", 3), ["--show --step: expected one of them"]),
        ((data, "--where", ""), ["--where ''"]),
        ((data, *PLAN, "--show", "huge:1"), ["--show huge:1", "a source of large, small"]),
        ((data, *PLAN, "--show", "small:-1"), ["--show small:-1"]),
        ((data, *PLAN, "--show", "small:9999"), ["small:9999", "expected a row from 0 to"]),
        ((data, "--step", 0), ["--step 0"]),
        ((data, *PLAN, "--step", 1001), ["--step 1001", "the last step is 1000"]),
        ((data, *PLAN, "--until", 10**30), ["--until", "1000000000"]),
        ((data, "--set", "data.url=/other"), ["--set data.url=file:///other", "is prepared data"]),
        ((data, "--data", data), ["is prepared data", "--data"]),
        ((data, "--set", "data.sequence_length=100000"), ["source large", "data.sequence_length"]),
        ((trained.run, "--set", "train.steps=3"), ["--set train.steps=3", "is a run"]),
        ((trained.run, "--data", data), ["fingerprint", "the data that it was started with"]),
    ]:
        assert_one_line_mistake(elastic_pt("data", *arguments), *told)


def test_last_step_that_can_be_asked_for_has_an_answer(corpus: Path) -> None:
    """No step within the limits is too large for the arithmetic of a plan."""
    plan = ("--set", "data.sequence_length=16", "--set", "train.global_batch=65536")
    far = ("--until", command.STEPS_MAX)
    found = data_of(corpus / "data", *plan, *far)
    assert sum(each["read"][-1]["rows"] for each in found["sources"]) == 65536 * command.STEPS_MAX
    (where,) = data_of(corpus / "data", *PLAN, *far, "--where", "needle")["documents"]
    assert where["read_until"] > 10**8
    assert len(data_of(corpus / "data", *PLAN, *far, "--step", command.STEPS_MAX)["rows"]) == 8


def test_directory_may_have_any_name(corpus: Path, tmp_path: Path) -> None:
    """A path is a value, no piece of TOML."""
    for name in ("📚", 'a "b" #c'):
        shutil.copytree(corpus / "data", tmp_path / name)
        assert data_of(tmp_path / name, *PLAN)["step"] == 0


def test_json_keys_of_the_options_are_documented(corpus: Path) -> None:
    """The table of `data` in docs/operations.md names every key of each option, and no other."""
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page.partition("<!-- data json: begin -->\n")[2].partition("<!-- data json: end -->")[0]
    heading, _, *rows = table.splitlines()
    common = set(re.findall(r"`(\w+)`", heading))
    arguments = {"--show": ["small:1"], "--step": [3], "--where": ["needle"], "--verify": []}
    assert len(rows) == len(arguments)
    for row in rows:
        option, keys = re.findall(r"^\| `(--\w+)` \| (.*) \|$", row)[0]
        found = data_of(corpus / "data", *PLAN, option, *arguments[option])
        used = set(re.findall(r'"(\w+)":', json.dumps(found)))
        named = set(re.findall(r"`(\w+)`", keys)) | common
        # Without a problem, its keys are not used.
        assert used == named if option != "--verify" else used < named
