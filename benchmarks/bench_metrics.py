"""Speed of the metrics on a synthetic trace: time an activation, beside a plain Python loop.

The trace has the locality of a trained model: experts of a layer stay active with a probability
(SRP at 16 tokens near 0.5 by default), in memory-bounded shards on disk as any other trace.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

import moerun
from moerun import _moerun, metrics

POLICIES = ("sch", "lru", "lfu", "belady")
SEGMENT_LENGTHS = (4, 16, 64, 256)


def markov_routing(
    shape: tuple[int, int, int], experts: int, top_k: int, stay: float, seed: int
) -> NDArray[np.uint16]:
    """Expert ids (sequences, layers, tokens, top_k); each stays with probability `stay`.

    One that leaves is replaced by one drawn from the layer's own skewed popularity (Zipf, 0.6).
    """
    random = np.random.default_rng(seed)
    sequences, layers, tokens = shape
    favour = np.stack([-0.6 * np.log(1 + random.permutation(experts)) for _ in range(layers)])
    logits = np.tile(favour, (sequences, 1))
    active = np.argsort(-(logits + random.gumbel(size=logits.shape)), axis=1)[:, :top_k]
    ids = np.empty((sequences * layers, tokens, top_k), np.uint16)
    for token in range(tokens):
        drawn = logits + random.gumbel(size=logits.shape)
        np.put_along_axis(drawn, active, -np.inf, axis=1)
        others = np.argsort(-drawn, axis=1)[:, :top_k]
        leaves = random.random(active.shape) >= stay
        active = np.where(leaves, others, active)
        order = np.argsort(random.random(active.shape), axis=1)
        ids[:, token] = np.take_along_axis(active, order, axis=1)
    return ids.reshape(sequences, layers, tokens, top_k)


def write_trace(path: Path, ids: NDArray[np.uint16], experts: int) -> None:
    with moerun.TraceWriter(
        path,
        model="synthetic",
        num_experts=experts,
        top_k=ids.shape[3],
        moe_layers=range(ids.shape[1]),
        shard_bytes=4 << 20,
    ) as writer:
        for sequence in ids:
            writer.append(moerun.SequenceRouting(sequence), "synthetic")


def plain_hits(tokens: list[list[int]], policy: str, capacity: int, m: int) -> int:
    """One cache of one capacity as a person would write it."""
    cache: set[int] = set()
    last: dict[int, int] = {}
    count: dict[int, int] = {}
    uses: dict[int, list[int]] = {}
    for serial, expert in enumerate(e for token in tokens for e in token):
        uses.setdefault(expert, []).append(serial)
    found = serial = 0
    for t, token in enumerate(tokens):
        there = set(cache)
        found += sum(expert in there for expert in token)
        coming: dict[int, int] = {}
        for later in tokens[t : t + m] if policy == "sch" else []:
            for expert in later:
                coming[expert] = coming.get(expert, 0) + 1
        for expert in token:
            if expert not in cache:
                if len(cache) < capacity:
                    found += expert not in there
                elif policy == "lru":
                    cache.remove(min(cache, key=lambda e: last[e]))
                elif policy == "lfu":
                    cache.remove(min(cache, key=lambda e: (count[e], last[e])))
                elif policy == "sch":
                    cache.remove(min(cache, key=lambda e: (coming.get(e, 0), last[e])))
                else:
                    cache.remove(
                        max(cache, key=lambda e: uses[e][0] if uses[e] else len(uses) * 10**6 + e)
                    )
                cache.add(expert)
            uses[expert].pop(0)
            coming[expert] = coming.get(expert, 0) - 1
            serial += 1
            last[expert] = serial
            count[expert] = count.get(expert, 0) + 1
    return found


def plain_srp(tokens: list[list[int]], experts: int, m: int) -> float:
    histogram = [0] * (m + 1)
    for first in range(len(tokens) - m + 1):
        counts = [0] * experts
        for token in tokens[first : first + m]:
            for expert in token:
                counts[expert] += 1
        for f in counts:
            histogram[f] += 1
    active = sum(f * n for f, n in enumerate(histogram))
    return max(
        2
        * sum(f * n for f, n in enumerate(histogram) if f >= a)
        / (m * sum(histogram[a:]) + active)
        for a in range(m + 1)
    )


def median_seconds(rounds: int, run: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def measure(trace: moerun.Trace, ids: NDArray[np.uint16], threads: int, rounds: int) -> Any:
    """Nanoseconds an activation of each policy (core alone, and from the files), and SRP."""
    experts = trace.num_experts
    arrays = _moerun.TraceArrays(ids, trace.lengths, experts)
    activations = trace.num_tokens * trace.top_k * len(trace.moe_layers)
    result: dict[str, Any] = {"threads": threads}
    for policy in POLICIES:
        core = median_seconds(
            rounds, lambda p=policy: _moerun.replay_hits(arrays, p, 16, False, threads)
        )
        whole = median_seconds(rounds, lambda p=policy: metrics.hit_rate(trace, p, threads=threads))
        result[policy] = {
            "core_ns_per_activation": core / activations * 1e9,
            "ns_per_activation": whole / activations * 1e9,
            "seconds": whole,
        }
    for level in ("model", "layer", "expert"):
        result[f"srp_{level}_seconds"] = median_seconds(
            rounds,
            lambda lv=level: metrics.srp(trace, SEGMENT_LENGTHS, lv, threads=threads),
        )
    return result


def measure_plain(trace: moerun.Trace, ids: NDArray[np.uint16], threads: int) -> Any:
    """The plain loops on one sequence of one layer, and what the core takes for all of it."""
    tokens = ids[0, 0].tolist()
    experts = trace.num_experts
    capacity = 2 * trace.top_k
    activations = ids[0, 0].size
    arrays = _moerun.TraceArrays(ids[:1, :1].copy(), trace.lengths[:1], experts)
    result: dict[str, Any] = {"capacity": capacity}
    for policy in POLICIES:
        seconds, found = seconds_of(lambda p=policy: plain_hits(tokens, p, capacity, 16))
        expected = int(_moerun.replay_hits(arrays, policy, 16, False, threads)[0, 0, capacity])
        if found != expected:
            raise click.ClickException(f"{policy}: the plain loop finds {found}, not {expected}")
        result[policy] = {"ns_per_activation_and_capacity": seconds / activations * 1e9}
    seconds = 0.0
    for m in SEGMENT_LENGTHS:
        one, best = seconds_of(lambda m=m: plain_srp(tokens, experts, m))
        seconds += one
        histograms = _moerun.layer_histograms(arrays, m, threads)
        if abs(best - _moerun.srp(histograms[:, 0])[0][0]) > 1e-12:
            raise click.ClickException(f"SRP({m}) of the plain loop differs")
    result["srp_seconds_per_sequence_and_layer"] = seconds
    return result


def report(result: dict[str, Any]) -> str:
    shape, plain = result["trace"], result["plain"]
    lines = [
        "{sequences} sequences x {layers} layers x {tokens} tokens, {experts} experts, top-{top_k};"
        " SRP(16) = {srp_16:.3f}".format(**shape),
        f"{'':22}"
        + "".join(f"{run['threads']:>10} thr" for run in result["runs"])
        + "   plain loop",
    ]
    for policy in POLICIES:
        each = plain[policy]["ns_per_activation_and_capacity"] * shape["experts"]
        first = result["runs"][0][policy]["ns_per_activation"]
        lines.append(
            f"{policy + ', ns/activation':22}"
            + "".join(f"{run[policy]['ns_per_activation']:>14.1f}" for run in result["runs"])
            + f"   {each / first:.0f} x slower for all {shape['experts']} capacities"
        )
        lines.append(
            f"{'  core alone':22}"
            + "".join(f"{run[policy]['core_ns_per_activation']:>14.1f}" for run in result["runs"])
        )
    total = plain["srp_seconds_per_sequence_and_layer"] * shape["sequences"] * shape["layers"]
    for level in ("model", "layer", "expert"):
        name = f"srp_{level}_seconds"
        row = f"{f'SRP of {level}, s':22}" + "".join(f"{r[name]:>14.3f}" for r in result["runs"])
        lines.append(
            row + (f"   {total / result['runs'][0][name]:.0f} x slower" * (level == "model"))
        )
    return "\n".join(lines)


@click.command()
@click.option("--sequences", default=64, show_default=True)
@click.option("--layers", default=16, show_default=True)
@click.option("--tokens", default=512, show_default=True)
@click.option("--experts", default=64, show_default=True)
@click.option("--top-k", default=8, show_default=True)
@click.option("--stay", default=0.65, show_default=True, help="Of the Markov source.")
@click.option("--rounds", default=5, show_default=True, help="The median is reported.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(
    sequences: int,
    layers: int,
    tokens: int,
    experts: int,
    top_k: int,
    stay: float,
    rounds: int,
    as_json: bool,
) -> None:
    """Measure SRP and the replayed hit rates on one thread and on all cores."""
    ids = markov_routing((sequences, layers, tokens), experts, top_k, stay, seed=0)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.safetensors"
        write_trace(path, ids, experts)
        trace = moerun.Trace.open(path)
        result = {
            "moerun": moerun.__version__,
            "machine": {"processor": platform.processor(), "cores": cores, "python": sys.version},
            "trace": {
                "sequences": sequences,
                "layers": layers,
                "tokens": tokens,
                "experts": experts,
                "top_k": top_k,
                "files": len(trace.files),
                "srp_16": metrics.srp(trace, (16,))["srp"].item(),
            },
            "runs": [measure(trace, ids, n, rounds) for n in sorted({1, cores})],
            "plain": measure_plain(trace, ids, 1),
        }
    click.echo(json.dumps(result, indent=2) if as_json else report(result))


if __name__ == "__main__":
    main()
