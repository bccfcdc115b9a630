"""moe-predictor: tells from tokens which experts they will use."""

from __future__ import annotations

from typing import Any

import click

from moerun_tools.command import version_option
from moerun_tools.predictor_eval import eval_command
from moerun_tools.predictor_info import info_command
from moerun_tools.predictor_train import train_command

_EPILOG = """\b
Examples:
  moe-trace record --with-prefetch -o t.safetensors      the routing of the shipped model
  moe-predictor train t.safetensors -o predictor.safetensors
  moe-predictor eval predictor.safetensors t.safetensors
  moe-predictor info predictor.safetensors
  moe-predictor COMMAND --help                           examples of each command

\b
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 ended by Ctrl-C, 143 by SIGTERM.
"""


@click.group(
    name="moe-predictor",
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@version_option("moe-predictor")
def main(**_: Any) -> None:
    """Train and measure predictors, which name the experts of all layers before the first runs.

    Only train needs PyTorch: pip install 'moerun[predictor]'.
    """


main.add_command(train_command)
main.add_command(eval_command)
main.add_command(info_command)


if __name__ == "__main__":
    main(prog_name="moe-predictor")
