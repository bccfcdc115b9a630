"""Speed of moerun while other programs use the cores, as a Markdown table.

Busy processes are Python programs that count, at ordinary priority. All numbers of threads take
turns within a round, so that what else happens on the machine meets them alike. To compare two
builds, run the file with the Python of each, one after the other.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

import moerun

BUSY_CODE = "while True: pass"
SETTLE_SECONDS = 0.5
DECODE_PROMPT_TOKENS = 16


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", BUSY_CODE]) for _ in range(count)]
    try:
        time.sleep(SETTLE_SECONDS if count else 0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def prompt_of(num_tokens: int, vocab_size: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(0).integers(0, vocab_size, num_tokens)]


def speeds(model: moerun.Model, prompt_tokens: int, decode_tokens: int) -> dict[str, float]:
    """Returns tokens per second."""
    vocab_size = model.config["vocab_size"]
    start = time.perf_counter()
    list(
        model.generate(
            prompt_of(prompt_tokens, vocab_size), max_new_tokens=1, ignore_eos=True, temperature=0
        )
    )
    prefill = prompt_tokens / (time.perf_counter() - start)
    tokens = iter(
        model.generate(
            prompt_of(DECODE_PROMPT_TOKENS, vocab_size),
            max_new_tokens=decode_tokens + 1,
            ignore_eos=True,
            temperature=0,
        )
    )
    next(tokens)
    start = time.perf_counter()
    count = sum(1 for _ in tokens)
    return {"decode": count / (time.perf_counter() - start), "prefill": prefill}


def measure(
    models: dict[tuple[str, int], moerun.Model],
    busy: tuple[int, ...],
    rounds: int,
    prompt_tokens: int,
    decode_tokens: dict[str, int],
) -> dict[tuple[str, int, int], dict[str, list[float]]]:
    """Returns tokens per second by (model, threads, busy processes), one of each round."""
    results: dict[tuple[str, int, int], dict[str, list[float]]] = {}
    for round_idx in range(rounds):
        for count in busy:
            with busy_processes(count):
                for (name, threads), model in models.items():
                    one = speeds(model, prompt_tokens, decode_tokens[name])
                    kept = results.setdefault((name, threads, count), {"decode": [], "prefill": []})
                    for key, value in one.items():
                        kept[key].append(value)
            click.echo(f"round {round_idx + 1} of {rounds}, {count} busy: done", err=True)
    return results


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(
    results: dict[tuple[str, int, int], dict[str, list[float]]],
    names: list[str],
    threads: tuple[int, ...],
    busy: tuple[int, ...],
) -> str:
    columns = [(name, key) for name in names for key in ("decode", "prefill")]
    lines = [
        "| busy processes | threads | " + " | ".join(f"{n}: {k}" for n, k in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for count in busy:
        for each in threads:
            cells = [
                number(statistics.median(results[name, each, count][key])) for name, key in columns
            ]
            lines.append(f"| {count} | {each} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command()
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A model to measure beside the shipped one; see make_checkpoint.py. Repeatable.",
)
@click.option("--threads", multiple=True, type=click.IntRange(1), default=(1, 2), show_default=True)
@click.option(
    "--busy", multiple=True, type=click.IntRange(0), default=(0, 1, 2, 4), show_default=True
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--decode-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print all numbers as one object.")
def main(
    checkpoints: tuple[Path, ...],
    threads: tuple[int, ...],
    busy: tuple[int, ...],
    rounds: int,
    prompt_tokens: int,
    decode_tokens: int,
    as_json: bool,
) -> None:
    """Measure tokens per second with 0, 1, 2 and 4 busy processes."""
    names = ["shipped", *(path.name for path in checkpoints)]
    # The shipped model takes well under a millisecond a token.
    lengths = {name: decode_tokens for name in names} | {"shipped": 10 * decode_tokens}
    with ExitStack() as stack:
        models: dict[tuple[str, int], moerun.Model] = {}
        for name, path in zip(names, [None, *checkpoints], strict=True):
            for each in threads:
                options: dict[str, Any] = {} if path is None else {"path": path}
                model = moerun.Model.load(**options, device="cpu", threads=each)
                models[name, each] = stack.enter_context(model)
                speeds(model, prompt_tokens, 8)  # warms caches up
        results = measure(models, busy, rounds, prompt_tokens, lengths)
    if as_json:
        listed = [
            {"model": name, "threads": each, "busy": count, **values}
            for (name, each, count), values in results.items()
        ]
        click.echo(json.dumps(listed))
        return
    click.echo(
        f"Tokens per second, medians of {rounds} rounds; prompts of {prompt_tokens} tokens.\n"
    )
    click.echo(markdown(results, names, threads, busy))


if __name__ == "__main__":
    main()
