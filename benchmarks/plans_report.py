"""The tables of bench_plans.py."""

from __future__ import annotations

from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| budget | cache | tokens/s | hits | MB on demand a token | MB ahead | "
        "prefetch, at the end | link, GB/s | times the limit |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        same = [other["tokens_per_s"] for other in rows if other["budget"] == row["budget"]]
        speed = f"{row['tokens_per_s']:.2f}"
        ratio, link = row["ratio_to_limit"], row["link_gb_per_s"]
        lines.append(
            f"| {row['budget']} | {row['cache']} | "
            f"{f'**{speed}**' if row['tokens_per_s'] == max(same) else speed} | "
            f"{row['hit_rate']:.1%} | {row['demand_bytes_per_token'] / 1e6:.3g} | "
            f"{row['prefetch_bytes_per_token'] / 1e6:.3g} | "
            f"{'on' if row['prefetch_active'] else 'off'} | "
            f"{'-' if link is None else f'{link:.2f}'} | "
            f"{'-' if ratio is None else f'{ratio:.2f}'} |"
        )
    return "\n".join(lines)


def table_of_plans(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| budget | policy, slots x split of each layer | hits predicted | measured | points "
        "| TPOT predicted | measured | error | simulated on the same tokens | error |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        if (predicted := row["predicted"]) is None:
            continue
        layers = ", ".join(f"{slots} x {split:.2g}" for slots, split in row["layers"])
        errors = {k: "-" if v is None else f"{v:+.1%}" for k, v in row["errors"].items()}
        points = 100 * (predicted["hit_rate"] - row["hit_rate"])
        lines.append(
            f"| {row['budget']} | {row['policy']}, {layers} | {predicted['hit_rate']:.1%} | "
            f"{row['hit_rate']:.1%} | {points:+.1f} | {predicted['tpot_ms']:.4g} ms | "
            f"{row['tpot_ms']:.4g} ms | {errors['tpot_ms']} | "
            f"{row['simulated']['tpot_ms']:.4g} ms | {errors['simulated_tpot_ms']} |"
        )
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    load = "{:.2f} before, {:.2f} after".format(*result["load_average"])
    lines = [
        f"{result['machine']}; load average {load}",
        f"layers: {', '.join(result['sources'])}",
    ]
    if result["load_average"][0] > 0.5:
        lines.append("The machine was not idle: do not take these speeds for anything.")
    if not all(row["direct_io"] for row in result["rows"]):
        lines.append("Reads went through the page cache: this is not the speed of the disk.")
    for row in result["rows"]:
        if row["slot_bytes"] and not row["cache_active"]:
            lines.append(f"{row['budget']}, {row['cache']}, at the end: {row['reason']}")
    return "\n".join([*lines, "", table(result["rows"]), "", table_of_plans(result["rows"])])
