"""moe-trace: records which experts every token used."""

from __future__ import annotations

from typing import Any

import click

from moerun_tools.command import version_option
from moerun_tools.trace_import import import_command
from moerun_tools.trace_info import info_command
from moerun_tools.trace_record import record_command

_EPILOG = """\b
Examples:
  moe-trace record -o trace.safetensors        the shipped model, text that Python brings along
  moe-trace info trace.safetensors
  moe-metrics trace.safetensors
  moe-trace COMMAND --help                     examples of each command

\b
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 ended by Ctrl-C, 143 by SIGTERM.
"""


@click.group(
    name="moe-trace",
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@version_option("moe-trace")
def main(**_: Any) -> None:
    """Record which experts the tokens of a text use, in files that moe-metrics reads."""


main.add_command(record_command)
main.add_command(info_command)
main.add_command(import_command)


if __name__ == "__main__":
    main(prog_name="moe-trace")
