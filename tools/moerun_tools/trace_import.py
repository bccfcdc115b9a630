"""moe-trace import: turns the router dumps of the study into a trace."""

from __future__ import annotations

import sys

import click

from moerun_tools import interrupts
from moerun_tools.command import ToolCommand, write_out
from moerun_tools.trace_options import CONTEXT_SETTINGS, MAX_NUMBER, Progress, Size, option

_EPILOG = """\b
Examples:
  moe-trace import dumps/ --top-k 8 -o olmoe.safetensors
  moe-trace import dumps/mixtral_*.safetensors --top-k 2 -o mixtral.safetensors
"""


@click.command(
    "import",
    cls=ToolCommand,
    short_help="Turn router dumps of the study into a trace.",
    epilog=_EPILOG,
    context_settings=CONTEXT_SETTINGS,
)
@click.argument("paths", nargs=-1, required=True, metavar="FILE_OR_DIR...")
@option(
    "Dumps",
    "--top-k",
    metavar="K",
    type=click.IntRange(min=1, max=MAX_NUMBER),
    required=True,
    help="Experts that a token uses in a layer.",
)
@option("Dumps", "-m", "--model", metavar="NAME", help="Which model, if there are several.")
@option("Dumps", "--logits", is_flag=True, help="Keep the router logits in the trace.")
@option("Output", "-o", "--output", metavar="FILE", required=True, help="The trace, *.safetensors.")
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
def import_command(
    paths: tuple[str, ...],
    top_k: int,
    model: str | None,
    logits: bool,
    output: str,
    overwrite: bool,
    shard_size: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a trace of the files {model}_{layer:02d}.safetensors of arXiv 2505.16056.

    A tensor of such a file is a domain: router logits of shape [sequences, tokens, experts]. The
    experts of a token are those with the largest logits.
    """
    from moerun.recording import check_output, import_study
    from moerun_tools.report import json_line

    def warn(message: str) -> None:
        if not quiet:
            click.echo(f"note: {message}", err=True)

    check_output(output, overwrite=overwrite, can_resume=False)
    try:
        with Progress("importing", "seq", quiet) as progress:
            files = import_study(
                paths,
                output,
                top_k=top_k,
                model=model,
                with_logits=logits,
                shard_bytes=shard_size,
                overwrite=overwrite,
                progress=progress.show,
                warn=warn,
            )
    except KeyboardInterrupt:
        click.echo("interrupted, nothing was written", err=True)
        sys.exit(interrupts.exit_code())
    if as_json:
        write_out(json_line({"files": [str(file) for file in files]}))
    elif not quiet:
        write_out(f"imported {', '.join(map(str, files))}\n")
