"""What moe-run says on standard error when a text or a batch has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from moerun_tools.cache_report import statistics_text
from moerun_tools.report import batch_lines, closing_line


@dataclass(frozen=True)
class Closing:
    """How much is said.

    Attributes:
        quiet: no closing line.
        with_stats: statistics follow.
        with_layers: so does a table of the layers.
    """

    quiet: bool
    with_stats: bool
    with_layers: bool

    def after_text(
        self, stats: dict[str, Any], interrupted: bool = False, with_load: bool = True
    ) -> None:
        """Say how one text went; `with_load`: the statistics also tell how the model was loaded."""
        if not self.quiet:
            click.echo(closing_line(stats, interrupted), err=True)
        self._statistics(stats, with_load)

    def after_batch(
        self,
        stats: dict[str, Any],
        lines: int,
        failed: int,
        before: int,
        interrupted: bool = False,
    ) -> None:
        """Say how a batch of so many `lines` went, of which another run has done `before`."""
        if not self.quiet:
            for text in batch_lines(stats, lines, failed, before, interrupted):
                click.echo(text, err=True)
        self._statistics(stats, True)

    def _statistics(self, stats: dict[str, Any], with_load: bool) -> None:
        if self.with_stats or self.with_layers:
            click.echo(statistics_text(stats, self.with_layers, with_load), err=True)
