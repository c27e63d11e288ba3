"""Commands that use a run's checkpoints: `digest`, `eval`, `generate`, `export`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elastic_pt.cli.options import (
    AsJson,
    DataUrl,
    RunUrl,
    Step,
    absolute_url,
    print_json,
    require_new_directory,
)
from elastic_pt.errors import ConfigError

if TYPE_CHECKING:
    from elastic_pt.report.artifacts import Chosen, Trained

# The commands import `artifacts` when they run, because it imports torch.


def digest(run_url: RunUrl, step: Step = None, as_json: AsJson = False) -> None:
    """Print one SHA-256 over all weights and the optimizer state of a checkpoint.

    Equal digests mean equal bits, for any world size. Without --step it uses the
    newest committed checkpoint that verifies. If it passes over a newer one, it
    prints the reason on standard error. If the run changed its platform (`reopen
    --platform`), a second line shows up to which step the checkpoint is exact.

    Examples:
    elastic-pt digest runs/first
    elastic-pt digest s3://bucket/run --step 2000
    """
    from elastic_pt.report.artifacts import choose_checkpoint, digest_of
    from elastic_pt.report.exactness import read_platform_changes
    from elastic_pt.report.status import open_run

    run = open_run(absolute_url(run_url, "RUN_URL"))
    chosen = choose_checkpoint(run, step)
    tell_passed_over(chosen)
    manifest = chosen.manifest
    sha256 = digest_of(run, chosen)
    changes = read_platform_changes(run.store, run.log, manifest.generation, manifest.step)
    if as_json:
        print_json(
            {
                "step": manifest.step,
                "sha256": sha256,
                "exact_up_to_step": changes[0].step if changes else manifest.step,
                "platform_changes": [dataclasses.asdict(each) for each in changes],
                "passed_over": passed_over_json(chosen),
            }
        )
        return
    typer.echo(f"step={manifest.step} sha256={sha256}")
    if changes:
        later = "; ".join(f"from step {each.step} on {each}" for each in changes)
        typer.echo(f"exact up to step {changes[0].step}; {later}")


def tell_passed_over(chosen: "Chosen") -> None:
    """Print a line on standard error for each newer checkpoint that was not used."""
    for step, reason in chosen.passed_over:
        typer.echo(f"passed over step {step}: {reason}", err=True)


def passed_over_json(chosen: "Chosen") -> list[dict[str, Any]]:
    """The newer checkpoints that were not used, for programs."""
    return [{"step": step, "reason": reason} for step, reason in chosen.passed_over]


def _trained(run_url: str, step: int | None, data_url: str | None) -> "Trained":
    from elastic_pt.report.artifacts import open_trained
    from elastic_pt.report.status import open_run

    run = open_run(absolute_url(run_url, "RUN_URL"))
    url = None if data_url is None else absolute_url(data_url, "--data")
    trained = open_trained(run, step, url)
    tell_passed_over(trained.chosen)
    return trained


def evaluate(
    run_url: RunUrl,
    step: Step = None,
    data_url: DataUrl = None,
    rows: Annotated[
        int,
        typer.Option(
            "--rows", metavar="N", min=0, help="Held-out rows, as `evaluation.rows`; 0: all."
        ),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint on the held-out documents: loss, perplexity, bits per byte.

    Loss is the mean cross-entropy per token, in nats. Bits per byte counts UTF-8
    bytes of the documents, so it can compare models with different tokenizers.
    With the run's `evaluation.rows` for --rows, loss is the held-out loss that
    the run has measured itself, but for rounding.

    Examples:
    elastic-pt eval runs/first
    elastic-pt eval s3://bucket/run --step 2000 --json
    elastic-pt eval runs/first --rows 256
    """
    from rich.console import Console
    from rich.progress import Progress

    from elastic_pt.report.artifacts import evaluate as measure

    trained = _trained(run_url, step, data_url)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task("held-out rows", total=None)
        result = measure(
            trained, rows, lambda done, of: bars.update(task, completed=done, total=of)
        )
    if as_json:
        passed_over = passed_over_json(trained.chosen)
        print_json(dataclasses.asdict(result) | {"passed_over": passed_over})
        return
    typer.echo(f"step           {result.step}")
    typer.echo(f"held-out loss  {result.loss:.4f} nats per token")
    typer.echo(f"perplexity     {result.perplexity:.2f}")
    typer.echo(f"bits per byte  {result.bits_per_byte:.4f}")
    typer.echo(f"measured on    {result.tokens:,} tokens, {result.bytes:,} bytes")
    for name, loss in result.loss_by_source.items() if len(result.loss_by_source) > 1 else ():
        typer.echo(f"  {name}: {loss:.4f}")


def generate(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN_URL|DIR", help="A run, or a directory that `export` wrote."),
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="What to continue.", show_default=False)
    ],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Maximum number of new tokens.")
    ] = 200,
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="T", min=0.0, help="0 takes the most likely token."),
    ] = 0.8,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k",
            metavar="K",
            min=0,
            help="Choose among the K most likely tokens; 0 takes all.",
        ),
    ] = 50,
    seed: Annotated[
        int, typer.Option("--seed", metavar="S", min=0, max=2**63 - 1, help="Same seed, same text.")
    ] = 0,
    step: Step = None,
    data_url: DataUrl = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text with a trained model; prints prompt and continuation.

    Examples:
    elastic-pt generate runs/first --prompt "Once upon a time"
    elastic-pt generate model/ --prompt "def " --max-tokens 50 --temperature 0
    """
    from elastic_pt.report.artifacts import Sampling, continue_text, open_exported

    directory = Path(source)
    if "://" not in source and (directory / "config.json").is_file():
        if step is not None:
            raise typer.BadParameter(
                f"--step {step}: an exported directory has only one step; expected a run URL, or no --step"
            )
        if data_url is not None:
            raise typer.BadParameter(
                f"--data {data_url}: an exported directory has its own tokenizer; "
                "expected a run URL, or no --data"
            )
        model, found, passed_over = open_exported(directory), None, []
    else:
        trained = _trained(source, step, data_url)
        model, found = trained.text_model(), trained.chosen.manifest.step
        passed_over = passed_over_json(trained.chosen)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)
    continuation = continue_text(model, prompt, sampling)
    if as_json:
        found_json = {"step": found, "prompt": prompt, "continuation": continuation}
        print_json(found_json | {"passed_over": passed_over})
    else:
        typer.echo(prompt + continuation)


def export(
    run_url: RunUrl,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="A new or empty directory.", show_default=False),
    ],
    step: Step = None,
    data_url: DataUrl = None,
    as_json: AsJson = False,
) -> None:
    """Write the model as a directory that Hugging Face transformers loads, with the same bits.

    Examples:
    elastic-pt export runs/first --out model
    elastic-pt export s3://bucket/run --step 2000 --out model
    """
    from elastic_pt.report.artifacts import export as write

    require_new_directory(out)
    trained = _trained(run_url, step, data_url)
    try:
        write(trained, out)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be written: {error.strerror or error}; expected a new directory "
            "that this user may create, with room for the weights"
        ) from error
    step = trained.chosen.manifest.step
    if as_json:
        passed_over = passed_over_json(trained.chosen)
        print_json({"step": step, "directory": str(out.resolve()), "passed_over": passed_over})
    else:
        typer.echo(f"wrote step {step} to {out}")
