"""The command line: `elastic-pt COMMAND …`. Importing it does nothing; `main` is the entry point.

    prepare                             corpus ─► token shards                      cli.prepare
    convert                             token files of others ─► token shards       cli.convert
    run  local  demo                    nodes that train                            cli.training
    data                                what a run reads, and when                  cli.data
    status  log  checkpoints            read the state of a run                     cli.reading
    watch                               judge from outside whether it is healthy    cli.watch
    goodput                             what its node-seconds were spent on         cli.goodput
    targets                             its nodes as scrape targets                 cli.targets
    sync                                copy its steps to TensorBoard and others    cli.sync
    report                              one HTML page about it                      cli.report
    digest  generate  eval  export      use its checkpoints                         cli.weights
    reopen                              continue a failed run                       cli.control
    tidy                                remove what it needs no more                cli.tidy
    checkpoint  pause  resume           steer a run through its log                 cli.control
    drain  stop
    config  storage-check               checks before a run                         cli.setup
    doctor                              … and of everything that a person would     cli.doctor
    dashboards push  dashboards export  Grafana dashboards                          cli.dashboards
    chaos list  run  campaign  replay   faults strike runs on this machine          cli.chaos
    chaos live                          … and a run on a cluster                    cli.chaos_live

Commands import what they need when they are called: importing torch takes two seconds, and `--help` and
`status` do not need it. Workers import this module too, because multiprocessing imports the parent's main
module again in a forked process.
"""

import atexit
import inspect
import io
import os
import platform
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Final

import structlog
import typer
from typer.exceptions import TyperException

from elastic_pt import __version__
from elastic_pt.cli import (
    chaos,
    chaos_live,
    control,
    convert,
    dashboards,
    data,
    doctor,
    goodput,
    prepare,
    reading,
    report,
    setup,
    targets,
    tidy,
    training,
    watch,
    weights,
)
from elastic_pt.cli import sync as sync_module
from elastic_pt.cli.options import INTERRUPTED
from elastic_pt.errors import ConfigError, ElasticPtError, UnexpectedError
from elastic_pt.telemetry.events import EventContext, EventOutput, configure_events
from elastic_pt.telemetry.redaction import Redactor, secrets_in

_BROKEN_PIPE: Final = 141
_INVALID_VALUE: Final = re.compile(r"Invalid value(?: for '([^']*)')?: ")

log = structlog.get_logger("elastic_pt.cli")

_EXAMPLES: Final = "\n\nExamples:\n"
"""Starts the last part of a command's docstring: one example a line. `--help` shows it last."""


def _examples(command: Callable[..., Any]) -> str:
    examples = inspect.cleandoc(command.__doc__ or "").partition(_EXAMPLES)[2]
    return f"[bold]Examples[/bold]\n{examples}"


def _text(command: Callable[..., Any]) -> str:
    return inspect.cleandoc(command.__doc__ or "").partition(_EXAMPLES)[0]


app = typer.Typer(
    name="elastic-pt",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: Final[dict[str, Callable[..., None]]] = {
    "prepare": prepare.prepare,
    "convert": convert.convert,
    "data": data.data,
    "run": training.run,
    "local": training.local,
    "demo": training.demo,
    "status": reading.status,
    "watch": watch.watch,
    "log": reading.log,
    "checkpoints": reading.checkpoints,
    "goodput": goodput.goodput,
    "targets": targets.targets,
    "sync": sync_module.sync,
    "report": report.report,
    "digest": weights.digest,
    "generate": weights.generate,
    "eval": weights.evaluate,
    "export": weights.export,
    "checkpoint": control.checkpoint,
    "pause": control.pause,
    "resume": control.resume,
    "drain": control.drain,
    "stop": control.stop,
    "reopen": control.reopen,
    "tidy": tidy.tidy,
    "config": setup.config,
    "storage-check": setup.storage_check,
    "doctor": doctor.doctor,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, help=_text(_command), epilog=_examples(_command))(_command)


def _add_group(
    name: str, group: Callable[..., None], commands: dict[str, Callable[..., Any]]
) -> None:
    """A command with commands of its own."""
    typed = typer.Typer(rich_markup_mode="rich")
    for each, command in commands.items():
        typed.command(each, help=_text(command), epilog=_examples(command))(command)
    app.add_typer(typed, name=name, help=_text(group), epilog=_examples(group))


_add_group(
    "dashboards",
    dashboards.dashboards,
    {"push": dashboards.push_dashboards, "export": dashboards.export_dashboards},
)
_add_group(
    "chaos",
    chaos.chaos,
    {
        "list": chaos.list_scenarios,
        "run": chaos.run,
        "campaign": chaos.campaign,
        "replay": chaos.replay,
        "live": chaos_live.live,
    },
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"elastic-pt {__version__}")
        raise typer.Exit


def entry(
    context: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Pre-train a language model on preemptible machines. Only the bucket has to survive.

    Examples:
    elastic-pt prepare books/ --out data
    elastic-pt local run.toml --nodes 3
    elastic-pt status runs/first
    elastic-pt generate runs/first --prompt "Once upon"
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(ConfigError.exit_code)


app.callback(invoke_without_command=True, help=_text(entry), epilog=_examples(entry))(entry)


def main() -> None:
    """Run the command line and end the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A command must not fail on a character that the locale cannot show (`LC_ALL=C`).
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    ended: list[int] = []
    # First: handlers run in reverse, so those of multiprocessing and torch run before this one.
    atexit.register(_end_at_once, ended)
    try:
        ended.append(run_command_line(sys.argv[1:]))
    except SystemExit as end:  # an agent that a signal ends
        ended += [end.code] if isinstance(end.code, int) else []
        raise
    raise SystemExit(ended[0])


def _end_at_once(ended: list[int]) -> None:
    """Python would take all modules apart. With torch that takes about a second, which no account of an agent has."""
    with suppress(
        OSError, ValueError
    ):  # nobody reads the output any more: Python ends with its own code for that
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if ended:
            os._exit(ended[0])


def run_command_line(arguments: list[str]) -> int:
    """Run one command; returns the exit code. An expected error is one line on standard error."""
    # Warnings go to standard error, because scripts parse standard output. An agent configures events again.
    configure_events(
        EventContext(platform.node()),
        EventOutput("warning", redactor=Redactor(secrets_in(os.environ))),
    )
    for argument in arguments:
        if not argument.isascii() and argument != argument.encode("utf-8", "ignore").decode():
            return _fail(f"argument {argument!a}: expected UTF-8 text", ConfigError.exit_code)
    try:
        result: Any = app(args=arguments, prog_name="elastic-pt", standalone_mode=False)
    except ElasticPtError as error:
        return _fail(str(error), error.exit_code)
    except TyperException as error:
        return _fail(_usage_message(error, arguments), ConfigError.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has closed standard output. Python must not write to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a compiled library is not an Exception
        log.exception("unexpected_error", command=arguments[:1])
        what = f"{type(error).__name__}: {error}"
        return _fail(
            f"unexpected {what}; the traceback is above; please report this",
            UnexpectedError.exit_code,
        )
    return result if isinstance(result, int) else 0


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


def _usage_message(error: TyperException, arguments: list[str]) -> str:
    context: typer.Context | None = getattr(error, "ctx", None)
    path = "elastic-pt" if context is None else context.command_path
    message = error.format_message().rstrip(".")
    # The library's message does not always contain the value.
    given = [
        f"{name} {arguments[arguments.index(name) + 1]}"
        for name in getattr(getattr(error, "param", None), "opts", ())
        if name in arguments[:-1]
    ]
    if found := _INVALID_VALUE.match(message):
        message = message[found.end() :]
        given = given or [name for name in found.groups() if name]
    message = ": ".join([*given, message])
    return f"{message}; expected the usage that `{path} --help` shows"
