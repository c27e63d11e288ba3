"""The command `doctor`: what a person would check by hand before a run, and when it does not go well."""

import dataclasses
import ipaddress
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from elastic_pt.cli.options import (
    Address,
    AsJsonList,
    Overrides,
    absolute_url,
    is_config_file,
    print_json,
)
from elastic_pt.cli.terminal_text import TerminalText
from elastic_pt.config import load_config
from elastic_pt.errors import ConfigError, ElasticPtError

if TYPE_CHECKING:
    from elastic_pt.doctor.check import Check
    from elastic_pt.doctor.examine import Question

TO_MEND: Final = 1
"""Exit code if a check is not ok."""
_NAME_WIDTH: Final = 15
_INDENT: Final = " " * 6
_WIDTH_MIN: Final = 40


def doctor(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN_URL|CONFIG",
            help="A run, the place of a new one, or a TOML file; without it the machine alone.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes",
            metavar="N",
            min=1,
            help="Nodes that train together. Default: those that train now, or as few as may.",
            show_default=False,
        ),
    ] = None,
    address: Address = None,
    overrides: Overrides = None,
    as_json: AsJsonList = False,
) -> None:
    """Check this machine, and with RUN_URL or CONFIG the bucket, data and other nodes too.

    Prints one line per check, and below it what to do if it is not ok. Checks
    that cannot be made are left out. Tries every right on scratch objects in
    the run directory, and removes them. The exit code is 0 if all is well, and
    1 if there is something to mend.

    Examples:
    elastic-pt doctor
    elastic-pt doctor run.toml --nodes 4
    elastic-pt doctor s3://bucket/run --json
    """
    question = _question(source, nodes, address, overrides or [])
    from elastic_pt.doctor.examine import examine

    checks = examine(question)
    if as_json:
        found = list(checks)
        print_json([dataclasses.asdict(each) for each in found])
    else:
        found = _print_all(checks, Console(highlight=False))
    if not all(each.ok for each in found):
        raise typer.Exit(TO_MEND)


def _question(
    source: str | None, nodes: int | None, address: str | None, overrides: list[str]
) -> "Question":
    from elastic_pt.cli.training import joined_config
    from elastic_pt.doctor.bucket import ANSWER_TIMEOUT_S
    from elastic_pt.doctor.examine import Question
    from elastic_pt.runlog.identity import CONFIG_KEY
    from elastic_pt.store.open import open_store
    from elastic_pt.train.probe import platform_of_machine

    if address is not None:
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise ConfigError(
                f"--address {address}: expected an IP address of this machine"
            ) from None
    if source is None:
        for option, value in (("--nodes", nodes), ("--set", overrides)):
            if value:
                raise ConfigError(
                    f"{option} {value}: needs a configuration; expected RUN_URL or CONFIG too"
                )
        return Question(address=address)
    config, begun = None, False
    if is_config_file(source):
        config = load_config(Path(source), overrides)
    url = absolute_url(source, "RUN_URL") if config is None else config.run.url
    store = open_store(url, timeout_s=ANSWER_TIMEOUT_S, patient=False)
    try:
        begun = store.size(CONFIG_KEY) is not None
    except ElasticPtError:
        # The check of the bucket tells why.
        begun = False
    if config is None and begun:
        config = joined_config(store, overrides)
    if config is None and overrides:
        raise ConfigError(
            f"--set {overrides[0]}: {store.url} has no configuration that can be read; expected CONFIG instead"
        )
    return Question(store, config, begun, nodes, address, platform_of_machine)


def _print_all(checks: "Iterable[Check]", console: Console) -> "list[Check]":
    """Print each check when it is made, and a last line."""
    found = []
    for check in checks:
        found.append(check)
        for line in check_lines(check, console):
            console.print(line, soft_wrap=True)
    bad = [each.name for each in found if not each.ok]
    if bad:
        summary = Text(f"{len(bad)} of {len(found)} checks: something to mend ({', '.join(bad)})")
        summary.stylize("bold")
    else:
        summary = Text(f"all well: {len(found)} checks")
    console.print(summary, soft_wrap=True)
    return found


def check_lines(check: "Check", console: Console) -> list[Text]:
    """A check as lines that no terminal wraps: what was found, and if it is not ok what was expected and what to do."""
    plain = TerminalText(ascii=not console.encoding.lower().startswith("utf"))
    word, style = ("ok", "green") if check.ok else ("MEND", "bold red")
    texts = [f"{check.name:<{_NAME_WIDTH}} {check.found}"]
    if not check.ok:
        texts[0] += f"; expected {check.expected}"
        texts.append(f"{'':<{_NAME_WIDTH}} -> {check.remedy}")
    lines: list[Text] = []
    for number, text in enumerate(texts):
        # A file or a pipe gets one line a text, so that a search finds it.
        width = max(_WIDTH_MIN, console.width) - len(_INDENT) if console.is_terminal else 10**6
        hanging = " " * (_NAME_WIDTH + 1 + 3 * number)
        parts = textwrap.wrap(plain.clean(text), width, subsequent_indent=hanging)
        for part in parts:
            line = Text()
            line.append(f"{'' if lines else word:<{len(_INDENT)}}", "" if lines else style)
            line.append(part)
            lines.append(line)
    return lines
