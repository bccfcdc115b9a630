"""moe-plan: how much memory the experts of a model should have, and what would come of it."""

from __future__ import annotations

from typing import Any

import click

from moerun_tools.plan_curve import curve_command
from moerun_tools.plan_make import make_command
from moerun_tools.plan_simulate import simulate_command

_EPILOG = """\b
Examples:
  moe-trace record --with-prefetch -o t.safetensors      the routing of the shipped model
  moe-plan curve --trace t.safetensors --link-gb-per-s 1.5 --token-ms 2
  moe-plan make --trace t.safetensors --budget 40% --costs costs.json -o plan.json
  moe-plan simulate --trace t.safetensors --plan plan.json --costs costs.json
  moe-run --plan plan.json "import os"
  moe-plan COMMAND --help                                examples of each command

\b
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 ended by Ctrl-C.
"""


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from moerun import __version__

        click.echo(f"moe-plan {__version__}")
        ctx.exit()


@click.group(
    name="moe-plan",
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
def main(**_: Any) -> None:
    """Say from a trace what a cache of experts would bring, and plan one. Loads no weights."""


main.add_command(make_command)
main.add_command(simulate_command)
main.add_command(curve_command)


if __name__ == "__main__":
    main(prog_name="moe-plan")
