"""The loop of moe-run --interactive."""

from __future__ import annotations

import sys
from typing import Any

import click

from moerun import Model
from moerun.errors import MoerunError
from moerun_tools import interrupts
from moerun_tools.answer import Answer
from moerun_tools.closing import Closing
from moerun_tools.command import Interrupted, show_error, write_out
from moerun_tools.conversation import Conversation
from moerun_tools.prompt import read_line

_HELP = """\
/clear   begin a new conversation
/bye     end; so do exit and Ctrl-D
/help    this list
Ctrl-C   end the answer that is being written"""
_ENDINGS = ("/bye", "/exit", "/quit", "exit")


class Dialogue:
    """Answers line after line, each as the model was asked on the command line.

    Args:
        model: the model.
        conversation: makes tokens of a line.
        closing: what is said after an answer.
        name: of the tool, for errors.
        options: arguments of `Model.generate`.
    """

    def __init__(
        self,
        model: Model,
        conversation: Conversation,
        closing: Closing,
        name: str,
        options: dict[str, Any],
    ) -> None:
        self._model = model
        self._conversation = conversation
        self._closing = closing
        self._name = name
        self._options = options
        self._has_answered = False

    def run(self, first: str | None) -> None:
        """Answer `first` and then standard input until one of its lines or its end says so.

        Ctrl-C ends the answer that is being written. An error of one line is shown and forgotten.

        Raises:
            Interrupted: Ctrl-C came between answers, and nobody sits at a terminal.
        """
        if not self._closing.quiet:
            click.echo("Ctrl-C ends an answer, /bye or Ctrl-D the conversation; /help.", err=True)
        line = first
        while True:
            interrupts.end_if_terminated()
            try:
                if line is None:
                    line = read_line()
                if line is None or line.strip() in _ENDINGS:
                    return
                self._obey_or_answer(line)
            except MoerunError as error:
                show_error(self._name, error)
            except KeyboardInterrupt:
                click.echo(err=True)
                if sys.stdin is None or not sys.stdin.isatty():
                    raise Interrupted from None
            line = None

    def _obey_or_answer(self, line: str) -> None:
        command = line.strip()
        if command == "/help":
            click.echo(_HELP, err=True)
        elif command == "/clear":
            self._conversation.clear()
        elif command.startswith("/") and command[1:].isalpha():
            click.echo(f"There is no command {command}; /help lists them.", err=True)
        elif command:
            self._answer(line)

    def _answer(self, line: str) -> None:
        token_ids = self._conversation.ask(line)
        try:
            answer = Answer(self._model, token_ids, **self._options)
        except MoerunError:
            self._conversation.forget()
            raise
        interrupted = False
        try:
            for piece in answer:
                write_out(piece)
        except MoerunError:
            self._conversation.forget()
            raise
        except KeyboardInterrupt:
            interrupted = True
        write_out("\n")
        self._conversation.remember(answer.message)
        self._closing.after_text(self._model.stats(), interrupted, not self._has_answered)
        self._has_answered = True
