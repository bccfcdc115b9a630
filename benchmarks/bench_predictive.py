"""Batches beyond memory: planned cache, predictive cache and token scheduler, by batch size."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import moerun

# Options of Model.load, and of its generate_batch. A log of events keeps trials from switching off
# what is to be measured.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lru": ({"policy": "lru", "prefetch": False}, {}),
    "lfu": ({"policy": "lfu", "prefetch": False}, {}),
    "lcp": ({"policy": "lcp", "prefetch": False}, {}),
    "lru, prefetch": ({"policy": "lru", "prefetch": True}, {}),
    "planned": ({"policy": "lcp", "prefetch": "auto"}, {}),
    "planned + scheduler": ({"policy": "lcp", "prefetch": "auto"}, {"schedule": True}),
    "predictive": (
        {"policy": "predictive", "prefetch": True, "cache_events": True},
        {"schedule": False},
    ),
    "predictive + scheduler": (
        {"policy": "predictive", "prefetch": True, "cache_events": True},
        {"schedule": True},
    ),
    "predictive, all auto": ({"policy": "predictive"}, {"schedule": "auto"}),
}


def prompts_of(model: moerun.Model, texts: Path, count: int) -> list[list[int]]:
    lines = [json.loads(line) for line in texts.read_text().splitlines() if line.strip()]
    ids = [model.tokenizer.encode(x if isinstance(x, str) else x["prompt"]) for x in lines]
    return [ids[i % len(ids)] for i in range(count)]


def run(
    checkpoint: Path | None,
    predictor: Path,
    texts: Path,
    setting: str,
    budget: str,
    batch_size: int,
    sequences: int,
    tokens: int,
    bandwidth: float,
    pack: str,
    threads: int,
) -> dict[str, Any]:
    """Load, decode all sequences, and return what came of it."""
    load, batch = SETTINGS[setting]
    options: dict[str, Any] = {**batch, "batch_size": batch_size}
    if "schedule" in batch:
        options["predictor"] = predictor
    with moerun.Model.load(
        checkpoint, "cpu", threads=threads, expert_budget=budget, pack=pack, **load
    ) as model:
        prompts = prompts_of(model, texts, sequences)
        start = time.perf_counter()
        results = model.generate_batch(
            prompts, max_new_tokens=tokens, ignore_eos=True, temperature=0, **options
        ).results()
        seconds = time.perf_counter() - start
        stats = model.stats()
        layers = len(model.moe_layers)
        list(model.generate(prompts[0], max_new_tokens=2, ignore_eos=True, temperature=0))
        one = float(model.stats()["decode_bytes_per_token"])
        top_k, num_experts = model.config["top_k"], model.config["num_experts"]
    counts, cache = stats["batch"], stats["cache"]
    expert_bytes = cache["total_expert_bytes"] / (layers * num_experts)
    # What a step cannot do without: reading the weights it uses once, or what it missed.
    step_s = counts["decode_s"] / counts["steps"]
    read = one + (counts["active_experts"] - top_k) * layers * expert_bytes
    link = 1e9 * (cache["link_gb_per_s"] or 0)
    missed = counts["bytes_per_token"] * counts["tokens_per_step"]
    limit_s = max(read / bandwidth, missed / link if link else 0)
    total = cache["total"]
    named = total["hits"] + total["prefetch_useful"] + total["prefetch_late"]
    return {
        "setting": setting,
        "budget": budget,
        "batch_size": batch_size,
        "tokens_per_s": counts["decode_tokens_per_s"],
        "seconds": seconds,
        "active_experts": counts["active_experts"],
        "hit_rate": counts["hit_rate"],
        "ready_rate": counts["ready_rate"],
        "named_rate": named / total["lookups"] if total["lookups"] else None,
        "bytes_per_token": counts["bytes_per_token"],
        "link_gb_per_s": cache["link_gb_per_s"],
        "share_of_limit": limit_s / step_s,
        "reason": cache["reason"],
        "texts": hash(tuple(tuple(result.token_ids) for result in results)),
    }


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one row for several runs of the same setting."""
    row = dict(runs[0])
    for name, value in row.items():
        if isinstance(value, float):
            row[name] = statistics.median(each[name] for each in runs)
    row["runs"] = [each["tokens_per_s"] for each in runs]
    return row


def report(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "| experts in memory | batch | | tokens/s | by planned | active experts | hits "
        "| ready | KB read a token | link GB/s | share of the limit |"
    )
    yield "|" + "---|" * 11
    base = {
        (row["budget"], row["batch_size"]): row["tokens_per_s"]
        for row in rows
        if row["setting"] == "planned"
    }
    for row in rows:
        planned = base.get((row["budget"], row["batch_size"]))
        by = f"{row['tokens_per_s'] / planned:.2f} x" if planned else "-"
        yield (
            f"| {row['budget']} | {row['batch_size']} | {row['setting']} | "
            f"{row['tokens_per_s']:.4g} | {by} | {row['active_experts']:.1f} | "
            f"{row['hit_rate']:.1%} | {row['ready_rate']:.1%} | "
            f"{row['bytes_per_token'] / 1e3:.3g} | {row['link_gb_per_s'] or 0:.2f} | "
            f"{row['share_of_limit']:.0%} |"
        )


@click.command()
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="See padded_experts.py.  [default: the shipped model]",
)
@click.option(
    "--predictor", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--texts",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Prompts as for moe-run --batch.",
)
@click.option(
    "--batch-size", "sizes", multiple=True, type=int, default=[1, 4, 16, 64], show_default=True
)
@click.option("--budget", "budgets", multiple=True, default=["50%", "25%"], show_default=True)
@click.option(
    "--setting", "settings", multiple=True, type=click.Choice(list(SETTINGS)), help="[default: all]"
)
@click.option("--tokens", default=64, show_default=True, help="Generated for each prompt.")
@click.option("--rounds", default=2, show_default=True, help="Runs of each setting, in turns.")
@click.option("--threads", default=2, show_default=True)
@click.option("--pack-folder", required=True, type=click.Path(file_okay=False))
@click.option("--bandwidth-bytes", default=4 << 30, hidden=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(
    checkpoint: Path | None,
    predictor: Path,
    texts: Path,
    sizes: tuple[int, ...],
    budgets: tuple[str, ...],
    settings: tuple[str, ...],
    tokens: int,
    rounds: int,
    threads: int,
    pack_folder: str,
    bandwidth_bytes: int,
    as_json: bool,
) -> None:
    """Decode twice as many sequences as a batch has, at least eight, with each setting."""
    bandwidth = 1e9 * moerun._moerun.measure_read_bandwidth(threads, bandwidth_bytes)
    rows = []
    for budget in budgets:
        for size in sizes:
            found: dict[str, list[dict[str, Any]]] = {}
            for _ in range(rounds):
                for setting in settings or SETTINGS:
                    row = run(
                        checkpoint,
                        predictor,
                        texts,
                        setting,
                        budget,
                        size,
                        max(8, 2 * size),
                        tokens,
                        bandwidth,
                        pack_folder,
                        threads,
                    )
                    found.setdefault(setting, []).append(row)
                    click.echo(
                        f"{budget}, batch {size}, {setting}: {row['tokens_per_s']:.1f} tok/s",
                        err=True,
                    )
            rows += [medians(runs) for runs in found.values()]
            if len({row["texts"] for runs in found.values() for row in runs}) != 1:
                raise click.ClickException("the texts differ between settings")
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    result = {"machine": machine, "bandwidth": bandwidth, "rows": rows}
    if as_json:
        print(json.dumps(result))
        return
    print(f"{machine}; memory read bandwidth {bandwidth / 1e9:.1f} GB/s\n")
    print("\n".join(report(rows)))


if __name__ == "__main__":
    main()
