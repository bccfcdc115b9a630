"""Which policy hits most with half of the experts cached, and on what kind of routing.

The live cache's own policies, replayed (moerun.planning.layer_curves); random eviction, which is no
policy of moerun; and two bounds. On routing of the shipped model, on traces that are given, and on
synthetic routing that has one kind of locality at a time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from random_eviction import random_hits
from synthetic_routing import Source, synthetic_routing, write_trace

import moerun
from moerun import metrics
from moerun.planning import layer_curves

GOLDEN = Path(__file__).parents[1] / "shared" / "golden"
POLICIES = ("lcp", "lfu", "lru")
# What MoEpic reports of Qwen1.5-MoE with 30 of 60 experts (docs/DESIGN.md, section 10).
PUBLISHED = {"lcp": 0.622, "lfu": 0.607, "lru": 0.564, "random": 0.497}
WINDOW = 16

# 60 experts, 4 active, as Qwen1.5-MoE.
SETTINGS = {
    "no locality": Source(),
    "favourites": Source(skew=0.6),
    "reuse": Source(stay=0.4),
    "favourites, reuse": Source(skew=0.6, stay=0.4),
    "topics of 200 tokens": Source(topic_skew=0.6, topic_tokens=200),
    "favourites, weak topics of 200": Source(skew=0.6, topic_skew=0.3, topic_tokens=200),
    "favourites, topics of 25": Source(skew=0.6, topic_skew=0.6, topic_tokens=25),
    "favourites, topics of 100": Source(skew=0.6, topic_skew=0.6, topic_tokens=100),
    "favourites, topics of 400": Source(skew=0.6, topic_skew=0.6, topic_tokens=400),
    "favourites, strong topics of 200": Source(skew=0.6, topic_skew=1.0, topic_tokens=200),
    "all three": Source(skew=0.6, topic_skew=0.6, topic_tokens=200, stay=0.3),
    "the SRP of Qwen1.5-MoE": Source(skew=0.4, topic_skew=0.5, topic_tokens=150),
}

# --- traces ---------------------------------------------------------------------------------------


def record_shipped(path: Path, samples: int, length: int) -> moerun.Trace:
    """Record the shipped model on what every Python brings along: sources, then its manual."""
    from moerun.recording import NativeEngine, default_data, record

    with moerun.Model.load(device="cpu", context_length=length) as model:
        engine = NativeEngine(model, "tiny-olmoe")
        record(engine, default_data(0), path, length=length, samples=samples)
    return moerun.Trace.open(path)


def alternate(trace: moerun.Trace, path: Path) -> moerun.Trace:
    """The same sequences, but after one of a domain comes one of the next."""
    waiting: dict[str, list[NDArray[np.uint16]]] = {}
    for shard in trace.shards():
        for ids, length, domain in zip(shard.expert_ids, shard.lengths, shard.domains, strict=True):
            waiting.setdefault(domain, []).append(ids[:, :length])
    rounds = max(len(own) for own in waiting.values())
    with moerun.TraceWriter(
        path,
        model=trace.model,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        moe_layers=trace.moe_layers,
    ) as writer:
        for turn in range(rounds):
            for domain, own in waiting.items():
                if turn < len(own):
                    writer.append(moerun.SequenceRouting(own[turn]), domain)
    return moerun.Trace.open(path)


def traces(
    folder: Path,
    given: list[Path],
    samples: int,
    length: int,
    synthetic: tuple[int, int, int],
    seed: int,
) -> Iterator[tuple[str, moerun.Trace, Source | None]]:
    """Yield the name of each trace, the trace, and what it was drawn from."""
    if samples:
        shipped = record_shipped(folder / "shipped.safetensors", samples, length)
        yield "shipped model, one kind of text, then the other", shipped, None
        alternating = alternate(shipped, folder / "alternating.safetensors")
        yield "shipped model, kinds alternate", alternating, None
    for path in given:
        trace = moerun.Trace.open(path)
        yield f"{path.stem}: {trace.num_experts} experts, top-{trace.top_k}", trace, None
    sequences, layers, tokens = synthetic
    for number, (name, source) in enumerate(SETTINGS.items() if sequences else ()):
        ids = synthetic_routing([source] * layers, sequences, tokens, 60, 4, seed + number)
        yield name, write_trace(folder / f"synthetic-{number}.safetensors", ids, 60), source


# --- hit rates ------------------------------------------------------------------------------------


def streams(trace: moerun.Trace, restart: bool) -> Iterator[NDArray[np.uint16]]:
    """Yield routing (layers, tokens, top_k) of which each starts with empty slots.

    As `layer_curves` does it: without `restart`, a file of the trace is one.
    """
    for shard in trace.shards():
        own = [ids[:, :length] for ids, length in zip(shard.expert_ids, shard.lengths, strict=True)]
        yield from own if restart else [np.concatenate(own, axis=1)]


def random_rates(
    trace: moerun.Trace, slots: int, restart: bool, caches: int, seed: int
) -> NDArray[np.float64]:
    """Hit rates of random eviction, (caches, layers)."""
    hits = np.zeros((caches, len(trace.moe_layers)), np.int64)
    for number, ids in enumerate(streams(trace, restart)):
        hits += random_hits(ids, trace.num_experts, slots, caches, seed + number)
    rates: NDArray[np.float64] = hits / (trace.num_tokens * trace.top_k)
    return rates


def measure(trace: moerun.Trace, share: float, restart: bool, caches: int, seed: int) -> Any:
    slots = round(share * trace.num_experts)
    curves = {policy: layer_curves(trace, policy, restart=restart) for policy in POLICIES}
    rates = {policy: curve.hit_rate[:, slots] for policy, curve in curves.items()}
    chance = random_rates(trace, slots, restart, caches, seed)
    rates["random"] = chance.mean(axis=0)
    rates["static"] = curves["lcp"].static[:, slots]
    rates["optimal"] = curves["lcp"].optimal[:, slots]
    return {
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "slots": slots,
        "sequences": trace.num_sequences,
        "tokens": trace.num_tokens,
        "restart": restart,
        "srp_16": metrics.srp(trace, (WINDOW,))["srp"].item(),
        "hit_rate": {name: float(rate.mean()) for name, rate in rates.items()},
        "random_set": slots / trace.num_experts,
        "random_spread": float(chance.mean(axis=1).std(ddof=1)) if caches > 1 else None,
        "hit_rate_of_layers": {name: rate.tolist() for name, rate in rates.items()},
    }


# --- the run --------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Rates with slots that go on from sequence to sequence / emptied before each."""
    lines = [
        "| routing | SRP(16) | LCP | LFU | LRU | random eviction | best static set | optimal |",
        "|" + "---|" * 8,
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        both = [row for row in rows if row["name"] == name]
        cells = [name, f"{both[0]['srp_16']:.2f}"]
        cells += [" / ".join(cell(row, rule) for row in both) for rule in (*POLICIES, "random")]
        cells.append(cell(both[0], "static"))
        cells.append(" / ".join(cell(row, "optimal") for row in both))
        lines.append("| " + " | ".join(cells) + " |")
    published = " | ".join(f"{100 * rate:.1f}" for rate in PUBLISHED.values())
    return "\n".join([*lines, f"| published, Qwen1.5-MoE | 0.31 | {published} | | |"])


def cell(row: dict[str, Any], rule: str) -> str:
    """The rate in percent, bold if no policy has more in the digits that are printed."""
    texts = {name: f"{100 * rate:.1f}" for name, rate in row["hit_rate"].items()}
    best = max((texts[policy] for policy in POLICIES), key=float)
    return f"**{texts[rule]}**" if rule in POLICIES and texts[rule] == best else texts[rule]


def legend(rows: list[dict[str, Any]]) -> str:
    spreads = [row["random_spread"] for row in rows if row["random_spread"] is not None]
    lines = [
        "Hits in %, mean of the layers: slots go on from sequence to sequence / are emptied before "
        f"each. A random set that stays would have {100 * rows[0]['random_set']:.0f}."
    ]
    if spreads:
        lines.append(
            "random is a mean of several caches, which differ by at most "
            f"{100 * max(spreads):.2f} (standard deviation)."
        )
    for row in rows:
        if row["source"] is not None and not row["restart"]:
            lines.append(
                f"{row['name']}: "
                + ", ".join(f"{name} {value:g}" for name, value in row["source"].items())
            )
    return "\n".join(lines)


@click.command()
@click.option(
    "--trace",
    "given",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Another trace; may be given more than once.  [default: those in shared/golden, if any]",
)
@click.option("--share", default=0.5, show_default=True, help="Of the experts that have slots.")
@click.option(
    "--samples", default=64, show_default=True, help="Of each kind of text; 0: no shipped model."
)
@click.option("--length", default=512, show_default=True, help="Tokens of a sample.")
@click.option("--sequences", default=64, show_default=True, help="Synthetic ones; 0 for none.")
@click.option("--layers", default=4, show_default=True, help="Of the synthetic routing.")
@click.option("--tokens", default=512, show_default=True, help="Of a synthetic sequence.")
@click.option("--caches", default=3, show_default=True, help="Of random eviction, averaged.")
@click.option("--seed", default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(
    given: tuple[Path, ...],
    share: float,
    samples: int,
    length: int,
    sequences: int,
    layers: int,
    tokens: int,
    caches: int,
    seed: int,
    as_json: bool,
) -> None:
    """Compare the hit rates of the policies with a share of the experts cached."""
    paths = list(given) or sorted(GOLDEN.glob("*.safetensors"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        every = traces(Path(folder), paths, samples, length, (sequences, layers, tokens), seed)
        for name, trace, source in every:
            click.echo(name, err=True)
            for restart in (False, True):
                facts = {"name": name, "source": None if source is None else asdict(source)}
                rows.append(facts | measure(trace, share, restart, caches, seed))
    if as_json:
        print(json.dumps({"moerun": moerun.__version__, "published": PUBLISHED, "rows": rows}))
        return
    print(table(rows))
    print(legend(rows))


if __name__ == "__main__":
    main()
