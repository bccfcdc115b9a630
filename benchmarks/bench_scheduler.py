"""Active experts of two batches: in order of arrival, by topic, and from the token scheduler.

The paths are true routing: what a predictor that is always right would give. Synthetic mixtures of
topics in the dimensions of real models, and the shipped model on two kinds of text.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from bench_policies import record_shipped
from numpy.typing import NDArray

import moerun
from moerun.scheduling import active_experts, split_batches

# Chance of an expert: (1 + a)^-skew * (1 + b)^-topic_skew, a its place in an order that all
# sequences share, b its place in that of the sequence's topic.
MIXTURES = {
    "2 topics": (2, 0.3, 1.5),
    "2 topics, faint": (2, 0.6, 0.5),
    "8 topics": (8, 0.3, 1.5),
    "no topics": (1, 0.6, 0.0),
}
EXACT = 10  # up to so many sequences every split is tried

Instance = tuple[NDArray[np.bool_], NDArray[np.int64]]  # paths (M, L, E), topic of each sequence


def one_hot(ids: NDArray[Any], experts: int) -> NDArray[np.bool_]:
    """Expert ids (..., k) as sets (..., experts)."""
    sets = np.zeros((*ids.shape[:-1], experts), np.bool_)
    np.put_along_axis(sets, ids.astype(np.int64), True, axis=-1)
    return sets


def mixture(
    random: np.random.Generator, waiting: int, shape: tuple[int, int, int], name: str
) -> Instance:
    layers, experts, top_k = shape
    topics, skew, topic_skew = MIXTURES[name]

    def places(count: int) -> NDArray[np.int64]:
        return random.random((count, layers, experts)).argsort(axis=-1)

    likely = -skew * np.log1p(places(1)) - topic_skew * np.log1p(places(topics))
    topic_of = random.permutation(np.arange(waiting) % topics)
    drawn = likely[topic_of] + random.gumbel(size=(waiting, layers, experts))
    return one_hot(np.argsort(-drawn, axis=-1)[..., :top_k], experts), topic_of


def from_trace(random: np.random.Generator, waiting: int, trace: moerun.Trace) -> Instance:
    """A random token of as many random sequences, the same number of each domain."""
    ids = np.concatenate([shard.expert_ids for shard in trace.shards()])
    names = {name: number for number, name in enumerate(trace.domain_names)}
    domains = np.array([names[domain] for domain in trace.domains])
    members = [random.permutation(np.flatnonzero(domains == d)) for d in range(len(names))]
    chosen = [m[: len(range(d, waiting, len(names)))] for d, m in enumerate(members)]
    order = random.permutation(np.concatenate(chosen))
    if len(order) < waiting:
        raise click.ClickException(f"{waiting} sequences wait, but the trace has {len(ids)}")
    tokens = random.integers(trace.lengths[order])
    return one_hot(ids[order, :, tokens], trace.num_experts), domains[order]


def bound(paths: NDArray[np.bool_], half: int) -> int:
    """No split has fewer active experts in all; up to EXACT sequences, one has as many."""
    if len(paths) <= EXACT:
        everyone = set(range(len(paths)))
        return min(
            active_experts(paths, chosen) + active_experts(paths, sorted(everyone - set(chosen)))
            for chosen in itertools.combinations(everyone, half)
        )
    users = paths.sum(axis=0)
    return int((users > 0).sum() + (users > len(paths) - half).sum())


def measure(instances: Iterator[Instance]) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    for paths, topic_of in instances:
        half = len(paths) // 2
        sizes = (half, len(paths) - half)
        start = time.thread_time()
        batches = split_batches(paths, sizes)
        seconds = time.thread_time() - start
        order = np.argsort(topic_of, kind="stable")
        for name, split in (
            ("arrival", np.split(np.arange(len(paths)), [half])),
            ("by_topic", np.split(order, [half])),
            ("scheduled", batches),
        ):
            each = [active_experts(paths, batch) for batch in split]
            found.setdefault(name, []).append(sum(each) / 2)
        found.setdefault("bound", []).append(bound(paths, half) / 2)
        found.setdefault("milliseconds", []).append(1e3 * seconds)
    row: dict[str, Any] = {name: statistics.mean(values) for name, values in found.items()}
    row["milliseconds"] = statistics.median(found["milliseconds"])
    row["most_milliseconds"] = max(found["milliseconds"])
    return row


def rows_of(
    shapes: list[tuple[int, int, int]],
    waiting: tuple[int, ...],
    count: int,
    trace: moerun.Trace | None,
    seed: int,
) -> Iterator[dict[str, Any]]:
    def row(name: str, shape: tuple[int, ...], number: int, draw: Any) -> dict[str, Any]:
        random = np.random.default_rng(seed)
        facts = {"paths": name, "shape": shape, "waiting": number}
        return facts | measure(draw(random) for _ in range(count))

    for number in waiting:
        if trace is not None:
            shape = (len(trace.moe_layers), trace.num_experts, trace.top_k)
            name = f"{trace.model}: {', '.join(trace.domain_names)}"
            yield row(name, shape, number, lambda r, n=number: from_trace(r, n, trace))
        for shape in shapes:
            for name in MIXTURES:
                yield row(
                    name, shape, number, lambda r, n=number, s=shape, m=name: mixture(r, n, s, m)
                )


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| paths | layers x experts, k | waiting | arrival | by topic | scheduled | saved | "
        "bound | ms |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        layers, experts, top_k = row["shape"]
        saved = 1 - row["scheduled"] / row["arrival"] if row["arrival"] else 0
        exact = "=" if row["waiting"] <= EXACT else ""
        cells = [row["paths"], f"{layers} x {experts}, {top_k}", f"2 x {row['waiting'] / 2:g}"]
        cells += [f"{row[name]:.1f}" for name in ("arrival", "by_topic", "scheduled")]
        cells += [f"{saved:.1%}", f"{exact}{row['bound']:.1f}", f"{row['milliseconds']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise click.BadParameter(f"expected LAYERSxEXPERTSxACTIVE, such as 16x64x8, found {text!r}")
    layers, experts, top_k = map(int, parts)
    if not 0 < top_k <= experts:
        raise click.BadParameter(f"expected 1 to {experts} active experts, found {top_k}")
    return layers, experts, top_k


@click.command()
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    default=["16x64x8", "27x128x8", "58x256x8"],
    show_default=True,
    help="Layers, experts of each, and how many are active; of the synthetic paths.",
)
@click.option("--waiting", multiple=True, type=int, default=[8, 32, 128], show_default=True)
@click.option("--instances", default=30, show_default=True, help="Of each kind; the mean.")
@click.option(
    "--trace",
    "trace_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Of two domains or more.  [default: the shipped model is recorded]",
)
@click.option("--no-trace", is_flag=True, help="Synthetic paths only.")
@click.option("--seed", default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(
    shapes: tuple[str, ...],
    waiting: tuple[int, ...],
    instances: int,
    trace_path: Path | None,
    no_trace: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Compare active experts of two batches: arrival order, by topic, and scheduled."""
    dimensions = [parse_shape(shape) for shape in shapes]
    with tempfile.TemporaryDirectory() as folder:
        if no_trace:
            trace = None
        elif trace_path is not None:
            trace = moerun.Trace.open(trace_path)
        else:
            samples = max(64, -(-max(waiting) // 2))
            trace = record_shipped(Path(folder) / "shipped.safetensors", samples, 128)
        rows = []
        for row in rows_of(dimensions, waiting, instances, trace, seed):
            click.echo(f"{row['paths']}, {row['waiting']} waiting", err=True)
            rows.append(row)
    if as_json:
        machine = platform.processor() or platform.machine()
        print(json.dumps({"moerun": moerun.__version__, "machine": machine, "rows": rows}))
        return
    print(table(rows))
    print(
        "Experts of all layers that a batch activates, mean of the two. Bound: no split has fewer"
    )
    print("(=: all were tried). Milliseconds of one core, median.")


if __name__ == "__main__":
    main()
