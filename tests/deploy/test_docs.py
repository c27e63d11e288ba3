"""The papers agree with the code: commands, options, keys, links, tables and words."""

import dataclasses
import inspect
import re
import shlex
import signal
import tomllib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from elastic_pt import errors
from elastic_pt.chaos.document import filled
from elastic_pt.checkpoint.layout import FullManifest, TrainingState
from elastic_pt.checkpoint.nodes import RootManifest
from elastic_pt.cli import app
from elastic_pt.config import parse_config
from elastic_pt.data import manifest
from elastic_pt.data.lanes import LANES_VERSION
from elastic_pt.data.order import ORDER_VERSION
from elastic_pt.errors import CheckpointError, ConfigError, ElasticPtError, RunFailed
from elastic_pt.failpoints import Failpoint
from elastic_pt.membership.decision.admission import spans
from elastic_pt.membership.decision.status import NodePhase
from elastic_pt.report.status import CommitReport, MemberReport, RunStatus, State
from elastic_pt.runlog import records
from elastic_pt.runlog.records import Kind, Record, Stop
from elastic_pt.telemetry import account
from elastic_pt.telemetry.catalogue import page as metrics_page
from elastic_pt.telemetry.goodput import Bucket
from elastic_pt.train.exact import DyadicSum
from elastic_pt.train.health import Rung
from elastic_pt.workers.assignment import Outcome

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DECISIONS = sorted((ROOT / "docs" / "adr").glob("*.md"))
ENTRY = "elastic-pt"
PLACEHOLDERS = '[run]\nurl = "run"\n[data]\nurl = "data"\n'

page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_of(page: Path) -> Iterator[str]:
    """Every line of code of a page: fenced, indented, and between backticks."""
    fenced = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield re.sub(r"\s+#.*", "", line).strip()
        else:
            yield from re.findall(r"`([^`]+)`", line)


def commands_of(page: Path) -> Iterator[list[str]]:
    """Arguments of every `elastic-pt` command that a page shows, without the program's name."""
    for line in code_of(page):
        if line.startswith(f"{ENTRY} "):
            yield shlex.split(line)[1:]


def table_between(page: Path, name: str) -> list[str]:
    """The lines between `<!-- name: begin -->` and `<!-- name: end -->`."""
    _, _, rest = page.read_text().partition(f"<!-- {name}: begin -->\n")
    table, found, _ = rest.partition(f"<!-- {name}: end -->")
    assert found, f"{page.name} has no table called {name}"
    return table.strip().splitlines()


def first_column(page: Path, heading: str) -> list[str]:
    """Code in the first column of the first table below a heading."""
    rows: list[str] = []
    for line in page.read_text().partition(f"\n{heading}\n")[2].splitlines():
        if line.startswith("| `"):
            rows += re.findall(r"`([^`]+)`", line.split("|")[1])
        elif rows:
            break
    return rows


@page_by_page
def test_commands_and_options_exist(page: Path) -> None:
    """Whoever copies a command from a page gets no usage error."""
    program = get_command(app)
    known = program.commands  # type: ignore[attr-defined]
    of_program = {option for parameter in program.params for option in parameter.opts} | {"--help"}
    for arguments in commands_of(page):
        name, *rest = arguments
        if name in of_program:
            continue
        assert name in known, f"{page.name}: elastic-pt {name}"
        command = known[name]
        if of_group := getattr(command, "commands", None):
            part, *rest = rest
            assert part in of_group, f"{page.name}: elastic-pt {name} {part}"
            command = of_group[part]
        options = {option for parameter in command.params for option in parameter.opts}
        shown = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert shown <= options | {"--help"}, f"{page.name}: elastic-pt {name}"


@page_by_page
def test_overrides_and_keys_exist(page: Path) -> None:
    """Every `--set` is accepted, and every `section.key` in backticks is a key of the configuration."""
    sections = parse_config(PLACEHOLDERS, source=page.name).model_dump()
    for line in code_of(page):
        for override in re.findall(r"--set ([a-z]+\.[a-z_]+=[^\s`\]]+)", line):
            if override != "section.key=value":
                parse_config(PLACEHOLDERS, source=page.name, overrides=[override])
        section, dot, key = line.partition(" ")[0].partition(".")
        if dot and section in sections and key != "toml":
            assert key in sections[section], f"{page.name}: {line}"


@page_by_page
def test_make_targets_and_scripts_exist(page: Path) -> None:
    """Every `make` target and every script that a page tells to run is there."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code_of(page):
        if found := re.match(r"make ([a-z-]+)", line):
            assert found[1] in targets, f"{page.name}: {line}"
        for script in re.findall(r"(?:python|sbatch .*?|-[kf]) ([a-z]+/\S*)", line):
            assert (ROOT / script).exists(), f"{page.name}: {line}"


@page_by_page
def test_links_within_the_repository_resolve(page: Path) -> None:
    """A relative link leads to a file, and its anchor to a heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^a-z0-9 -]", "", each.lower()).replace(" ", "-") for each in headings
            }, target


def test_readme_shows_a_configuration_that_works() -> None:
    """The quick start's file is complete."""
    text = (ROOT / "README.md").read_text()
    found = re.search(r"cat > run\.toml <<'END'\n(.*?)\n    END", text, re.DOTALL)
    assert found is not None
    parse_config(re.sub(r"^    ", "", found[1], flags=re.MULTILINE), source="README.md")


def exit_code_rows() -> list[str]:
    """The table of exit codes, from the error tree."""
    rows = ["| code | error | meaning |", "| ---: | --- | --- |"]
    tree = [
        each
        for _, each in inspect.getmembers(errors, inspect.isclass)
        if issubclass(each, ElasticPtError)
    ]
    order = list(vars(errors))
    for each in sorted(tree, key=lambda each: (each.exit_code, order.index(each.__name__))):
        rows.append(f"| {each.exit_code} | `{each.__name__}` | {each.__doc__} |")
    return rows


def test_page_of_metrics_is_the_catalogue() -> None:
    """Operators read about the metrics that exist, in the catalogue's own words: the page is what its command writes."""
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_page()


def test_table_of_failpoints_is_the_enumeration() -> None:
    """The page on failpoints names each point of the code, in order, with its moment."""
    rows = ["| point | moment |", "| --- | --- |"]
    rows += [f"| `{each.label}` | {each.moment} |" for each in Failpoint]
    assert table_between(ROOT / "docs" / "failpoints.md", "failpoints") == rows


def test_tables_on_chaos_are_those_of_the_code() -> None:
    """Each field, kind, phase and oracle is on the page: `python -m elastic_pt.chaos.document docs/chaos.md` writes them."""
    page = (ROOT / "docs" / "chaos.md").read_text()
    assert page == filled(page)
    assert page.count(": begin -->") == 8


def test_table_of_exit_codes_is_the_error_tree() -> None:
    """Each error and its exit code is in the table, and no other."""
    assert table_between(ROOT / "docs" / "operations.md", "exit codes") == exit_code_rows()


def supervisor_rows() -> dict[str, str]:
    """What a supervisor does, by exit code, as the table says."""
    lines = table_between(ROOT / "docs" / "operations.md", "supervisor")[2:]
    cells = [line.strip("| ").split(" | ") for line in lines]
    return {code: advice for codes, _, advice in cells for code in codes.split(", ")}


def test_a_supervisor_is_told_what_to_do_after_each_exit_code() -> None:
    """Every code of the error tree, a good end, and the ends by signal and alarm have a row, and no other has."""
    known = {row.split("|")[1].strip() for row in exit_code_rows()[2:]}
    signalled = {str(128 + each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    assert supervisor_rows().keys() == {"0", "other"} | known | signalled


def test_table_does_not_restart_after_2_4_7() -> None:
    """A run that has failed, a mistake, and a run without a usable checkpoint must not be restarted without a limit."""
    final = [ConfigError.exit_code, CheckpointError.exit_code, RunFailed.exit_code]
    advice = supervisor_rows()
    assert [code for code in advice if advice[code].startswith("does not restart")] == [
        "0",
        *map(str, final),
    ]
    assert "elastic-pt reopen" in advice[str(RunFailed.exit_code)]


def test_status_keys_are_those_of_the_command() -> None:
    """The table of `status` names every key, every state, and the keys of members and commit that matter."""
    page = ROOT / "docs" / "operations.md"
    fields = [field.name for field in dataclasses.fields(RunStatus)]
    assert sorted(first_column(page, "## Watching")) == sorted(set(fields) - {"url"})
    text = page.read_text()
    members = {field.name for field in dataclasses.fields(MemberReport)}
    assert {"node", "pid", "address", "slots", "phase"} <= members
    assert {"step", "age_s"} <= {field.name for field in dataclasses.fields(CommitReport)}
    assert all(f"`{state}`" in text for state in State)


def test_records_and_state_are_described_field_by_field() -> None:
    """The page on the run directory names every field of a record's envelope, every kind, and all resumable state."""
    page = ROOT / "docs" / "run-directory.md"
    envelope = re.findall(r'^ "(\w+)":', _empty_record(), re.MULTILINE)
    assert first_column(page, "## Records")[: len(envelope)] == envelope
    text = page.read_text()
    assert all(f"`{kind}`" in text for kind in Kind)
    assert all(f"`{field.name}`" in text for field in dataclasses.fields(TrainingState))


def _empty_record() -> str:
    return Record(0, 0, "", "", "", "", {}, Stop("", 0)).to_bytes().decode()


def test_formats_for_an_upgrade_are_those_of_the_code() -> None:
    """The numbers in docs/upgrading.md are those that this version writes and reads."""
    page = (ROOT / "docs" / "upgrading.md").read_text()
    rows = re.findall(
        r"^\| ([^|]+) \| [^|]*`[^|]* \| ([\d, ]+)[^|]*\| ([\d, ]+) \|$", page, re.MULTILINE
    )
    told = {
        what: tuple({int(each) for each in re.findall(r"\d+", cell)} for cell in cells)
        for what, *cells in rows
    }
    of_records = {records.SCHEMA, records.NEWER_SCHEMA, records.IGNORING_SCHEMA}
    assert told == {
        "records of the log": (of_records, of_records),
        "manifests of checkpoints": (
            {RootManifest.schemas[-1]},
            {*FullManifest.schemas, *RootManifest.schemas},
        ),
        "accounts of agents": ({account.SCHEMA}, {account.SCHEMA}),
        "manifest of prepared data": (
            {manifest.SCHEMA},
            {manifest.WHOLE_SHARDS_SCHEMA, manifest.SCHEMA},
        ),
        "order of the data": ({LANES_VERSION}, {ORDER_VERSION, LANES_VERSION}),
    }


def test_glossary_is_sorted_and_has_the_words_of_the_code() -> None:
    """Each term once, in order; what the code enumerates for people to read is explained."""
    text = (ROOT / "docs" / "glossary.md").read_text()
    terms = re.findall(r"^- \*\*(.+?)\*\*: \S", text, re.MULTILINE)
    assert terms == sorted(set(terms), key=str.lower)
    assert len(terms) == text.count("\n- ")
    words: list[type[StrEnum]] = [Kind, Bucket, NodePhase, Outcome, Rung]
    assert {str(word).lower() for each in words for word in each} <= set(terms)


def test_every_dependency_has_its_sentence() -> None:
    """What `pyproject.toml` asks for is on the page of dependencies, and nothing else is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = [requirement for group in groups for requirement in group]
    names = {re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in asked}
    rows = re.findall(
        r"^\| (?:`\w+` \| )?`([\w.-]+)` \| (.+) \|$",
        (ROOT / "docs" / "dependencies.md").read_text(),
        re.MULTILINE,
    )
    assert sorted(name for name, _ in rows) == sorted(names)
    assert all(sentence.endswith(".") for _, sentence in rows)


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_decision_records_have_their_parts_on_one_page(page: Path) -> None:
    """Status, context, decision, rejected alternatives, consequences; numbered without gaps."""
    text = page.read_text()
    number = DECISIONS.index(page) + 1
    assert text.startswith(f"# {number:04}: ")
    assert "\nStatus: " in text
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Context", "Decision", "Rejected", "Consequences"]
    assert len(text.splitlines()) <= 60


def test_contributing_is_short() -> None:
    """Nobody reads a hundred lines before a first change."""
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 100


def test_partial_sums_wait_as_decision_0006_says() -> None:
    """The table of waiting partial sums is what the tree of `train/exact.py` does in either order."""
    page = ROOT / "docs" / "adr" / "0006-slots-are-interleaved.md"
    rows = table_between(page, "pending sums")[2:]
    numbers = [[int(cell) for cell in row.strip("|").split("|")] for row in rows]
    assert numbers
    for slots, workers, interleaved, contiguous in numbers:
        assert most_waiting(slots, range(slots)) == interleaved <= slots.bit_length()
        assert most_waiting(slots, contiguous_order(slots, workers)) == contiguous


def contiguous_order(slots: int, workers: int) -> Iterator[int]:
    """Slots in the order in which they arrive when each worker has a contiguous span."""
    counts = spans(slots, workers)
    for turn in range(max(counts)):
        for worker, count in enumerate(counts):
            if turn < count:
                yield sum(counts[:worker]) + turn


def most_waiting(slots: int, order: Iterator[int] | range) -> int:
    """The most partial sums that wait at a time while slots arrive in this order."""
    tree, most = DyadicSum(slots), 0
    for slot in order:
        tree.add(slot, torch.zeros(1))
        most = max(most, len(tree._pending))
    return most
