"""moe-predictor info: describes a predictor."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moerun_tools.command import ToolCommand, write_out
from moerun_tools.trace_options import CONTEXT_SETTINGS, option

if TYPE_CHECKING:
    from moerun.predictor import PathPredictor, PredictorInfo

_EPILOG = """\b
Examples:
  moe-predictor info predictor.safetensors
  moe-predictor info predictor.safetensors -m allenai/OLMoE-1B-7B-0924     is it of this model?
  moe-predictor info --json predictor.safetensors | jq .training.recall
"""


@click.command(
    "info",
    cls=ToolCommand,
    short_help="Describe a predictor.",
    epilog=_EPILOG,
    context_settings=CONTEXT_SETTINGS,
)
@click.argument("predictor")
@option(
    "Input",
    "-m",
    "--model",
    metavar="MODEL",
    help="Directory or Hugging Face repository id that it must be of.  [default: any]",
)
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")
def info_command(predictor: str, model: str | None, as_json: bool) -> None:
    """Check all of PREDICTOR, and say what it is of and how it was trained."""
    from moerun.predictor import PathPredictor
    from moerun_tools.report import json_line

    opened = PathPredictor.open(predictor, model, threads=1)
    facts = _facts(opened)
    write_out(json_line(facts) if as_json else _as_text(opened.info, facts))


def _facts(opened: PathPredictor) -> dict[str, Any]:
    info = opened.info
    return {
        "file": str(opened.path),
        "bytes": Path(opened.path).stat().st_size,
        "model": info.model,
        "model_id": info.model_id,
        "tokenizer_hash": info.tokenizer_hash,
        "vocab_size": info.vocab_size,
        "moe_layers": list(info.moe_layers),
        "num_experts": info.num_experts,
        "top_k": info.top_k,
        "shape": asdict(info.shape),
        "num_parameters": info.num_parameters,
        "memory_bytes": opened.memory_bytes,
        "state_bytes": opened.state().bytes,
        "trained_sequences": len(info.trained_sequences),
        "training": info.training,
    }


def _as_text(info: PredictorInfo, facts: dict[str, Any]) -> str:
    """Return the description for people: a word on each line, then what it is."""
    from moerun_tools.trace_info import plain, ranges
    from moerun_tools.units import as_binary, counted

    layers, shape, training = info.moe_layers, info.shape, info.training
    rows = [
        ("model", f"{info.model} ({info.model_id})"),
        (
            "experts",
            f"{info.top_k} of {info.num_experts} a token, in {counted(len(layers), 'layer')} "
            f"({ranges(list(layers))}), {info.vocab_size:,} token ids",
        ),
        (
            "net",
            f"{info.num_parameters:,} parameters: {counted(shape.num_blocks, 'block')} of "
            f"{shape.hidden_size}, {counted(shape.num_heads, 'head')}, MLP {shape.mlp_size}, "
            f"embedding {shape.embedding_size}, sees {counted(shape.window, 'token')}",
        ),
        (
            "size",
            f"{as_binary(facts['bytes'])} on disk, {as_binary(facts['memory_bytes'])} in memory, "
            f"{as_binary(facts['state_bytes'])} a sequence",
        ),
    ]
    if isinstance(training.get("tokens"), int) and isinstance(training.get("domains"), list):
        text = (
            f"{counted(training['tokens'], 'token')} of {', '.join(map(str, training['domains']))}"
        )
        rows.append(("trained", f"{text}, seed {training.get('seed')}"))
    if isinstance(training.get("recall"), float):
        loss = training.get("validation_loss")
        rows.append(("held out", f"recall {100 * training['recall']:.1f} %, loss {loss}"))
    return "".join(f"{name:<9} {plain(text)}\n" for name, text in rows)
