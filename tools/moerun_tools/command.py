"""What the tools have in common: grouped help, exit codes, one paragraph for an error."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import click

from moerun_tools import interrupts

_Function = TypeVar("_Function", bound=Callable[..., Any])

_MOST_INT = 2**63 - 1
_MOST_CHARACTERS = 1200


class GroupedOption(click.Option):
    """An option that stands in --help under the heading `group`."""

    def __init__(self, *args: Any, group: str = "Other", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after which the tool has already said what it has to say."""


class FiniteFloat(click.FloatRange):
    """A range of floats that nan and inf are not in."""

    name = "number"

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
    """A command that ends with 0, 1 (failure), 2 (usage), 130 (Ctrl-C) or 143 (SIGTERM).

    It never ends with a traceback.
    """

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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and refuse whole numbers of more than 64 bits, which no library below takes."""
        rest = super().parse_args(ctx, args)
        for param in self.get_params(ctx):
            if isinstance(param.type, click.IntRange) and param.type.max is not None:
                continue
            for number in _numbers(ctx.params.get(param.name or "")):
                if abs(number) > _MOST_INT:
                    raise click.BadParameter(
                        f"{str(number)[:40]} has more than 64 bits.", ctx=ctx, param=param
                    )
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and turn every exception into a message and an exit code."""
        name = ctx.command_path or "moerun"
        try:
            interrupts.interrupt_work()
            result = super().invoke(ctx)
            write_out("")
            return result
        except (click.exceptions.Exit, click.ClickException, SystemExit):
            raise
        except Interrupted:
            _exit_quietly(interrupts.exit_code())
        except KeyboardInterrupt:
            interrupts.leave_at_once()
            click.echo(err=True)
            _exit_quietly(interrupts.exit_code())
        except BrokenPipeError:
            _exit_quietly(0)
        except Exception as error:
            if interrupts.has_just_come() and not _is_ours(error):
                _exit_quietly(interrupts.exit_code())
            show_error(name, error)
            _exit_quietly(1)
        finally:
            interrupts.leave_at_once()


def _is_ours(error: Exception) -> bool:
    """Whether an error has a message for people, whatever came before it."""
    from moerun.errors import MoerunError

    return isinstance(error, MoerunError)


def _numbers(value: Any) -> Iterator[int]:
    """Yield the whole numbers that an option was given."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _numbers(each)


def show_error(name: str, error: Exception) -> None:
    """Write what failed to standard error, as one paragraph."""
    try:
        from moerun.boundary import translated
        from moerun.errors import MoerunError

        known: Exception | None = error if isinstance(error, MoerunError) else translated(error)
    except ImportError:  # of a damaged installation, where nothing can be translated
        known = error
    if known is not None:
        text = str(known)
    else:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = (
            f"internal error, please report it: {type(error).__name__}: {error} "
            f"({os.path.basename(where.filename)}, line {where.lineno})"
        )
    text = " ".join(text.split())
    if len(text) > _MOST_CHARACTERS:  # of a name that is a long text
        text = f"{text[: _MOST_CHARACTERS // 2]} ... {text[-_MOST_CHARACTERS // 2 :]}"
    click.echo(f"{name}: error: {text}", err=True)


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
