"""Decoding many sequences in one step: tokens/s by batch size, beside the machine's limit."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

import moerun

PROMPT_TOKENS = 16


def prompts_of(model: moerun.Model, count: int, texts: Path | None) -> list[list[int]]:
    """Return different prompts: lines of a file as for moe-run --batch, or random tokens."""
    if texts is not None:
        lines = [json.loads(line) for line in texts.read_text().splitlines() if line.strip()]
        ids = [model.tokenizer.encode(x if isinstance(x, str) else x["prompt"]) for x in lines]
        return [ids[i % len(ids)] for i in range(count)]
    rng = np.random.default_rng(1)
    vocab_size = model.config["vocab_size"]
    return [rng.integers(0, vocab_size, PROMPT_TOKENS).tolist() for _ in range(count)]


def shared_bytes(model: moerun.Model, expert_bytes: int) -> float:
    """Return what a step reads once for all its tokens, beside experts."""
    list(model.generate([1] * PROMPT_TOKENS, max_new_tokens=2, ignore_eos=True, temperature=0))
    of_experts = model.config["top_k"] * len(model.moe_layers) * expert_bytes
    return float(model.stats()["decode_bytes_per_token"]) - of_experts


def measure(
    model: moerun.Model,
    batch_size: int,
    warm_up: int,
    steps: int,
    texts: Path | None,
    expert_bytes: int,
    bandwidth: float,
) -> dict[str, Any]:
    once = shared_bytes(model, expert_bytes)
    before = model.stats()["cache"]
    prompts = prompts_of(model, batch_size, texts)
    with model.batch(batch_size) as batch:
        for prompt in prompts:
            batch.add(prompt, max_new_tokens=warm_up + steps + 1, ignore_eos=True, temperature=0)
        for _ in range(warm_up + 1):  # the first runs the prompts
            batch.step()
        start = time.perf_counter()
        for _ in range(steps):
            if len(batch.step()) != batch_size:
                raise click.ClickException(
                    f"the KV budget does not hold {batch_size} sequences: use fewer tokens"
                )
        seconds = (time.perf_counter() - start) / steps
        stats = model.stats()
    counts = stats["batch"]
    cache = stats["cache"]
    active = counts["active_experts"]
    read_s = (once + active * len(model.moe_layers) * expert_bytes) / bandwidth
    missed_s = 0.0
    if cache["link_gb_per_s"]:
        missed = counts["bytes_per_token"] * batch_size
        missed_s = missed / (1e9 * cache["link_gb_per_s"])
    return {
        "batch_size": batch_size,
        "tokens_per_s": batch_size / seconds,
        "step_ms": 1e3 * seconds,
        "active_experts": active,
        "hit_rate": counts["hit_rate"],
        "bytes_per_token": counts["bytes_per_token"],
        "read_limit_ms": 1e3 * read_s,
        "link_limit_ms": 1e3 * missed_s,
        "share_of_limit": max(read_s, missed_s) / seconds,
        "arena_bytes": before["arena_bytes"],
    }


def report(result: dict[str, Any]) -> str:
    lines = [
        f"{result['machine']}; load average {result['load_average']:.2f}; memory read bandwidth "
        f"{result['bandwidth'] / 1e9:.1f} GB/s",
        "",
        "| experts in memory | batch | tokens/s | by one | ms a step | active experts | hits "
        "| MB read a token | limit: memory | link | share of the limit |",
        "|" + "---|" * 11,
    ]
    first: dict[str, float] = {}
    for row in result["rows"]:
        base = first.setdefault(row["cache"], row["tokens_per_s"] / row["batch_size"])
        hits, read = row["hit_rate"], row["bytes_per_token"]
        gain = row["tokens_per_s"] / base if row["batch_size"] != 1 else 1.0
        lines.append(
            f"| {row['cache']} | {row['batch_size']} | {row['tokens_per_s']:.4g} | {gain:.2f} x | "
            f"{row['step_ms']:.4g} | {row['active_experts']:.1f} | "
            f"{'-' if hits is None else f'{hits:.1%}'} | "
            f"{'-' if not read else f'{read / 1e6:.3g}'} | {row['read_limit_ms']:.3g} ms | "
            f"{'-' if not row['link_limit_ms'] else format(row['link_limit_ms'], '.3g') + ' ms'} | "
            f"{row['share_of_limit']:.0%} |"
        )
    return "\n".join(lines)


@click.command()
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="See make_checkpoint.py.  [default: the shipped model]",
)
@click.option(
    "--batch-size", "sizes", multiple=True, type=int, default=[1, 4, 16, 64], show_default=True
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    default=["100%"],
    show_default=True,
    help="As moe-run --expert-budget, perhaps with policy, split and prefetch: 50%,lru,1,off.",
)
@click.option("--warm-up", default=16, show_default=True, help="Steps before those that count.")
@click.option("--steps", default=32, show_default=True, help="Steps that count.")
@click.option(
    "--texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Prompts as for moe-run --batch.  [default: random tokens]",
)
@click.option("--threads", default=2, show_default=True)
@click.option("--bandwidth-bytes", default=4 << 30, hidden=True)
@click.option("--pack-folder", type=click.Path(file_okay=False), help="Read experts from a record")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(
    checkpoint: Path | None,
    sizes: tuple[int, ...],
    budgets: tuple[str, ...],
    warm_up: int,
    steps: int,
    texts: Path | None,
    threads: int,
    bandwidth_bytes: int,
    pack_folder: str | None,
    as_json: bool,
) -> None:
    """Decode in batches, with every expert in memory or some of them."""
    load_average = os.getloadavg()[0]
    bandwidth = 1e9 * moerun._moerun.measure_read_bandwidth(threads, bandwidth_bytes)
    expert_bytes = moerun.dry_run(checkpoint, "cpu")["expert_bytes_each"]
    rows = []
    for text in budgets:
        budget, *rest = text.split(",")
        names = ("policy", "split", "prefetch")
        options: dict[str, Any] = dict(zip(names, rest, strict=False))
        options |= {"split": float(options["split"])} if "split" in options else {}
        if "prefetch" in options:
            options["prefetch"] = {"on": True, "off": False, "auto": "auto"}[options["prefetch"]]
        with moerun.Model.load(
            checkpoint,
            "cpu",
            threads=threads,
            expert_budget=budget,
            pack=pack_folder or False,
            **options,
        ) as model:
            for size in sizes:
                row = measure(model, size, warm_up, steps, texts, expert_bytes, bandwidth)
                rows.append({"cache": text} | row)
                click.echo(f"{text}, batch {size}: {row['tokens_per_s']:.1f} tok/s", err=True)
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_average": load_average,
        "bandwidth": bandwidth,
        "rows": rows,
    }
    print(json.dumps(result) if as_json else report(result))


if __name__ == "__main__":
    main()
