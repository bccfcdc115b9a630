"""What the commands of moe-trace have in common: sizes, progress bars, options of the output."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import click

from moerun_tools.command import GroupedOption

_Function = TypeVar("_Function", bound=Callable[..., Any])

MAX_NUMBER = 2**31 - 1  # of tokens, sequences and layers; what numpy and torch take
CONTEXT_SETTINGS = {"show_default": True, "help_option_names": ["-h", "--help"]}

# Arguments of `cache_arguments`, in its order.
CACHE_OPTIONS = (
    "expert_budget",
    "policy",
    "split",
    "prefetch",
    "plan",
    "pack",
    "pin_limit",
    "host_tier",
)

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kKMGT]i?)?B?", re.ASCII)


def option(group: str, *names: str, **attributes: Any) -> Callable[[_Function], _Function]:
    """Return an option that stands in --help under the heading `group`."""
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


class Size(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number of bytes: 256MiB, 1GB or 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size such as 256MiB, 1GB or 1000000.", param, ctx)
        unit = match[2] or ""
        power = " KMGT".index(unit[0].upper()) if unit else 0
        size = float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power
        if not 1 <= size < 2**62:
            self.fail(f"{value!r} is not a size that a file can have.", param, ctx)
        return int(size)


class Progress:
    """A progress bar with the time that is left, on standard error.

    At a terminal it is there from the start; elsewhere only if the work takes longer than a few
    seconds, and then with few lines.
    """

    def __init__(self, description: str, unit: str, quiet: bool) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._is_new = True
        self._bar = tqdm(
            desc=description,
            unit=unit,
            unit_scale=True,
            total=1,
            delay=0 if is_terminal else 5,
            mininterval=0.1 if is_terminal else 10,
            smoothing=0.1,
            leave=False,
            disable=quiet or sys.stderr is None,
        )

    def show(self, done: int, total: int) -> None:
        """Set how far it is; what is done at the first call was done before."""
        if self._is_new:
            self._is_new = False
            self._bar.initial = self._bar.n = done
            self._bar.start_t = time.time()
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def note(self, text: str) -> None:
        """Set what stands behind the bar when it is drawn next."""
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Take the bar away; closing twice is fine."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
