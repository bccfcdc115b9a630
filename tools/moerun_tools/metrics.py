"""moe-metrics: says whether a model suits expert offloading, from traces of its routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moerun_tools.command import GroupedOption, ToolCommand, version_option, write_out

if TYPE_CHECKING:
    from moerun_tools.metrics_compute import Progress, Settings
    from moerun_tools.metrics_results import TraceMetrics

_Function = TypeVar("_Function", bound=Callable[..., Any])

_FORMATS = ("png", "svg")
_MAX_LENGTH = 1 << 20

_EPILOG = """\b
Examples:
  moe-metrics trace.safetensors                  a table and a verdict
  moe-metrics trace.safetensors -o results       also figures, parquet and report.html
  moe-metrics olmoe.safetensors mixtral/ -o out  two traces, side by side
  moe-metrics trace.safetensors --segment-lengths 8,16,32 --bootstrap 0
  moe-metrics trace.safetensors --json | jq .traces[0].verdict

\b
A TRACE is a file that moe-trace wrote, one of its shards, or a folder with one trace.

\b
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 ended by Ctrl-C, 143 by SIGTERM.
"""


def _lengths(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Return segment lengths without repetitions, shortest first."""
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 9 for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 4,16,64.")
    lengths = sorted({int(part) for part in parts})
    if not 1 <= lengths[0] <= lengths[-1] <= _MAX_LENGTH:
        raise click.BadParameter(f"{value!r}: lengths go from 1 to {_MAX_LENGTH}.")
    return tuple(lengths)


def _formats(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    """Return formats of figures without repetitions."""
    if value is None:
        return None
    formats = [part.strip().lower() for part in value.split(",")]
    for part in formats:
        if part not in _FORMATS:
            raise click.BadParameter(f"{part!r} is not one of {', '.join(_FORMATS)}.")
    return tuple(dict.fromkeys(formats))


def _folder(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    """Return the folder; an empty name, as of an unset variable, is not the current one."""
    if value == "":
        raise click.BadParameter("the name is empty.")
    return None if value is None else Path(value)


def _option(group: str, *names: str, **attributes: Any) -> Callable[[_Function], _Function]:
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


@click.command(
    name="moe-metrics",
    cls=ToolCommand,
    epilog=_EPILOG,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
)
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...")
@_option(
    "Metrics",
    "--segment-lengths",
    metavar="M,M,...",
    callback=_lengths,
    default="4,16,64,256",
    help="Window lengths in tokens; those longer than every sequence are left out.",
)
@_option(
    "Metrics",
    "--bootstrap",
    metavar="N",
    type=click.IntRange(min=0, max=1_000_000),
    default=1000,
    help="Resamplings for the 95% intervals; 0 for none.",
)
@_option(
    "Metrics",
    "--seed",
    metavar="N",
    type=click.IntRange(min=0, max=2**64 - 1),
    default=0,
    help="Seed of the resampling.",
)
@_option(
    "Metrics",
    "--threads",
    metavar="N",
    type=click.IntRange(min=1, max=1024),
    help="CPU threads.  [default: one a core]",
)
@_option(
    "Output",
    "-o",
    "--output",
    metavar="DIR",
    callback=_folder,
    help="Write parquet tables, metrics.json, figures and report.html to DIR.",
)
@_option("Output", "--overwrite", is_flag=True, help="Write to DIR even if it holds other files.")
@_option("Output", "--no-figures", is_flag=True, help="Draw nothing; the report has tables only.")
@_option(
    "Output",
    "--format",
    "formats",
    metavar="LIST",
    callback=_formats,
    help="Formats of the figures.  [default: png,svg]",
)
@_option(
    "Output", "--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."
)
@_option("Output", "-q", "--quiet", is_flag=True, help="No progress bar and no closing line.")
@version_option("moe-metrics")
def main(
    traces: tuple[str, ...],
    segment_lengths: tuple[int, ...],
    bootstrap: int,
    seed: int,
    threads: int | None,
    output: Path | None,
    overwrite: bool,
    no_figures: bool,
    formats: tuple[str, ...] | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how local the expert routing in each TRACE is, and what a cache would bring.

    Prints a table and a verdict: whether the model suits having only a part of its experts in
    fast memory, and how large that part should be. Several traces are compared.
    """
    given = {"--overwrite": overwrite, "--no-figures": no_figures, "--format": formats is not None}
    for name, is_given in given.items():
        if is_given and output is None:
            raise click.UsageError(f"{name} needs --output.")
    if no_figures and formats is not None:
        raise click.UsageError("--no-figures and --format exclude each other.")

    # Imported here, so that --help and wrong usage answer at once.
    _check_installed("polars", *([] if output is None or no_figures else ["matplotlib"]))
    from moerun_tools.metrics_compute import Progress, Settings, compute, open_traces, stages
    from moerun_tools.metrics_files import check_folder, data_files, install, summary
    from moerun_tools.metrics_results import best_first
    from moerun_tools.metrics_table import comparison_table, trace_table
    from moerun_tools.report import json_line

    settings = Settings(segment_lengths, bootstrap, seed, threads)
    if output is not None:
        check_folder(output, overwrite)
    opened = open_traces(traces)
    wants_details = output is not None or as_json
    num_steps = len(opened) * (len(stages(wants_details)) + 1) + (0 if output is None else 12)
    with Progress(num_steps, quiet) as progress:
        results = best_first(
            [
                compute(label, trace, settings, progress, with_details=wants_details)
                for label, trace in opened
            ]
        )
        warnings = list(dict.fromkeys(text for result in results for text in result.warnings))
        chosen = _as_dict(settings)
        values = summary(results, chosen, warnings)
        files: dict[str, bytes] = {}
        if output is not None:
            drawn = () if no_figures else (formats or _FORMATS)
            files = data_files(results, values)
            files |= _pictures_and_report(results, drawn, chosen, warnings, progress)
            install(files, output)
    for text in warnings:
        click.echo(f"moe-metrics: warning: {text}", err=True)
    if as_json:
        write_out(json_line(values))
    elif len(results) == 1:
        write_out(trace_table(results[0]) + "\n\n" + _verdicts(results))
    else:
        write_out(comparison_table(results) + "\n\n" + _verdicts(results))
    if output is not None and not quiet:
        click.echo(f"wrote {len(files)} files; look at {output / 'report.html'}", err=True)


def _check_installed(*packages: str) -> None:
    from importlib.util import find_spec

    from moerun.errors import MoerunError

    for package in packages:
        if find_spec(package) is None:
            instead = ", or give --no-figures" if package == "matplotlib" else ""
            raise MoerunError(f"{package} is not installed: pip install {package}{instead}")


def _as_dict(settings: Settings) -> dict[str, Any]:
    """Return what the results depend on: not the threads."""
    return {
        "segment_lengths": list(settings.segment_lengths),
        "bootstrap": settings.bootstrap,
        "seed": settings.seed,
    }


def _verdicts(results: Sequence[TraceMetrics]) -> str:
    """Return a paragraph for each verdict."""
    from moerun_tools.metrics_results import clean_text

    paragraphs = []
    for result in results:
        prefix = "verdict" if len(results) == 1 else result.label
        if result.verdict is None:
            paragraphs.append(f"{prefix}: none, its sequences are too short")
        else:
            paragraphs.append(clean_text(f"{prefix}: {result.verdict.summary()}", 2000))
    return "\n".join(paragraphs) + "\n"


def _pictures_and_report(
    results: list[TraceMetrics],
    formats: Sequence[str],
    settings: dict[str, Any],
    warnings: list[str],
    progress: Progress,
) -> dict[str, bytes]:
    """Return the figures in all formats, and the report with them in it."""
    from moerun_tools.report_html import report

    files: dict[str, bytes] = {}
    pictures: dict[str, str] = {}
    notes = list(warnings)
    if formats:
        from moerun_tools.figures import FIGURES, inline_svg, render
        from moerun_tools.figures.style import MOST_PANELS

        for name in FIGURES:
            progress.start(f"figure {name}")
            drawn = render(name, results, [*formats, "svg"])
            if drawn is None:
                continue
            pictures[name] = inline_svg(name, drawn["svg"])
            files |= {f"figures/{name}.{kind}": drawn[kind] for kind in formats}
        if len(results) > MOST_PANELS:
            notes.append(f"Pictures with a panel for each trace show the best {MOST_PANELS}.")
    else:
        notes.append("Figures: switched off by --no-figures.")
    progress.start("report")
    files["report.html"] = report(results, pictures, settings, notes).encode()
    return files


if __name__ == "__main__":
    main(prog_name="moe-metrics")
