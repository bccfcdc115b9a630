"""The loop of moe-run --interactive."""

from __future__ import annotations

import sys
from typing import Any

import click

from moerun import Model
from moerun.errors import MoerunError
from moerun_tools import interrupts
from moerun_tools.answer import Answer
from moerun_tools.cache_report import statistics_text
from moerun_tools.command import show_error, write_out
from moerun_tools.conversation import Conversation
from moerun_tools.prompt import read_line
from moerun_tools.report import speed_line


def converse(
    model: Model,
    conversation: Conversation,
    first: str | None,
    quiet: bool,
    show_stats: bool,
    name: str,
    **options: Any,
) -> None:
    """Answer line after line until "exit" or the end of standard input.

    Ctrl-C ends the answer that is being written. An error of one line is shown and forgotten.
    """
    if not quiet:
        click.echo("Ctrl-C ends an answer; exit or Ctrl-D ends the conversation.", err=True)
    line = first
    while True:
        interrupts.end_if_terminated()
        try:
            if line is None:
                line = read_line()
            if line is None or line.strip() == "exit":
                return
            if line.strip():
                _answer(model, conversation, line, quiet, show_stats, options)
        except MoerunError as error:
            show_error(name, error)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            click.echo(err=True)
        line = None


def _answer(
    model: Model,
    conversation: Conversation,
    line: str,
    quiet: bool,
    show_stats: bool,
    options: dict[str, Any],
) -> None:
    token_ids = conversation.ask(line)
    try:
        answer = Answer(model, token_ids, **options)
    except MoerunError:
        conversation.forget()
        raise
    try:
        for piece in answer:
            write_out(piece)
    except KeyboardInterrupt:
        pass
    write_out("\n")
    conversation.remember(answer.text)
    if not quiet:
        click.echo(speed_line(model.stats()), err=True)
    if show_stats:
        click.echo(statistics_text(model.stats()), err=True)
