"""What moe-run does of which there is one a call: one answer, a dry run, the care of files."""

from __future__ import annotations

from typing import Any

import click

from moerun_tools.command import write_out


def store_plan(model: Any) -> None:
    """Keep the plan for the next run; what goes wrong is said, for the text is there."""
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
    from moerun_tools.units import as_bytes

    removed = remove_record_files(directory)
    for file, size in removed.items():
        click.echo(f"removed {file} ({as_bytes(size)})")
    if not removed:
        click.echo(f"no record file of this model in {pack_folder()}")


def show_dry_run(directory: Any, as_json: bool, **options: Any) -> None:
    """Print what each tier would hold: a table, or one JSON object."""
    from moerun import dry_run
    from moerun_tools.cache_report import dry_run_table
    from moerun_tools.report import json_line

    plan = dry_run(directory, **options)
    write_out(json_line(plan) if as_json else dry_run_table(plan) + "\n")


def run_once(
    model: Any,
    conversation: Any,
    text: str,
    echo: bool,
    as_json: bool,
    quiet: bool,
    show_stats: bool,
    generation: dict[str, Any],
) -> None:
    """Answer one prompt: text as it is made, or one JSON object at the end."""
    from moerun_tools.answer import Answer
    from moerun_tools.cache_report import statistics_text
    from moerun_tools.report import json_object, memory_line, speed_line

    prompt_token_ids = conversation.ask(text)
    answer = Answer(model, prompt_token_ids, **generation)
    if as_json:
        for _ in answer:
            pass
        write_out(json_object(answer.text, answer.token_ids, prompt_token_ids, model.stats()))
        return
    if echo:
        write_out(text)
    for piece in answer:
        write_out(piece)
    write_out("\n")
    if not quiet:
        click.echo(speed_line(model.stats()), err=True)
        click.echo(memory_line(model.stats()), err=True)
    if show_stats:
        click.echo(statistics_text(model.stats()), err=True)
