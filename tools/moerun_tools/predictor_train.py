"""moe-predictor train: makes a predictor from traces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from moerun_tools.command import FiniteFloat, ToolCommand, write_out
from moerun_tools.trace_options import CONTEXT_SETTINGS, option

if TYPE_CHECKING:
    from moerun.predictor import TrainingProgress, TrainingResult

_EPILOG = """\b
Examples:
  moe-predictor train t.safetensors -o predictor.safetensors
  moe-predictor train code.safetensors wiki.safetensors -m allenai/OLMoE-1B-7B-0924 -o p.safetensors
  moe-predictor train t.safetensors --domain python -o python.safetensors     learn from this alone
  moe-predictor train t.safetensors --max-steps 50 --hidden 64 -o quick.safetensors

\b
A few hundred thousand tokens of the kind of text that the model will see are enough to be of use,
more are better. Of each domain a share of the sequences is held out: they tell when to stop, and
moe-predictor eval can measure on them. Ctrl-C leaves no file, or the one that was there.
"""


@click.command(
    "train",
    cls=ToolCommand,
    short_help="Make a predictor from traces.",
    epilog=_EPILOG,
    context_settings=CONTEXT_SETTINGS,
)
@click.argument("traces", metavar="TRACE...", nargs=-1, required=True)
@option(
    "Input",
    "-m",
    "--model",
    metavar="MODEL",
    help="Model that the traces were recorded with: directory or Hugging Face repository id.  "
    "[default: the shipped tiny-olmoe]",
)
@option(
    "Input",
    "--domain",
    "domains",
    metavar="NAME",
    multiple=True,
    help="Learn from this domain alone; may be given more than once.  [default: all]",
)
@option(
    "Training",
    "--seed",
    metavar="N",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=0,
    help="Seed for the first weights, the held-out sequences and the order.",
)
@option(
    "Training",
    "--epochs",
    metavar="N",
    type=click.IntRange(1, 10_000),
    default=12,
    help="Passes over the sequences, at most.",
)
@option(
    "Training",
    "--max-steps",
    metavar="N",
    type=click.IntRange(1, 10**9),
    help="Steps of 4,096 tokens, at most.  [default: what the epochs need]",
)
@option(
    "Training",
    "--held-out",
    metavar="SHARE",
    type=FiniteFloat(0, 0.9, min_open=True),
    default=0.1,
    help="Share of the sequences that is not learned from.",
)
@option(
    "Training",
    "--patience",
    metavar="N",
    type=click.IntRange(1, 10_000),
    default=3,
    help="End training after N epochs without progress on these sequences.",
)
@option(
    "Training",
    "--threads",
    metavar="N",
    type=click.IntRange(min=1),
    help="CPU threads.  [default: one a core]",
)
@option("Net", "--hidden", "hidden_size", metavar="N", type=click.IntRange(32, 8192), help="Width.")
@option("Net", "--blocks", "num_blocks", metavar="N", type=click.IntRange(1, 32), help="Blocks.")
@option(
    "Net",
    "--heads",
    "num_heads",
    metavar="N",
    type=click.IntRange(min=1),
    help="Attention heads.",
)
@option(
    "Net",
    "--mlp",
    "mlp_size",
    metavar="N",
    type=click.IntRange(32, 32768),
    help="MLP width.",
)
@option(
    "Net",
    "--embedding",
    "embedding_size",
    metavar="N",
    type=click.IntRange(32, 8192),
    help="Numbers kept for each token id.",
)
@option(
    "Net",
    "--window",
    metavar="N",
    type=click.IntRange(1, 4096),
    help="Tokens that attention sees.  All of these: see docs/predictor.md for what is left out.",
)
@option("Output", "-o", "--output", metavar="FILE", required=True, help="The predictor.")
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@option("Output", "-q", "--quiet", is_flag=True, help="No progress bar and no closing line.")
def train_command(
    traces: tuple[str, ...],
    model: str | None,
    domains: tuple[str, ...],
    output: str,
    as_json: bool,
    quiet: bool,
    threads: int | None,
    seed: int,
    epochs: int,
    max_steps: int | None,
    held_out: float,
    patience: int,
    **sizes: Any,
) -> None:
    """Learn from TRACEs which experts tokens use.

    Needs PyTorch: pip install 'moerun[predictor]'.
    """
    if not output:
        raise click.UsageError("--output needs a name that is not empty.")

    # Imported here, so that --help and wrong usage answer at once.
    from moerun.identity import ModelIdentity
    from moerun.predictor import default_shape, train
    from moerun.predictor.sequences import opened_traces
    from moerun.user_files import user_path
    from moerun_tools.output_file import check_target
    from moerun_tools.report import json_line

    opened = opened_traces(traces)
    check_target(user_path(output), [file for each in opened for file in each.files])
    outputs = len(opened[0].moe_layers) * opened[0].num_experts
    shape = default_shape(ModelIdentity(model).vocab_size, outputs, **sizes)
    with _Bar(quiet) as bar:
        result = train(
            opened,
            output,
            model=model,
            domains=domains or None,
            shape=shape,
            seed=seed,
            epochs=epochs,
            max_steps=max_steps,
            held_out=held_out,
            patience=patience,
            threads=threads,
            progress=bar.show,
        )
    if as_json:
        write_out(json_line(_facts(result)))
    elif not quiet:
        write_out(_closing_line(result))


class _Bar:
    """The progress bar of the tools, with losses behind it."""

    def __init__(self, quiet: bool) -> None:
        from moerun_tools.trace_options import Progress

        self._bar = Progress("training", "step", quiet)

    def show(self, progress: TrainingProgress) -> None:
        notes = []
        if progress.loss is not None:
            notes.append(f"loss {progress.loss:.4f}")
        if progress.validation_loss is not None and progress.recall is not None:
            notes.append(f"held out {progress.validation_loss:.4f}")
            notes.append(f"recall {100 * progress.recall:.1f} %")
        self._bar.note(", ".join(notes))
        self._bar.show(progress.step, progress.steps)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


def _facts(result: TrainingResult) -> dict[str, Any]:
    from dataclasses import asdict

    info = result.info
    return {
        "file": str(result.path),
        "model": info.model,
        "num_parameters": info.num_parameters,
        "shape": asdict(info.shape),
        "training": info.training,
        "seconds": result.seconds,
        "stopped_early": result.stopped_early,
    }


def _closing_line(result: TrainingResult) -> str:
    from moerun_tools.units import as_seconds, counted

    training = result.info.training
    early = ", ended early" if result.stopped_early else ""
    tokens, epochs = counted(training["tokens"], "token"), counted(training["epochs"], "epoch")
    return (
        f"trained {result.info.num_parameters:,} parameters on {tokens} in "
        f"{as_seconds(result.seconds)} ({epochs}{early}): held-out recall "
        f"{100 * training['recall']:.1f} %, loss {training['validation_loss']:.4f}: {result.path}\n"
    )
