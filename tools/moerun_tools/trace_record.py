"""moe-trace record: runs a model over text and writes which experts its tokens used."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from moerun_tools import interrupts
from moerun_tools.cache_options import cache_arguments, cache_options
from moerun_tools.command import FiniteFloat, ToolCommand, write_out
from moerun_tools.trace_options import (
    CACHE_OPTIONS,
    CONTEXT_SETTINGS,
    MAX_NUMBER,
    Progress,
    Size,
    option,
)

_EPILOG = """\b
Examples:
  moe-trace record -o trace.safetensors
  moe-trace record -m allenai/OLMoE-1B-7B-0924 --data code=src --data wiki=w.jsonl -o o.safetensors
  moe-trace record -m Qwen/Qwen3-30B-A3B --expert-budget 6GiB --data chat=c.parquet -o q.safetensors
  moe-trace record --data ids=tokens.npy --length 128 -o n.safetensors     token ids, no text
  moe-trace record --generate 128 --length 64 --samples 8 -o decode.safetensors
  moe-trace record --generate 64 --expert-budget 25% --cache-events -o cache.safetensors
  moe-trace record -o trace.safetensors --resume     go on after Ctrl-C

\b
Any model of Hugging Face transformers (pip install torch transformers):
  moe-trace record --engine transformers -m ibm/PowerMoE-3b --data code=src -o p.safetensors
  moe-trace record --engine transformers --random-init --layers 4 -m config.json \\
      --random-tokens -o r.safetensors

\b
Data are JSON lines (*.jsonl, *.ndjson), *.json, *.csv, *.tsv, *.parquet (--text-field names the
text), *.npy (token ids), or any other file as UTF-8 text; text formats may be packed by gzip.
Of a .npy with two dimensions, rows of exactly --length tokens are sequences as they are; other
rows are documents, which stand one after the other and are cut into sequences.
"""


@click.command(
    "record",
    cls=ToolCommand,
    short_help="Run a model over text and write a trace.",
    epilog=_EPILOG,
    context_settings=CONTEXT_SETTINGS,
)
@option(
    "Data",
    "--data",
    metavar="NAME=FILE_OR_DIR",
    multiple=True,
    help="A domain and its texts; may be given more than once.  [default: library sources and "
    "manual of this Python, as the domains python and english]",
)
@option("Data", "--random-tokens", is_flag=True, help="Random token ids, as the domain random.")
@option(
    "Data",
    "--text-field",
    metavar="NAME",
    default="text",
    help="Field or column that holds the text.",
)
@option("Data", "--skip-bad", is_flag=True, help="Skip files that are empty or cannot be read.")
@option(
    "Data",
    "--length",
    metavar="N",
    type=click.IntRange(min=1, max=MAX_NUMBER),
    default=512,
    help="Tokens of a sequence; of the prompt, with --generate.",
)
@option(
    "Data",
    "--samples",
    metavar="N",
    type=click.IntRange(min=1, max=MAX_NUMBER),
    default=64,
    help="Most sequences of a domain.",
)
@option(
    "Data",
    "--seed",
    metavar="N",
    type=click.IntRange(min=0, max=2**64 - 1),
    default=0,
    help="Seed for the order of files, sampling, random weights and random tokens.",
)
@option(
    "Model",
    "-m",
    "--model",
    metavar="MODEL",
    help="Directory or Hugging Face repository id.  [default: the shipped tiny-olmoe]",
)
@option(
    "Model",
    "--engine",
    type=click.Choice(["native", "transformers"]),
    default="native",
    help="What runs the model: moerun itself, or Hugging Face transformers.",
)
@option(
    "Model",
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where the model runs.",
)
@option(
    "Model",
    "--threads",
    metavar="N",
    type=click.IntRange(min=1, max=MAX_NUMBER),
    help="CPU threads.  [default: one a core]",
)
@option(
    "Engine transformers",
    "--random-init",
    is_flag=True,
    help="Random weights; MODEL may then be a config.json alone.",
)
@option(
    "Engine transformers",
    "--layers",
    metavar="N",
    type=click.IntRange(min=1, max=MAX_NUMBER),
    help="With --random-init: only so many layers.",
)
@option(
    "Engine transformers",
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="Number format of the weights; auto for that of the model's files.",
)
@option(
    "Engine transformers",
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that the model brings along.",
)
@cache_options
@option(
    "Expert cache",
    "--cache-events",
    is_flag=True,
    help="Also record hits, misses and loads; needs --generate and an expert budget.",
)
@option(
    "Recording",
    "--generate",
    metavar="N",
    type=click.IntRange(min=0, max=MAX_NUMBER),
    default=0,
    help="Decode N tokens after each sequence and record those instead.",
)
@option(
    "Recording",
    "--temperature",
    metavar="X",
    type=FiniteFloat(min=0),
    default=0.0,
    help="Of --generate: above 0, sample instead of taking the likeliest token.",
)
@option("Recording", "--weights", is_flag=True, help="Also record the experts' weights.")
@option("Recording", "--logits", is_flag=True, help="Also record all router logits.")
@option(
    "Recording",
    "--predictions/--no-predictions",
    default=True,
    help="Record the likeliest next token after each.",
)
@option(
    "Recording",
    "--with-prefetch",
    is_flag=True,
    help="Also record the prefetcher's guesses (for moe-plan).",
)
@option(
    "Output",
    "-o",
    "--output",
    metavar="FILE",
    required=True,
    help="The trace, *.safetensors; NAME-encoder and NAME-decoder for a model that has both.",
)
@option("Output", "--resume", is_flag=True, help="Go on with a trace that was interrupted.")
@option("Output", "--overwrite", is_flag=True, help="Replace a trace that is there.")
@option(
    "Output",
    "--shard-size",
    metavar="SIZE",
    type=Size(),
    default="256MiB",
    help="Begin a new file after this much.",
)
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@option("Output", "-q", "--quiet", is_flag=True, help="No progress bar and no closing line.")
def record_command(
    data: tuple[str, ...],
    random_tokens: bool,
    text_field: str,
    skip_bad: bool,
    length: int,
    samples: int,
    seed: int,
    output: str,
    resume: bool,
    overwrite: bool,
    shard_size: int,
    as_json: bool,
    quiet: bool,
    generate: int,
    temperature: float,
    weights: bool,
    logits: bool,
    predictions: bool,
    with_prefetch: bool,
    **model_options: Any,
) -> None:
    """Run a model over text and write which experts every token used.

    Each sequence is given to the model as a whole (prefill); with --generate it is the prompt of
    new tokens, and those are recorded (decode). Ctrl-C and SIGTERM leave a valid trace of what was
    done; after a crash, --resume goes on with all but the last seconds.
    """
    domains = _parse_domains(data, random_tokens)
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other.")
    if temperature > 0 and not generate:
        raise click.UsageError("--temperature needs --generate.")
    if with_prefetch and model_options["engine"] != "native":
        raise click.UsageError("--with-prefetch needs --engine native.")
    _check_model_options(generate, **model_options)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # of a download

    # Imported here, so that --help and wrong usage answer at once.
    from moerun.recording import (
        RecordingInterrupted,
        RecordingSummary,
        TraceOptions,
        check_output,
        record,
    )
    from moerun_tools.trace_engines import open_engine
    from moerun_tools.trace_summary import closing_lines, failure_line, summary_object

    check_output(output, resume=resume, overwrite=overwrite)
    sources = _sources(domains, random_tokens, text_field, skip_bad, seed, quiet)
    is_interrupted = False
    with open_engine(tokens=length + generate, seed=seed, quiet=quiet, **model_options) as engine:
        with Progress("recording", "tok", quiet) as progress:

            def show_failure(summary: RecordingSummary) -> None:
                progress.close()
                click.echo(failure_line(summary), err=True)

            try:
                summary = record(
                    engine,
                    sources,
                    output,
                    length=length,
                    samples=samples,
                    seed=seed,
                    options=TraceOptions(
                        generate, temperature, weights, logits, predictions, with_prefetch
                    ),
                    shard_bytes=shard_size,
                    resume=resume,
                    overwrite=overwrite,
                    progress=progress.show,
                    on_failure=show_failure,
                )
            except RecordingInterrupted as interrupt:
                summary, is_interrupted = interrupt.summary, True
        notes = engine.notes()
    if as_json:
        write_out(summary_object(summary, notes, is_interrupted))
    if is_interrupted or not (as_json or quiet):
        for line in closing_lines(summary, notes, is_interrupted):
            click.echo(line, err=is_interrupted)
    if is_interrupted:
        sys.exit(interrupts.exit_code())


def _parse_domains(data: tuple[str, ...], random_tokens: bool) -> dict[str, str]:
    """Return the path of each domain."""
    domains: dict[str, str] = {}
    for text in data:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise click.UsageError(f"--data needs NAME=FILE_OR_DIR, not {text!r}.")
        if name in domains or (name == "random" and random_tokens):
            raise click.UsageError(f"--data: there are two domains with the name {name!r}.")
        domains[name] = path
    return domains


def _check_model_options(generate: int, **options: Any) -> None:
    """Refuse options that the chosen engine does not have."""
    is_native = options["engine"] == "native"
    for name in ("random_init", "layers", "trust_remote_code"):
        if is_native and options[name]:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --engine transformers.")
    if is_native and options["dtype"] != "auto":
        raise click.UsageError("--dtype needs --engine transformers.")
    if options["layers"] and not options["random_init"]:
        raise click.UsageError("--layers needs --random-init.")
    for name in ("expert_budget", "policy", "split", "prefetch", "plan", "pack", "cache_events"):
        if not is_native and options[name]:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --engine native.")
    if options["cache_events"] and not generate:
        raise click.UsageError("--cache-events needs --generate.")
    cache_arguments(*(options[name] for name in CACHE_OPTIONS))


def _sources(
    domains: dict[str, str],
    random_tokens: bool,
    text_field: str,
    skip_bad: bool,
    seed: int,
    quiet: bool,
) -> list[Any]:
    """Return the data: what is named, else what every Python has."""
    from moerun.recording import FileData, RandomTokens, default_data

    def warn(message: str) -> None:
        if not quiet:
            click.echo(message, err=True)

    sources: list[Any] = [
        FileData.open(name, path, seed=seed, text_field=text_field, skip_bad=skip_bad, warn=warn)
        for name, path in domains.items()
    ]
    if random_tokens:
        sources.append(RandomTokens(seed))
    return sources or default_data(seed)
