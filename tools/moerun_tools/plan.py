"""moe-plan: how much memory the experts of a model should have, and what would come of it."""

from __future__ import annotations

from typing import Any

import click

from moerun_tools.command import version_option
from moerun_tools.plan_calibrate import calibrate_command
from moerun_tools.plan_curve import curve_command
from moerun_tools.plan_make import make_command
from moerun_tools.plan_simulate import simulate_command

_EPILOG = """\b
Examples:
  moe-trace record --with-prefetch -o t.safetensors      the routing of the shipped model
  moe-plan calibrate                                     once for each machine and model
  moe-plan curve --trace t.safetensors
  moe-plan make --trace t.safetensors --budget 40% -o plan.json
  moe-plan simulate --trace t.safetensors --plan plan.json
  moe-run --plan plan.json "import os"
  moe-plan COMMAND --help                                examples of each command

\b
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 ended by Ctrl-C, 143 by SIGTERM.
"""


@click.group(
    name="moe-plan",
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@version_option("moe-plan")
def main(**_: Any) -> None:
    """Say from a trace what a cache of experts would bring, and plan one.

    Only calibrate loads weights.
    """


main.add_command(calibrate_command)
main.add_command(make_command)
main.add_command(simulate_command)
main.add_command(curve_command)


if __name__ == "__main__":
    main(prog_name="moe-plan")
