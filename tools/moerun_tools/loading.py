"""Loads the model of a command line, with a progress bar."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm  # type: ignore[import-untyped]

from moerun import Model
from moerun.errors import MoerunWarning


def load_model(directory: Path, quiet: bool, **options: Any) -> Model:
    """Load the model in `directory` and show how far it is, on standard error.

    At a terminal the bar is there from the start; elsewhere only if loading takes longer than a
    second, and then with few lines.
    """
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    with tqdm(
        desc="loading",
        unit="iB",
        unit_scale=True,
        unit_divisor=1024,
        delay=0 if is_terminal else 1,
        mininterval=0.1 if is_terminal else 5,
        leave=False,
        disable=quiet or sys.stderr is None,
    ) as bar:
        is_packing = bool(options.get("pack"))

        def show(bytes_done: int, bytes_total: int) -> None:
            nonlocal is_packing
            if bar.total is not None and bytes_total != bar.total:
                # A record file is written, or experts that a plan names come into the cache.
                # A bar that is off has no description: nothing may be read from it.
                bar.set_description_str(
                    "packing experts" if is_packing else "warming the cache", refresh=False
                )
                is_packing = False
                bar.n = bar.last_print_n = 0
            bar.total = bytes_total
            bar.update(bytes_done - bar.n)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MoerunWarning)
            model = Model.load(directory, progress=show, **options)
    for each in caught:
        if issubclass(each.category, MoerunWarning):
            click.echo(f"warning: {each.message}", err=True)
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return model
