"""One-shot modes of moe-run: one answer, a dry run, removal of record files."""

from __future__ import annotations

from typing import Any

import click

from moerun_tools.command import Interrupted, write_out


def store_plan(model: Any) -> None:
    """Keep the plan for the next run; a failure is a warning, for the text is there."""
    from moerun.errors import MoerunError

    if model.stats()["cache"]["state"] == "resident":
        return
    try:
        model.save_plan()
    except MoerunError as error:
        click.echo(f"warning: {error}", err=True)


def remove_pack(directory: Any) -> None:
    """Remove the record files of a model and name them."""
    from moerun import pack_folder
    from moerun.packs import remove_record_files
    from moerun_tools.units import as_binary

    removed = remove_record_files(directory)
    for file, size in removed.items():
        click.echo(f"removed {file} ({as_binary(size)})")
    if not removed:
        click.echo(f"no record file of this model in {pack_folder()}")


def show_dry_run(directory: Any, as_json: bool, **options: Any) -> None:
    """Print what each tier would hold: a table, or one JSON object."""
    from moerun import dry_run
    from moerun_tools.dry_run_report import dry_run_table
    from moerun_tools.report import json_line

    plan = dry_run(directory, **options)
    write_out(json_line(plan) if as_json else dry_run_table(plan) + "\n")


def run_once(
    model: Any,
    prompt_token_ids: list[int],
    echo: str,
    as_json: bool,
    closing: Any,
    generation: dict[str, Any],
) -> None:
    """Answer one prompt: `echo` and then text as it is made, or one JSON object at the end.

    Raises:
        Interrupted: Ctrl-C ended the text; the closing line has been written.
    """
    from moerun_tools.answer import Answer
    from moerun_tools.report import json_object

    answer = Answer(model, prompt_token_ids, **generation)
    try:
        if not as_json:
            write_out(echo)
        for piece in answer:
            if not as_json:
                write_out(piece)
    except KeyboardInterrupt:
        click.echo(err=True)
        closing.after_text(model.stats(), interrupted=True)
        raise Interrupted from None
    if as_json:
        write_out(json_object(answer.text, answer.token_ids, prompt_token_ids, model.stats()))
        return
    write_out("\n")
    closing.after_text(model.stats())
