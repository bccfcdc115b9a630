"""What the tools have in common: grouped help, exit codes, one paragraph for an error."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click

_Function = TypeVar("_Function", bound=Callable[..., Any])


class GroupedOption(click.Option):
    """An option that stands in --help under the heading `group`."""

    def __init__(self, *args: Any, group: str = "Other", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class FiniteFloat(click.FloatRange):
    """A range of floats that nan and inf are not in."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Refuse what is not a number, then what is out of the range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def version_option(tool: str) -> Callable[[_Function], _Function]:
    """`--version`, which prints the name of the tool and the version of moerun."""

    def print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            from moerun import __version__

            click.echo(f"{tool} {__version__}")
            ctx.exit()

    return click.option(
        "--version",
        cls=GroupedOption,
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=print_version,
        help="Print the version.",
    )


class ToolCommand(click.Command):
    """A command that ends with 0, 1 (failure), 2 (usage) or 130 (Ctrl-C), never a traceback."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings, in the order of the groups' first options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                groups.setdefault(getattr(param, "group", "Other"), []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and turn every exception into a message and an exit code."""
        name = ctx.command_path or "moerun"
        try:
            result = super().invoke(ctx)
            write_out("")
            return result
        except (click.exceptions.Exit, click.ClickException, SystemExit):
            raise
        except KeyboardInterrupt:
            click.echo(err=True)
            _exit_quietly(130)
        except BrokenPipeError:
            _exit_quietly(0)
        except Exception as error:
            show_error(name, error)
            _exit_quietly(1)


def show_error(name: str, error: Exception) -> None:
    """Write what failed to standard error, as one paragraph."""
    from moerun.errors import MoerunError

    if isinstance(error, MoerunError | OSError):
        text = str(error)
    elif isinstance(error, MemoryError):
        text = "not enough memory"
    else:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = (
            f"internal error, please report it: {type(error).__name__}: {error} "
            f"({os.path.basename(where.filename)}, line {where.lineno})"
        )
    click.echo(f"{name}: error: {' '.join(text.split())}", err=True)


def write_out(text: str) -> None:
    """Write to standard output at once, as UTF-8; a failure says that it was the output."""
    from moerun.errors import FileError

    if sys.stdout is None:
        raise FileError("standard output is closed")
    try:
        data = text.encode()
        while data:  # unbuffered (python -u), a write may take only a part
            count = sys.stdout.buffer.write(data)
            if not count:  # it takes nothing, and gives no reason
                raise OSError(errno.EAGAIN, "it takes no more bytes")
            data = data[count:]
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FileError(f"cannot write to standard output: {error.strerror}") from error


def _exit_quietly(code: int) -> NoReturn:
    """Exit without a second failure when the interpreter flushes standard output."""
    with contextlib.suppress(OSError, AttributeError):  # no standard output, or not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
