"""Commands that train: `run` (one node's agent), `local` (several nodes on this machine), `demo`."""

import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from elastic_pt import failpoints
from elastic_pt.cli.options import Address, ConfigOrRunUrl, Overrides, absolute_url, is_config_file
from elastic_pt.config import Config, ElasticSection, load_config, parse_config
from elastic_pt.errors import ConfigError, RunFailed

if TYPE_CHECKING:
    from elastic_pt.store.port import Store

# A node's name becomes part of keys in the run directory.
_NODE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# The commands import the training code when they run, because it imports torch.


def run(
    source: ConfigOrRunUrl,
    node: Annotated[
        str | None,
        typer.Option(
            "--node",
            metavar="NAME",
            help="This node's name: at most 64 letters, digits, . _ and -. Default: the host's name.",
            show_default=False,
        ),
    ] = None,
    address: Address = None,
    left_code: Annotated[
        int,
        typer.Option(
            "--left-code",
            metavar="CODE",
            min=0,
            max=255,
            help="Exit code of a node that has left in good order before the run has ended. "
            "Not 0 where 0 means that nothing is left to do, as in a Kubernetes Job.",
        ),
    ] = 0,
    overrides: Overrides = None,
) -> None:
    """Run this node's agent: start the run or join it, and train until it ends.

    Start it on every node. A RUN_URL is enough to join a run; --set then changes
    only what may differ between nodes. The exit code is 0 when the run is
    complete. SIGTERM or Ctrl-C make this node leave; the exit code is then that
    of --left-code once its last state is safe: other nodes hold it, or it is
    committed.

    Examples:
    elastic-pt run run.toml
    elastic-pt run s3://bucket/run
    elastic-pt run s3://bucket/run --node spot-7 --set elastic.workers_per_node=2
    """
    if node is not None and not _NODE_NAME.fullmatch(node):
        raise ConfigError(
            f"--node {node!r}: expected at most 64 letters, digits, '.', '_' and '-', "
            "the first one a letter or digit"
        )
    failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
    config = _configuration(source, overrides or [])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        # Before the node takes part there is nothing to finish.
        signal.signal(number, lambda *_: sys.exit(left_code))
    from elastic_pt.workers import forking
    from elastic_pt.workers.scratch import scratch_directory

    with scratch_directory(config.checkpoint.staging) as scratch:
        failpoints.failpoint(failpoints.Failpoint.IMPORTS_BEGUN)
        forking.import_once(
            forking.WARM_MODULES,
            threads=config.train.threads,
            timeout_s=config.elastic.startup_timeout_s,
        )
        from elastic_pt.agent.agent import run_agent
        from elastic_pt.membership.address import local_address
        from elastic_pt.train import probe, worker

        # Both fork this process. With `train.threads` above 1, numpy has started threads here; its own handler ends
        # them at the first fork. The server is forked only if this process has one thread, so it comes second.
        platform = forking.ForkedCall(probe.WHAT, probe.platform_of_workers)
        forking.start_fork_server(scratch)
        stop = run_agent(
            config,
            node or socket.gethostname(),
            address or local_address(),
            scratch,
            worker.main,
            platform,
        )
    if stop is None:
        raise typer.Exit(left_code)
    _tell_end(stop.reason, stop.step)


def _configuration(source: str, overrides: list[str]) -> Config:
    if is_config_file(source):
        return load_config(Path(source), overrides)
    from elastic_pt.workers.forking import ForkedCall

    # In a separate process: a request to an object store starts a thread, and this process has to fork later.
    reading = ForkedCall("reading the run's configuration", _read_joined_config)
    reading.begin(absolute_url(source, "RUN_URL"), overrides)
    text: str = reading.wait(ElasticSection().startup_timeout_s)
    return parse_config(text, source=source)


def _read_joined_config(url: str, overrides: list[str]) -> str:
    from elastic_pt.store.open import open_store

    return joined_config(open_store(url), overrides).to_toml()


def joined_config(store: "Store", overrides: list[str]) -> Config:
    """The run's configuration with this node's overrides. Raises `ConfigError` if one changes the run's identity."""
    from elastic_pt.runlog.identity import read_run_config

    # The URL by which this node found the run; the first node may have used another one.
    here = f"run.url={store.url}"
    original = read_run_config(store, [here])
    config = read_run_config(store, [here, *overrides])
    wanted, found = config.identity(), original.identity()
    for name in sorted(found):
        if wanted[name] != found[name]:
            raise ConfigError(
                f"--set {name}={wanted[name]}: the run at {store.url} has {found[name]!r} and cannot change it; "
                "expected the run's value, or a new run.url"
            )
    if config.run.url != original.run.url:
        raise ConfigError(
            f"--set run.url={config.run.url}: this command joins the run at {store.url}; "
            "expected no --set run.url, or a configuration file instead of RUN_URL"
        )
    return config


def _tell_end(reason: str, step: int) -> None:
    typer.echo(f"{reason} at step {step}")
    if reason != "completed":
        raise RunFailed(f"{reason}; `elastic-pt reopen RUN_URL --why TEXT` lets it continue")


def local(
    config_path: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A TOML file.", show_default=False)
    ],
    nodes: Annotated[
        int, typer.Option("--nodes", metavar="N", min=1, help="Nodes to start.", show_default=False)
    ],
    workers_per_node: Annotated[
        int | None,
        typer.Option(
            "--workers-per-node",
            metavar="M",
            min=1,
            help="Worker processes of each node.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train with several nodes on this machine: one agent per node, each with its own workers.

    They are real agents. If you kill one, the others go on. `elastic-pt run
    RUN_URL` starts another one, which joins them. Ctrl-C ends all of them; the
    same command then resumes from the last checkpoint.

    Examples:
    elastic-pt local run.toml --nodes 3
    elastic-pt local run.toml --nodes 2 --workers-per-node 2 --set run.seed=7
    """
    changes = list(overrides or [])
    if workers_per_node is not None:
        changes.append(f"elastic.workers_per_node={workers_per_node}")
    config = load_config(config_path, changes)
    from elastic_pt.cli.local import train_locally

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    stop = train_locally(config, nodes)
    _tell_end(stop.reason, stop.step)


def demo(
    directory: Annotated[
        Path,
        typer.Option(
            "--directory", metavar="DIR", help="Directory for data, runs and plot.", file_okay=False
        ),
    ] = Path("demo"),
) -> None:
    """Show a recovery in a few minutes: lose a node, add one, get the same weights bit for bit.

    Trains a small model on the Python standard library with three nodes on this
    machine, kills one of them, lets another join, and compares the result with
    an undisturbed run of two nodes.

    Examples:
    elastic-pt demo --directory /tmp/demo
    """
    from elastic_pt.cli.demo import run_demo

    run_demo(directory)
