"""`sync`: each committed step is once in each sink, however often it is called and killed."""

import itertools
import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_server import WandbServer, wandb_server

from elastic_pt.chaos.s3_faults import ACCESS_DENIED
from elastic_pt.chaos.s3_proxy import FaultProxy
from elastic_pt.checkpoint.history import Line, write_history
from elastic_pt.cli import run_command_line
from elastic_pt.errors import ConfigError, LogDamaged
from elastic_pt.report.sinks.feed import Position, Sink
from elastic_pt.report.sinks.jsonl import JsonLines
from elastic_pt.report.sinks.sync import Copy, open_sink
from elastic_pt.report.sinks.tensorboard import TensorBoard
from elastic_pt.report.status import Run
from elastic_pt.runlog.log import RunLog, record_key
from elastic_pt.runlog.records import (
    COMPLETED,
    Body,
    Checkpoint,
    Commit,
    Generation,
    Member,
    Quarantine,
    Reopen,
    Stop,
)
from elastic_pt.store.open import open_store
from elastic_pt.store.port import Store

STEPS = 12
WANDB_TIMEOUT_S = 120.0


class WrittenRun:
    """A run whose log and history a test writes."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.log = RunLog(store, writer="test")
        self.number = 0

    def add(self, body: Body) -> None:
        """Append a record."""
        self.log.append(
            lambda _: body,
            generation=self.number - isinstance(body, Generation),
        )

    def begin(self, nodes: int) -> None:
        """A generation of so many nodes."""
        self.number += 1
        members = tuple(Member(f"n{i}", f"n{i}", "127.0.0.1", 1, 1, 1) for i in range(nodes))
        self.add(
            Generation(self.number, members, (8 // nodes,) * nodes, "127.0.0.1", 1, None, "test")
        )

    def commit(self, first: int, last: int, **more: Any) -> None:
        """A commit with the history from `first` to `last`. The loss of a step is a function of the step."""
        key = f"history/{last}-g{self.number}-{self.log.view.length}.jsonl"
        lines = [
            {"generation": self.number, "kind": "step", "step": step, "world_size": self.number}
            | {"loss": 8.0 / step, "z_loss": 0.0, "gradient_norm": None, "learning_rate": 0.1}
            | {"tokens": 64, "seconds": 0.5, "data_wait_s": 0.125}
            | more
            for step in range(first, last + 1)
        ]
        texts = [Line(line["step"], json.dumps(line).encode() + b"\n") for line in lines]
        write_history(self.store, key, texts, part_bytes_max=500)
        name = f"ckpt/{last}-g{self.number}"
        self.add(Commit((Checkpoint(last, self.number, name, 1, "0" * 64, 1.0),), key))

    def everything(self, after_each: Callable[[], object] = lambda: None) -> None:
        """A life with a fallback, other world sizes, a failure and a REOPEN. Ends after step 12."""
        acts: list[Callable[[], object]] = [
            lambda: self.begin(4),
            lambda: self.commit(1, 3),
            lambda: self.commit(4, 6),
            lambda: self.add(Quarantine("ckpt/6-g1", "a wrong byte")),
            lambda: self.begin(2),
            lambda: self.commit(4, 5),
            lambda: self.commit(6, 8),
            lambda: self.add(Stop("diverged", 8)),
            lambda: self.add(Reopen("try again", False, 8)),
            lambda: self.begin(3),
            lambda: self.commit(9, STEPS, sources={"wiki": [6, 2.5], "code": [0, None]}),
            lambda: self.add(Stop(COMPLETED, STEPS)),
        ]
        for act in acts:
            act()
            after_each()

    def copy(self, *sinks: Sink) -> Copy:
        """Copy to sinks once, and close them."""
        copy = Copy(Run(self.store, RunLog(self.store, writer="reader"), None), sinks)
        copy()
        for sink in sinks:
            sink.close()
        return copy


@pytest.fixture
def run(tmp_path: Path) -> WrittenRun:
    """A run without a record."""
    (tmp_path / "run").mkdir()
    return WrittenRun(open_store(f"file://{tmp_path / 'run'}"))


@pytest.fixture
def lived(run: WrittenRun) -> WrittenRun:
    """A run that has ended."""
    run.everything()
    return run


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads in a directory: the steps and values of each curve."""
    found = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    found.Reload()
    return {
        tag: [(each.step, each.value) for each in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_step_is_once_in_each_sink(lived: WrittenRun, tmp_path: Path) -> None:
    """Steps that were computed again after a quarantine are once there, as they were first committed, over all fleets."""
    run_id = lived.log.view.run_id
    path, directory = tmp_path / "steps.jsonl", tmp_path / "tb"
    copy = lived.copy(JsonLines(path, run_id), TensorBoard(directory, run_id))
    assert copy.end == Stop(COMPLETED, STEPS)
    assert set(copy.steps.values()) == {STEPS}
    lines = lines_of(path)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["generation"] for line in lines] == [1] * 6 + [2] * 2 + [3] * 4
    assert {line["run_id"] for line in lines} == {run_id}
    assert [line["commit"] for line in lines] == [1] * 3 + [2] * 3 + [6] * 2 + [10] * 4
    found = curves(directory)
    assert [step for step, _ in found["loss"]] == list(range(1, STEPS + 1))
    assert [value for _, value in found["loss"]] == pytest.approx(
        [8.0 / step for step in range(1, STEPS + 1)]
    )
    assert found["tokens_per_second"] == [(step, 128.0) for step in range(1, STEPS + 1)]
    assert found["source_loss/wiki"] == [(step, 2.5) for step in range(9, STEPS + 1)]
    assert "source_loss/code" not in found
    assert all(math.isnan(value) for _, value in found["gradient_norm"])
    assert {len(found[tag]) for tag in found if "source" not in tag} == {STEPS}
    assert {"z_loss", "learning_rate", "step_seconds", "data_wait_seconds"} < found.keys()
    assert {"world_size", "generation"} < found.keys()


def test_a_sink_does_not_depend_on_when_it_was_filled(run: WrittenRun, tmp_path: Path) -> None:
    """A call after each record leaves the same bytes as one call at the end."""

    def fill(name: str) -> None:
        run_id = run.log.view.run_id
        run.copy(
            JsonLines(tmp_path / f"{name}.jsonl", run_id), TensorBoard(tmp_path / name, run_id)
        )

    run.everything(after_each=lambda: fill("often"))
    fill("once")
    assert (tmp_path / "often.jsonl").read_bytes() == (tmp_path / "once.jsonl").read_bytes()
    often, once = (next((tmp_path / name).iterdir()) for name in ("often", "once"))
    assert often.read_bytes() == once.read_bytes()


def test_a_writer_killed_at_any_byte_is_continued(lived: WrittenRun, tmp_path: Path) -> None:
    """Whatever part of a sink a killed writer has left, the next call completes it to the same bytes."""
    run_id = lived.log.view.run_id
    path, directory = tmp_path / "steps.jsonl", tmp_path / "tb"
    lived.copy(JsonLines(path, run_id), TensorBoard(directory, run_id))
    (events,) = directory.iterdir()
    for file, reopen, stride in (
        (path, lambda: JsonLines(path, run_id), 31),
        (events, lambda: TensorBoard(directory, run_id), 37),
    ):
        whole = file.read_bytes()
        for size in [*range(0, len(whole), stride), len(whole) - 1, len(whole)]:
            os.truncate(file, size)
            lived.copy(reopen())
            assert file.read_bytes() == whole, f"{file.name} cut to {size} bytes"
        file.write_bytes(whole + whole[-40:-1])
        lived.copy(reopen())
        assert file.read_bytes() == whole, f"{file.name} with part of a further record"


def test_sinks_at_different_positions(lived: WrittenRun, tmp_path: Path) -> None:
    """One call may fill a new sink beside one that is complete: neither gets a step twice."""
    run_id = lived.log.view.run_id
    path, directory = tmp_path / "steps.jsonl", tmp_path / "tb"
    lived.copy(JsonLines(path, run_id))
    before = path.read_bytes()
    copy = lived.copy(JsonLines(path, run_id), TensorBoard(directory, run_id))
    assert list(copy.steps.values()) == [0, STEPS]
    assert path.read_bytes() == before
    assert [step for step, _ in curves(directory)["loss"]] == list(range(1, STEPS + 1))


def test_event_file_with_a_damaged_tail_is_repaired(lived: WrittenRun, tmp_path: Path) -> None:
    """After a power cut the end of a file may be zeros or wrong bytes. It is written again from the last whole commit."""
    run_id = lived.log.view.run_id
    lived.copy(TensorBoard(tmp_path / "tb", run_id))
    (events,) = (tmp_path / "tb").iterdir()
    whole = events.read_bytes()
    for tail in (bytes(40), bytes([whole[-20] ^ 1])):
        events.write_bytes(whole[: -len(tail) - 10] + tail + whole[len(whole) - 10 :])
        lived.copy(TensorBoard(tmp_path / "tb", run_id))
        assert events.read_bytes() == whole


def test_a_later_call_reads_only_later_commits(lived: WrittenRun, tmp_path: Path) -> None:
    """A sink that is complete costs no read of the history, and no read of the log before its position."""
    run_id, keys = lived.log.view.run_id, []
    lived.copy(TensorBoard(tmp_path / "tb", run_id))
    store = lived.store

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def read(self, key: str) -> bytes:
            keys.append(key)
            return store.read(key)

    lived.store = Counted()  # type: ignore[assignment]
    lived.copy(TensorBoard(tmp_path / "tb", run_id))
    assert sorted(set(keys)) == [f"log/{index:020d}.json" for index in (10, 11, 12)]


def test_times_end_at_the_commit(lived: WrittenRun, tmp_path: Path) -> None:
    """A step's time is its COMMIT's, less the seconds of the steps between."""
    lived.copy(TensorBoard(tmp_path / "tb", lived.log.view.run_id))
    found = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    found.Reload()
    times = [each.wall_time for each in found.Scalars("loss")][:3]
    assert [late - early for early, late in itertools.pairwise(times)] == [0.5, 0.5]
    commit = next(each for each in lived.log.records() if isinstance(each.body, Commit))
    assert times[-1] == datetime.fromisoformat(commit.time).timestamp()


def test_times_never_go_back(run: WrittenRun, tmp_path: Path) -> None:
    """Steps that by their COMMIT began before the COMMIT before get its time, also after a second call."""
    run.begin(1)
    run.commit(1, 2)
    run_id = run.log.view.run_id
    run.copy(TensorBoard(tmp_path / "tb", run_id))
    run.commit(3, 5, seconds=1000.0)
    run.commit(6, 7, seconds=1000.0)
    run.copy(TensorBoard(tmp_path / "tb", run_id))
    run.copy(TensorBoard(tmp_path / "once", run_id))
    found = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    found.Reload()
    times = [each.wall_time for each in found.Scalars("loss")]
    assert len(times) == 7
    assert times == sorted(times)
    (again,), (once,) = ((tmp_path / name).iterdir() for name in ("tb", "once"))
    assert again.read_bytes() == once.read_bytes()


def test_all_that_one_call_copies_is_flushed_once(
    lived: WrittenRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is waited for once per sink and call, not once per COMMIT, and after the last step is written."""
    path, run_id = tmp_path / "steps.jsonl", lived.log.view.run_id
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_size))
    lived.copy(JsonLines(path, run_id), TensorBoard(tmp_path / "tb", run_id))
    (events,) = (tmp_path / "tb").iterdir()
    assert flushed == [path.stat().st_size, events.stat().st_size]


def test_a_gap_is_told(run: WrittenRun, tmp_path: Path) -> None:
    """A history that is gone, and one that was thinned: each has one warning, with what its own commit lacks."""
    run.begin(1)
    run.commit(1, 3)
    run.commit(4, 6)
    run.commit(8, 9)
    run.store.delete(run.store.keys("history/6-")[0])
    for key in run.store.keys("history/6-"):
        run.store.delete(key)
    told: list[str] = []
    sink = JsonLines(tmp_path / "steps.jsonl", run.log.view.run_id)
    Copy(Run(run.store, RunLog(run.store, writer="reader"), None), [sink], told.append)()
    sink.close()
    assert len(told) == 2
    assert "has 0 of the steps 4 to 6: it is not there; 3 steps from 4 to 6 are left out" in told[0]
    assert "has 2 of the steps 7 to 9: it was thinned" in told[1]
    assert "1 steps from 7 to 7 are left out" in told[1]


def test_steps_before_a_break_of_the_log_are_copied(lived: WrittenRun, tmp_path: Path) -> None:
    """A record is missing from the log: the steps of all commits before it are written before the error comes."""
    lived.store.delete(record_key(7))
    sink = JsonLines(tmp_path / "steps.jsonl", lived.log.view.run_id)
    with pytest.raises(LogDamaged, match=record_key(7)):
        Copy(Run(lived.store, RunLog(lived.store, writer="reader"), None), [sink])()
    assert sink.position == Position(7, 8)
    sink.close()


def test_follow_waits_for_a_run_that_is_not_there_yet(lived: WrittenRun, tmp_path: Path) -> None:
    """`sync --follow` may be started before the run: it says what it waits for, once."""
    command = [sys.executable, "-m", "elastic_pt", "sync", str(tmp_path / "later")]
    command += ["--to", f"jsonl:{tmp_path / 'steps.jsonl'}"]
    alone = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert alone.returncode == 2
    with subprocess.Popen([*command, "--follow"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("waiting for the run: ")
        (tmp_path / "run").rename(tmp_path / "later")
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == STEPS


@pytest.mark.parametrize("name", ["jsonl:{}/steps.jsonl", "tensorboard:{}/tb"])
def test_one_sync_at_a_time_and_one_run_per_sink(
    lived: WrittenRun, tmp_path: Path, name: str
) -> None:
    """A sink that another `sync` writes is refused; so is a sink that holds another run."""
    name = name.format(tmp_path)
    sink = open_sink(name, lived.log.view.run_id)
    with pytest.raises(ConfigError, match="another `sync` writes it now; expected one at a time"):
        open_sink(name, lived.log.view.run_id)
    lived.copy(sink)
    with pytest.raises(ConfigError, match=f"expected .* for this run .*{'e' * 32}"):
        open_sink(name, "e" * 32)
    open_sink(name, lived.log.view.run_id).close()


def test_what_sync_did_not_write_stays(lived: WrittenRun, tmp_path: Path) -> None:
    """A file or directory of something else is refused and not changed."""
    notes, foreign = tmp_path / "notes.txt", tmp_path / "tb" / "events.out.tfevents.1.host"
    foreign.parent.mkdir()
    foreign.write_text("x")
    notes.write_text("a line\nhalf a li")
    for name in (f"jsonl:{notes}", f"tensorboard:{foreign.parent}"):
        with pytest.raises(ConfigError, match="expected"):
            open_sink(name, lived.log.view.run_id)
    assert notes.read_text() == "a line\nhalf a li"
    assert [each.name for each in foreign.parent.iterdir()] == [foreign.name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("csv:x", "--to csv:x: expected tensorboard:DIR, jsonl:FILE or wandb:PROJECT"),
        ("jsonl:", "--to jsonl:: expected tensorboard:DIR, jsonl:FILE"),
        ("tensorboard:s3://b/tb", "expected a local DIR or FILE"),
        ("jsonl:{}", "Is a directory; expected a place that this user may write to"),
        ("jsonl:{}/none/x", "No such file or directory; expected"),
        ("jsonl:/dev/null", "Invalid argument; expected a place"),
        ("tensorboard:{}/run/log/00000000000000000000.json", "expected a place"),
    ],
)
def test_bad_sink_is_one_line(
    lived: WrittenRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
) -> None:
    """An unknown sink, or a place that cannot be written, is a user's mistake: one line, exit code 2."""
    name = name.format(tmp_path)
    assert run_command_line(["sync", str(tmp_path / "run"), "--to", name]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""


def test_run_without_a_committed_step(run: WrittenRun, tmp_path: Path) -> None:
    """Before the first commit there is nothing to copy, which is no error."""
    run.begin(1)
    path = tmp_path / "steps.jsonl"
    assert run_command_line(["sync", str(tmp_path / "run"), "--to", f"jsonl:{path}"]) == 0
    assert path.read_bytes() == b""


def test_full_disk_is_one_line(lived: WrittenRun, capsys: pytest.CaptureFixture[str]) -> None:
    """A sink that cannot be written ends the command with one line."""
    assert Path("/dev/full").is_char_device()
    sink = JsonLines.__new__(JsonLines)
    sink.name, sink._run_id, sink.position = "jsonl:x", "r", Position()
    sink._handle = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(ConfigError, match="No space left on device"):
        lived.copy(sink)
    os.close(sink._handle)


# ---- the network: a bucket, Weights & Biases ----------------------------------------------------------


@pytest.mark.moto
def test_run_in_a_bucket(moto_url: str, tmp_path: Path) -> None:
    """A run in a bucket is copied like one on a disk."""
    run = WrittenRun(open_store(f"{moto_url}/run"))
    run.everything()
    path = tmp_path / "steps.jsonl"
    for _ in range(2):
        assert run_command_line(["sync", f"{moto_url}/run", "--to", f"jsonl:{path}"]) == 0
        assert [line["step"] for line in lines_of(path)] == list(range(1, STEPS + 1))


@pytest.mark.moto
def test_follow_ends_with_the_run_and_survives_a_failing_bucket(
    moto_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--follow says that it goes on, copies until the STOP, and exits with 0. A bucket that fails for a while is one warning."""
    run = WrittenRun(open_store(f"{moto_url}/run"))
    run.begin(1)
    run.commit(1, 2)
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        acts: list[Callable[[], object]] = [
            lambda: proxy.strike(ACCESS_DENIED),
            lambda: run.commit(3, 4),
            proxy.mend,
            lambda: run.add(Stop(COMPLETED, 4)),
        ]
        # One act between two polls.
        clock = types.SimpleNamespace(sleep=lambda _: acts.pop(0)())
        monkeypatch.setattr("elastic_pt.cli.sync.time", clock)
        path = tmp_path / "steps.jsonl"
        arguments = ["sync", f"{moto_url}/run", "--to", f"jsonl:{path}", "--follow"]
        assert run_command_line(arguments) == 0
    assert not acts
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3, 4]
    captured = capsys.readouterr()
    begins, warning = captured.err.splitlines()
    assert begins == "copied up to step 2; follows the run until it has ended"
    assert warning.startswith("warning: ")
    assert captured.out.endswith("the run has ended: completed at step 4\n")


@pytest.fixture
def wandb() -> Iterator[WandbServer]:
    """A server that speaks W&B's protocol."""
    with wandb_server() as server:
        yield server


@pytest.fixture
def with_wandb(
    extras_python: str, wandb: WandbServer, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m …` where the extra `wandb` is installed, logged in to the server."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")}
    login = {"WANDB_BASE_URL": wandb.url, "WANDB_API_KEY": "a" * 40, "WANDB_DIR": str(tmp_path)}

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [extras_python, "-m", *map(str, arguments)],
            env=kept | login | {"HOME": str(tmp_path)} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WANDB_TIMEOUT_S,
        )

    return run


WHOLE = [(step, 8.0 / step) for step in range(1, STEPS + 1)]
"""The steps of a run that has ended, with their losses."""


def test_wandb_resumes_after_the_step_of_its_server(
    lived: WrittenRun,
    wandb: WandbServer,
    with_wandb: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """W&B's client sends each step after the one that its server holds, under the run's id, and nothing of the machine."""
    for missing in (STEPS, 5):
        del wandb.history[STEPS - missing :]
        done = with_wandb("elastic_pt", "sync", tmp_path / "run", "--to", "wandb:mine")
        assert done.returncode == 0, done.stderr
        assert f"wandb:mine: {missing} steps written" in done.stdout
        assert wandb.losses == WHOLE
    assert (wandb.run_id, wandb.project) == (lived.log.view.run_id, "mine")
    assert wandb.files == {"config.yaml", "wandb-summary.json"}


def test_an_offline_run_of_wandb_can_be_uploaded(
    lived: WrittenRun,
    wandb: WandbServer,
    with_wandb: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """Offline nothing is sent; `wandb sync` then sends each step once, under the run's id."""
    to = ["--to", "wandb:mine"]
    done = with_wandb("elastic_pt", "sync", tmp_path / "run", *to, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert wandb.run_id == ""
    (offline,) = tmp_path.glob("wandb/offline-run-*")
    done = with_wandb("wandb", "sync", offline)
    assert done.returncode == 0, done.stderr
    assert (wandb.run_id, wandb.project) == (lived.log.view.run_id, "mine")
    assert wandb.losses == WHOLE


def test_wandb_without_a_login_is_one_line(
    lived: WrittenRun,
    with_wandb: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """Without a key for the server, `sync` asks nobody for one: one line, exit code 2."""
    done = with_wandb(
        "elastic_pt", "sync", tmp_path / "run", "--to", "wandb:mine", WANDB_API_KEY=""
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --to wandb:mine: ")
    assert "expected a login (`wandb login`)" in done.stderr


def test_missing_wandb_says_what_to_install(
    lived: WrittenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the extra the error names it."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"expected the extra that `pip install 'elastic-pt"):
        open_sink("wandb:mine", lived.log.view.run_id)
