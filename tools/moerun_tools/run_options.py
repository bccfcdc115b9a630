"""Options of moe-run about the text itself, and which options exclude each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from moerun_tools.command import FiniteFloat, GroupedOption

_Function = TypeVar("_Function", bound=Callable[..., Any])

_OF_MODEL = "the model's, else"


def _option(*names: str, **attributes: Any) -> Callable[[Any], Any]:
    return click.option(*names, cls=GroupedOption, group="Generation", **attributes)


_OPTIONS = (
    _option(
        "-n",
        "--max-new-tokens",
        metavar="N",
        type=click.IntRange(min=1),
        show_default=f"{_OF_MODEL} 128",
        help="Generate at most N tokens.",
    ),
    _option(
        "--temperature",
        metavar="X",
        type=FiniteFloat(min=0),
        show_default=f"{_OF_MODEL} 0",
        help="Randomness of sampling; 0 always takes the likeliest token (greedy), without the "
        "model's own settings of sampling.",
    ),
    _option(
        "--top-k",
        metavar="K",
        type=click.IntRange(min=0, max=2**31 - 1),
        show_default=f"{_OF_MODEL} 0",
        help="Sample among the K likeliest tokens; 0 for all.",
    ),
    _option(
        "--top-p",
        metavar="P",
        type=FiniteFloat(min=0, max=1, min_open=True),
        show_default=f"{_OF_MODEL} 1",
        help="Sample among the likeliest tokens that together have this probability.",
    ),
    _option(
        "--min-p",
        metavar="P",
        type=FiniteFloat(min=0, max=1),
        show_default=f"{_OF_MODEL} 0",
        help="Leave out tokens less likely than this share of the likeliest one.",
    ),
    _option(
        "--repetition-penalty",
        metavar="X",
        type=FiniteFloat(min=0, min_open=True),
        show_default=f"{_OF_MODEL} 1",
        help="Above 1, tokens that are already there become less likely.",
    ),
    _option(
        "--seed",
        type=click.IntRange(min=0, max=2**64 - 1),
        show_default="a random one, which --stats and --json report",
        metavar="N",
        help="Seed of sampling: same seed, same text.",
    ),
    _option(
        "--stop",
        metavar="TEXT",
        multiple=True,
        help="End after this text; may be given more than once.",
    ),
    _option("--ignore-eos", is_flag=True, help="Go on when the model ends its text."),
)


def generation_options(function: _Function) -> _Function:
    """Add the options to a command; those that are None are the model's own."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def check_usage(
    prompt: str | None,
    file: str | None,
    interactive: bool,
    chat: bool,
    system: str | None,
    save_plan: str | None,
    dry_run: bool,
    remove_pack: bool,
    batch: str | None,
    output: str | None,
    batch_size: int | None,
    kv_budget: str | None,
    predictor: str | None,
    schedule: str | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    shows_stats: bool,
    stop: Sequence[str],
) -> None:
    """Refuse options that exclude or need each other.

    Raises:
        click.UsageError: which do.
    """
    if prompt is not None and file is not None:
        raise click.UsageError("PROMPT and --file exclude each other.")
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat.")
    if interactive and as_json:
        raise click.UsageError("--interactive and --json exclude each other.")
    if shows_stats and as_json:
        raise click.UsageError("--stats and --json exclude each other: JSON holds the statistics.")
    if save_plan == "":
        raise click.UsageError("--save-plan needs a name that is not empty.")
    if any(not text for text in stop):
        raise click.UsageError("--stop needs a text that is not empty.")

    if batch is not None and (prompt is not None or file is not None or interactive):
        raise click.UsageError("--batch takes the place of PROMPT, --file and --interactive.")
    if batch is None and not all(
        each is None for each in (output, batch_size, kv_budget, predictor, schedule)
    ):
        raise click.UsageError(
            "--output, --batch-size, --kv-budget, --predictor and --schedule need --batch."
        )
    if schedule in ("on", "auto") and predictor is None:
        raise click.UsageError("--schedule needs --predictor.")
    if batch is not None and (dry_run or remove_pack):
        raise click.UsageError("--batch excludes --dry-run and --remove-pack.")
    if (resume or overwrite) and output in (None, "-"):
        raise click.UsageError("--resume and --overwrite need --output.")
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other.")
    if batch is not None and as_json and output in (None, "-"):
        raise click.UsageError("--batch with --json needs --output, for standard output has both.")
