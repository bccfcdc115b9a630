"""Planned caches against plain ones, live, experts on disk: speed, and how right the planner was.

The layers of real models differ in how well a cache serves them; random weights make them all
alike. So the routing is replayed, and synthetic: some layers have strong favourites, some nearly
none, some change with the topic, some use again what they just used. The plans are made from an
earlier part of the same stream than the one that is decoded.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import make_checkpoint
import numpy as np
from bench_cache import in_process, predictions_of
from plans_report import report
from synthetic_routing import Source, synthetic_routing, write_trace

import moerun
from moerun.planning import CostModel, Geometry, Plan, find_plan

# The layers take these in turn.
KINDS = {
    "favourites": Source(skew=1.2),
    "even": Source(skew=0.1),
    "topics": Source(topic_skew=1.2, topic_tokens=64),
    "reuse": Source(skew=0.6, stay=0.65),
}
PROMPT = [1, 2, 3]
PLANNED = "planned"
# What is compared with the plan at the same budget.
PLAIN: dict[str, dict[str, Any]] = {
    "uniform, split 0.5": {"policy": "lcp", "split": [0.5]},
    "whole experts, LRU": {"policy": "lru", "split": [1.0]},
    "whole experts, LCP": {"policy": "lcp", "split": [1.0]},
    "prefetch only": {"policy": "lcp", "split": [0.0], "prefetch": "on"},
}
COUNTERS = ("lookups", "hits", "top_hits", "demand_bytes", "prefetch_bytes", "stalled_s")

# --- one configuration, in a process of its own ---------------------------------------------------


def measure(
    checkpoint: str, routing: str, warm_up: int, tokens: int, options: dict[str, Any]
) -> dict[str, Any]:
    with np.load(routing) as arrays:
        replay = (arrays["ids"], arrays["predicted"])
    native = moerun._moerun.Model(checkpoint, routing_replay=replay, **options)
    generation = native.generate(
        PROMPT, max_new_tokens=warm_up + tokens + 1, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0,
        repetition_penalty=1.0, seed=1, stop_token_ids=[],
    )  # fmt: skip
    before: dict[str, Any] = {}
    start = 0.0
    for number, _ in enumerate(generation):
        if number == warm_up:  # the prompt gave the first token
            before = native.stats()["cache"]["total"]
            start = time.perf_counter()
    seconds = time.perf_counter() - start
    stats = native.stats()
    cache = stats["cache"]
    counted = {name: cache["total"][name] - before[name] for name in COUNTERS}
    return {
        "tpot_ms": 1e3 * seconds / tokens,
        "hit_rate": (counted["hits"] + counted["top_hits"]) / max(counted["lookups"], 1),
        "demand_bytes_per_token": counted["demand_bytes"] / tokens,
        "prefetch_bytes_per_token": counted["prefetch_bytes"] / tokens,
        "stalled_ms": 1e3 * counted["stalled_s"] / tokens,
        "ratio_to_limit": cache["ratio_to_limit"],
        "arena_bytes": cache["arena_bytes"],
        "slot_bytes": cache["slot_bytes"],
        "cache_active": cache["cache_active"],
        "prefetch_active": cache["prefetch_active"],
        "reason": cache["reason"],
        "direct_io": cache["direct_io"],
        "logits_hash": stats["logits_hash"],
    }


# --- what is planned with -------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """What is decoded, and what is known of it before.

    Attributes:
        file: ids and predictions for `measure`.
        known: trace of the tokens before those.
        decoded: trace of those.
        sources: of the layers.
    """

    file: Path
    known: moerun.Trace
    decoded: moerun.Trace
    sources: list[str]


def make_routing(
    folder: Path, geometry: Geometry, plan_tokens: int, tokens: int, accuracy: float, seed: int
) -> Routing:
    names = [list(KINDS)[i % len(KINDS)] for i in range(len(geometry.moe_layers))]
    sources = [KINDS[name] for name in names]
    experts, top_k = geometry.num_experts, geometry.top_k
    ids = synthetic_routing(sources, 1, plan_tokens + tokens, experts, top_k, seed)
    by_token = ids[0].transpose(1, 0, 2)  # (tokens, layers, top_k)
    predicted = predictions_of(by_token.astype(np.int32), experts, accuracy, seed + 1)
    file = folder / "routing.npz"
    np.savez(file, ids=by_token[plan_tokens:].astype(np.int32), predicted=predicted[plan_tokens:])
    guesses = predicted.transpose(1, 0, 2)[None].astype(np.uint16)
    parts = {"known": slice(0, plan_tokens), "decoded": slice(plan_tokens, None)}
    traces = [
        write_trace(
            folder / f"{name}.safetensors",
            ids[:, :, part],
            experts,
            guesses[:, :, part],
            geometry.moe_layers,
        )
        for name, part in parts.items()
    ]
    return Routing(file, *traces, names)


def costs_of(
    checkpoint: Path, file: Path | None, pack_folder: Path, threads: int, context_tokens: int
) -> CostModel:
    if file is not None:
        return CostModel.from_json(file.read_text(), str(file))
    from moerun.planning import calibrate

    return calibrate(
        checkpoint,
        device="cpu",
        pack=pack_folder,
        threads=threads,
        context_tokens=context_tokens,
    )


def simulated(
    checkpoint: Path,
    plan_file: Path,
    plan: Plan,
    routing: Routing,
    costs: CostModel,
    pack: Path,
    warm_up: int,
) -> dict[str, float]:
    """What the simulator says of the very tokens that are decoded, with a cache that starts empty.

    The hit rate is of all of them: a simulation has no middle from which to count.
    """
    found = moerun.simulate(
        routing.decoded,
        checkpoint,
        costs=costs,
        plan=plan_file,
        pack=pack,
        prefetch="auto" if plan.prefetch == "auto" else False,
    )
    return {"tpot_ms": 1e3 * float(found.token_s[warm_up:].mean())}


# --- the run --------------------------------------------------------------------------------------


@contextlib.contextmanager
def places(
    checkpoint: Path | None, like: str, layers: int, folder: Path | None, pack: Path | None
) -> Iterator[tuple[Path, Path, Path]]:
    """Yield the checkpoint, the folder of its record file, and one for small files.

    What was not given is made in a temporary folder, beside the checkpoint where there is one.
    """
    beside = folder or (checkpoint and checkpoint.resolve().parent)
    with tempfile.TemporaryDirectory(prefix="moerun-plans-", dir=beside) as name:
        temporary = Path(name)
        if checkpoint is None:
            checkpoint = temporary / like
            arguments = ["--like", like, "--layers", str(layers), "-o", str(checkpoint)]
            with contextlib.redirect_stdout(sys.stderr):
                make_checkpoint.main(arguments, standalone_mode=False)
        pack = pack or temporary / "pack"
        pack.mkdir(exist_ok=True, parents=True)
        yield checkpoint, pack, temporary


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median time, and the times of all."""
    ordered = sorted(runs, key=lambda run: run["tpot_ms"])
    times = [run["tpot_ms"] for run in runs]
    median = statistics.median(times)
    middle = ordered[(len(ordered) - 1) // 2]
    return middle | {"tpot_ms": median, "tokens_per_s": 1e3 / median, "tpot_ms_of_runs": times}


def run(
    checkpoint: Path,
    budgets: list[str],
    plan_of: Callable[[int], Plan],
    simulate: Callable[[Plan], dict[str, float]],
    decoded: tuple[str, int, int],
    options: dict[str, Any],
    repeats: int,
    caches: tuple[str, ...],
    plan_file: Path,
) -> list[dict[str, Any]]:
    """Every cache at every budget, `repeats` times in turn, so that what drifts hits all alike."""
    plans = {}
    for budget in budgets:
        num_bytes = moerun.dry_run(checkpoint, "cpu", expert_budget=budget)["budget_bytes"]
        plans[budget] = plan_of(num_bytes)
        if plans[budget].is_resident:
            raise click.ClickException(f"{budget} holds every expert: there is nothing to compare")
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for repeat in range(repeats):
        for budget, plan in plans.items():
            plan_file.write_text(plan.to_json())
            for cache in caches:
                click.echo(f"{repeat + 1}/{repeats}: {budget}, {cache}", err=True)
                own = {"expert_budget": str(plan.budget_bytes)} | PLAIN.get(cache, {})
                own = {"plan": str(plan_file)} if cache == PLANNED else own
                arguments = (str(checkpoint), *decoded, options | own)
                done = in_process(None, "measure", *arguments, script=__file__)
                runs.setdefault((budget, cache), []).append(done)
    if len({each["logits_hash"] for own_runs in runs.values() for each in own_runs}) != 1:
        raise click.ClickException("the caches disagree about the logits")
    rows = []
    for (budget, cache), own_runs in runs.items():
        plan = plans[budget]
        row = {"budget": budget, "budget_bytes": plan.budget_bytes, "cache": cache}
        row |= median_of(own_runs) | {"predicted": None, "layers": None}
        if cache == PLANNED:
            row["layers"] = [(each.slots, each.split) for each in plan.layers]
            plan_file.write_text(plan.to_json())
            row |= {"predicted": plan.predicted.as_dict(), "simulated": simulate(plan)}
            row |= {"policy": plan.policy}
            row = with_errors(row)
        rows.append(row)
    return rows


def with_errors(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a plan, with how far off its prediction was, as a share of what was measured."""
    errors = {}
    for name in ("tpot_ms", "hit_rate"):
        errors[name] = row["predicted"][name] / row[name] - 1 if row[name] else None
    errors["simulated_tpot_ms"] = row["simulated"]["tpot_ms"] / row["tpot_ms"] - 1
    return row | {"errors": errors}


_EPILOG = """\b
The real run, on a machine that does nothing else (about an hour on two cores):
  python benchmarks/make_checkpoint.py --like olmoe-1b-7b --layers 4 -o /tmp/bench/olmoe4
  python benchmarks/bench_plans.py --checkpoint /tmp/bench/olmoe4 --plot plans.png
It needs as much free disk beside the checkpoint as the experts take (3.2 GB), for the record file.

\b
To see that it works (its speeds mean nothing):
  python benchmarks/bench_plans.py --like tiny --warm-up 8 --tokens 16 --plan-tokens 64 --repeats 1
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="See make_checkpoint.py.  [default: made for this run, of --like and --layers]",
)
@click.option(
    "--like",
    default="olmoe-1b-7b",
    show_default=True,
    type=click.Choice(sorted(make_checkpoint.CONFIGS)),
)
@click.option("--layers", default=4, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--costs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A CostModel as JSON.  [default: measured first]",
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    default=["15%", "30%", "45%", "60%", "75%"],
    show_default=True,
)
@click.option("--warm-up", default=144, show_default=True, help="Tokens before those that count.")
@click.option("--tokens", default=96, show_default=True, help="Tokens that count.")
@click.option("--plan-tokens", default=2048, show_default=True, help="Known to the planner.")
@click.option("--repeats", default=3, show_default=True, help="The median is reported.")
@click.option(
    "--cache",
    "caches",
    multiple=True,
    type=click.Choice([PLANNED, *PLAIN]),
    default=[PLANNED, *PLAIN],
    show_default="all",
)
@click.option("--threads", default=2, show_default=True)
@click.option("--accuracy", default=0.8, show_default=True, help="Of the replayed predictions.")
@click.option("--seed", default=1, show_default=True)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="For temporary files.  [default: beside the checkpoint]",
)
@click.option(
    "--pack-folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Of the record file, which stays there.  [default: a temporary one]",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="A .png to draw.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--worker", hidden=True)
def main(
    checkpoint: Path | None,
    like: str,
    layers: int,
    costs: Path | None,
    budgets: tuple[str, ...],
    warm_up: int,
    tokens: int,
    plan_tokens: int,
    repeats: int,
    caches: tuple[str, ...],
    threads: int,
    accuracy: float,
    seed: int,
    folder: Path | None,
    pack_folder: Path | None,
    plot: Path | None,
    as_json: bool,
    worker: str | None,
) -> None:
    """Decode under planned and plain caches of the same budgets, and check the predictions."""
    if worker is not None:
        function, *arguments = json.loads(worker)
        print(json.dumps(globals()[function](*arguments)))
        return
    load_before = os.getloadavg()[0]
    with places(checkpoint, like, layers, folder, pack_folder) as (model, pack, temporary):
        geometry = Geometry.of_model(model, "cpu", pack)
        routing = make_routing(temporary, geometry, plan_tokens, warm_up + tokens, accuracy, seed)
        context = len(PROMPT) + warm_up + tokens // 2
        cost_model = costs_of(model, costs, pack, threads, context)
        rows = run(
            model,
            list(budgets),
            lambda budget: find_plan(
                routing.known, model, costs=cost_model, budget_bytes=budget, pack=pack
            )[0],
            lambda plan: simulated(
                model, temporary / "plan.json", plan, routing, cost_model, pack, warm_up
            ),
            (str(routing.file), warm_up, tokens),
            {"threads": threads, "pack_folder": str(pack)},
            repeats,
            caches,
            temporary / "plan.json",
        )
        sources = routing.sources
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_average": [load_before, os.getloadavg()[0]],
        "moerun": moerun.__version__,
        "model": geometry.model,
        "total_expert_bytes": geometry.total_bytes,
        "sources": sources,
        "prediction_accuracy": accuracy,
        "tokens": {"known": plan_tokens, "warm_up": warm_up, "measured": tokens},
        "costs": asdict(cost_model),
        "rows": rows,
    }
    if plot is not None:
        from plans_figure import plans_figure

        from moerun_tools.figures import draw

        plot.write_bytes(draw(lambda: plans_figure(result), "png"))
    print(json.dumps(result) if as_json else report(result))


if __name__ == "__main__":
    main()
