"""moe-predictor eval: measures a predictor beside simpler ways to guess."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from moerun_tools.command import ToolCommand, write_out
from moerun_tools.trace_options import CONTEXT_SETTINGS, Progress, option

if TYPE_CHECKING:
    from moerun.predictor import Evaluation

_EPILOG = """\b
Examples:
  moe-predictor eval predictor.safetensors t.safetensors
  moe-predictor eval predictor.safetensors t.safetensors other.safetensors --batch 1 --batch 64
  moe-predictor eval predictor.safetensors t.safetensors -o calibration.png
  moe-predictor eval predictor.safetensors t.safetensors --json | jq .calibration_error

\b
Sequences that the predictor was trained on are not measured, so the trace that it was trained from
measures on what was held out of it. Record with moe-trace record --with-prefetch to have the
next-layer router in the table. docs/predictor.md says what the columns are.
"""

_NAMES = {
    "path": "predictor",
    "path_batch": "by batch",
    "previous_token": "prev. token",
    "previous_layer": "prev. layer",
    "most_used": "most used",
    "next_layer_router": "next-layer router",
}


@click.command(
    "eval",
    cls=ToolCommand,
    short_help="Measure a predictor.",
    epilog=_EPILOG,
    context_settings=CONTEXT_SETTINGS,
)
@click.argument("predictor")
@click.argument("traces", metavar="TRACE...", nargs=-1, required=True)
@option(
    "Input",
    "-m",
    "--model",
    metavar="MODEL",
    help="Directory or Hugging Face repository id that the predictor must be of.  [default: any]",
)
@option(
    "Measurement",
    "--batch",
    "batch_sizes",
    metavar="N",
    type=click.IntRange(1, 4096),
    multiple=True,
    default=(1, 4, 16),
    help="Sequences that decode together; may be given more than once.",
)
@option(
    "Measurement",
    "--seed",
    metavar="N",
    type=click.IntRange(min=0),
    default=0,
    help="Seed for the order of sequences.",
)
@option(
    "Measurement",
    "--threads",
    metavar="N",
    type=click.IntRange(min=1),
    help="CPU threads.  [default: one a core]",
)
@option("Output", "-o", "--output", metavar="FILE", help="Draw the calibration to a .png or .svg.")
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")
@option("Output", "-q", "--quiet", is_flag=True, help="No progress bar.")
def eval_command(
    predictor: str,
    traces: tuple[str, ...],
    model: str | None,
    batch_sizes: tuple[int, ...],
    seed: int,
    threads: int | None,
    output: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how many of the experts that tokens of TRACEs used PREDICTOR named."""
    kind = "" if output is None else os.path.splitext(output)[1].lower().removeprefix(".")
    if output is not None and kind not in ("png", "svg"):
        raise click.UsageError(f"--output draws .png and .svg, not {output!r}.")

    # Imported here, so that --help and wrong usage answer at once.
    from moerun.predictor import PathPredictor, evaluate
    from moerun.predictor.sequences import opened_traces
    from moerun.user_files import user_path
    from moerun.whole_file import replace_file
    from moerun_tools.output_file import check_target
    from moerun_tools.report import json_line

    target = None if output is None else user_path(output)
    opened = opened_traces(traces)
    if target is not None:
        inputs: list[str | os.PathLike[str]] = [predictor]
        check_target(target, [*inputs, *(file for each in opened for file in each.files)])
    path = PathPredictor.open(predictor, model, threads=threads)
    with Progress("measuring", "sequence", quiet) as bar:
        found = evaluate(path, opened, batch_sizes=batch_sizes, seed=seed, progress=bar.show)
    if target is not None:
        from moerun_tools.figures import draw
        from moerun_tools.figures.calibration import calibration_figure

        replace_file(target, draw(lambda: calibration_figure(found, path.info.model), kind))
    if as_json:
        write_out(json_line(_facts(found, str(path.path))))
        return
    write_out(_as_text(found) + ("" if output is None else f"calibration: {output}\n"))


def _facts(found: Evaluation, file: str) -> dict[str, Any]:
    return {
        "predictor": file,
        "num_sequences": found.num_sequences,
        "num_tokens": found.num_tokens,
        "num_skipped": found.num_skipped,
        "domains": [
            {"name": name, "num_sequences": count, "in_domain": name in found.trained_domains}
            for name, count in found.domains.items()
        ],
        "trained_domains": found.trained_domains,
        "baselines_from": found.baselines_from,
        "recall": found.recall.to_dicts(),
        "calibration": found.calibration.to_dicts(),
        "calibration_error": found.calibration_error,
        "left_out": found.left_out,
    }


def _as_text(found: Evaluation) -> str:
    """Return tables: all layers together for every batch size and domain, then each layer."""
    from moerun_tools.plan_table import columns, percent
    from moerun_tools.units import counted

    frame = found.recall
    names = [name for name in _NAMES if name in frame["predictor"]]
    text = (
        f"{counted(found.num_sequences, 'sequence')}, {counted(found.num_tokens, 'token')}; "
        f"{found.num_skipped:,} more were trained on and are left out; baselines learned from "
        f"{'the ' if found.baselines_from == 'other half' else ''}{found.baselines_from}\n\n"
    )
    head = ("recall, %", "batch", *(_NAMES[name] for name in names), "B_acc")
    rows: list[tuple[str, ...]] = [head]
    means = {
        (row["batch_size"], row["domain"], row["predictor"]): row
        for row in frame.to_dicts()
        if row["layer"] is None
    }
    for size, domain in dict.fromkeys((size, domain) for size, domain, _ in means):
        label = "all domains" if domain is None else _label(domain, found.trained_domains)
        shares = [means.get((size, domain, name)) for name in names]
        best = means[size, domain, "path"]["batch_accuracy"]
        recalls = [percent(None if row is None else row["recall"]) for row in shares]
        rows.append((label, str(size), *recalls, percent(best)))
    text += columns(rows)
    layers = frame.filter(frame["layer"].is_not_null() & frame["domain"].is_null()).to_dicts()
    by_layer = {(row["layer"], row["batch_size"], row["predictor"]): row for row in layers}
    rows = [("by layer, %", "batch", *(_NAMES[name] for name in names), "B_acc")]
    for layer, size in dict.fromkeys((layer, size) for layer, size, _ in by_layer):
        shares = [by_layer.get((layer, size, name)) for name in names]
        recalls = [percent(None if row is None else row["recall"]) for row in shares]
        best = by_layer[layer, size, "path"]["batch_accuracy"]
        rows.append((f"layer {layer}", str(size), *recalls, percent(best)))
    text += "\n" + columns(rows)
    text += (
        f"\ncalibration: predicted probabilities are {100 * found.calibration_error:.2f} points "
        "off on average\n"
    )
    return text + "".join(f"skipped: {reason}\n" for reason in found.left_out)


def _label(domain: str, trained: list[str]) -> str:
    from moerun_tools.metrics_results import clean_text

    return clean_text(domain, 24) + ("" if domain in trained else " (not trained on)")
