"""What moe-plan and the simulator predict of a model, and what a run of it measures.

Texts that the model generates make the plans; then other texts, from other random numbers, are
generated under each of them. So the planner's error has two parts: the text is another one, and
the times are modelled. The simulator, given the very tokens, has the second alone.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click

import moerun
from moerun.planning import CostModel, Geometry, Plan, calibrate, find_plan

PROMPTS = ("import os\n\n\ndef ", "NAME\n    ls - list directory contents\n\n", "class Parser:\n")


MEASURED_TEXTS = 12


def generated(model: moerun.Model, tokens: int) -> tuple[float, float]:
    """Decode texts; return milliseconds a token, and the share of hits."""
    before = model.stats()["cache"]["total"]
    seconds = 0.0
    for seed in range(MEASURED_TEXTS):
        ids = model.tokenizer.encode(PROMPTS[seed % len(PROMPTS)])
        text = model.generate(ids, tokens, temperature=0.8, seed=seed, ignore_eos=True)
        next(text)
        start = time.perf_counter()
        for _ in text:
            pass
        seconds += time.perf_counter() - start
    total = model.stats()["cache"]["total"]
    seen = {name: total[name] - before[name] for name in ("lookups", "hits", "top_hits")}
    hit_rate = (seen["hits"] + seen["top_hits"]) / seen["lookups"]
    return 1e3 * seconds / (MEASURED_TEXTS * (tokens - 1)), hit_rate


def routing_of(
    model: moerun.Model, tokens: int, texts: int, first_seed: int
) -> list[moerun.SequenceRouting]:
    """The routing of the tokens that `generated` decodes, or of others like them."""
    return [
        model.trace(
            model.tokenizer.encode(PROMPTS[text % len(PROMPTS)]),
            generate=tokens - 1,
            temperature=0.8,
            seed=first_seed + text,
            with_prefetch=True,
        )
        for text in range(texts)
    ]


def known_trace(model: moerun.Model, path: Path, tokens: int, texts: int) -> moerun.Trace:
    with moerun.TraceWriter(
        path,
        model=model.path.name,
        num_experts=model.config["num_experts"],
        top_k=model.config["top_k"],
        moe_layers=model.moe_layers,
    ) as writer:
        for routing in routing_of(model, tokens, texts, 1000):
            writer.append(routing, "generated")
    return moerun.Trace.open(path)


def measure(
    directory: Path, plan_file: Path, prefetch: bool, tokens: int, repeats: int, pack: Any
) -> dict[str, Any]:
    times, rates = [], []
    for _ in range(repeats):
        with moerun.Model.load(
            directory, device="cpu", plan=plan_file, prefetch=prefetch, pack=pack
        ) as model:
            tpot_ms, hit_rate = generated(model, tokens)
        times.append(tpot_ms)
        rates.append(hit_rate)
    return {
        "tpot_ms": statistics.median(times),
        "tpot_ms_of_runs": times,
        "hit_rate": statistics.median(rates),
    }


def row_of(
    directory: Path,
    plan: Plan,
    prefetch: bool,
    sequences: list[moerun.SequenceRouting],
    costs: CostModel,
    tokens: int,
    repeats: int,
    pack: Any,
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        plan_file = Path(folder) / "plan.json"
        plan_file.write_text(plan.to_json())
        found = moerun.simulate(
            sequences, directory, costs=costs, plan=plan_file, prefetch=prefetch, pack=pack
        )
        measured = measure(directory, plan_file, prefetch, tokens, repeats, pack)
    total = found.cache["total"]
    simulated = {
        "tpot_ms": 1e3 * found.tpot_s,
        "hit_rate": (total["hits"] + total["top_hits"]) / total["lookups"],
    }
    return {
        "prefetch": prefetch,
        "plan": plan.predicted.as_dict(),
        "simulated": simulated,
        "measured": measured,
    }


def report(result: dict[str, Any]) -> str:
    load = "{:.2f} before, {:.2f} after".format(*result["load_average"])
    lines = [
        f"{result['machine']}; load average {load}",
        "",
        "| budget | prefetch | hits (%): plan | simulated | measured | TPOT (ms): plan | error | "
        "simulated | error | measured |",
        "|" + "---|" * 10,
    ]
    for row in result["rows"]:
        plan, simulated, measured = row["plan"], row["simulated"], row["measured"]
        hits = " | ".join(f"{100 * each['hit_rate']:.1f}" for each in (plan, simulated, measured))
        times = " | ".join(
            f"{each['tpot_ms']:.3f} | {each['tpot_ms'] / measured['tpot_ms'] - 1:+.0%}"
            for each in (plan, simulated)
        )
        lines.append(
            f"| {row['budget']} | {'on' if row['prefetch'] else 'off'} | {hits} | {times} | "
            f"{measured['tpot_ms']:.3f} |"
        )
    return "\n".join(lines)


_EPILOG = """\b
The real run, on a machine that does nothing else:
  python benchmarks/bench_predictions.py
"""


@click.command(epilog=_EPILOG)
@click.option("--model", help="Directory.  [default: the shipped model]")
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    default=["15%", "30%", "45%", "60%", "75%"],
    show_default=True,
)
@click.option("--tokens", default=200, show_default=True, help="Of each text.")
@click.option("--texts", default=24, show_default=True, help="That make the plans.")
@click.option("--repeats", default=3, show_default=True, help="The median is reported.")
@click.option("--pack", is_flag=True, help="From a record file, in a temporary folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(
    model: str | None,
    budgets: tuple[str, ...],
    tokens: int,
    texts: int,
    repeats: int,
    pack: bool,
    as_json: bool,
) -> None:
    """Compare predicted with measured hit rates and times, with and without prefetch."""
    load_before = os.getloadavg()[0]
    directory = moerun.default_model() if model is None else Path(model)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        with moerun.Model.load(directory, device="cpu") as loaded:
            sequences = routing_of(loaded, tokens, MEASURED_TEXTS, 0)
            known = known_trace(loaded, Path(folder) / "known.safetensors", tokens, texts)
        packed = folder if pack else False
        costs = calibrate(directory, device="cpu", pack=packed)
        total = Geometry.of_model(directory, "cpu").total_bytes
        for prefetch in (False, True):
            for budget in budgets:
                size = int(float(budget.removesuffix("%")) / 100 * total)
                plan, tried = find_plan(
                    known, directory, costs=costs, budget_bytes=size, pack=packed
                )
                plan = next(each.plan for each in tried if each.prefetch == prefetch)
                click.echo(f"{budget}, prefetch {prefetch}", err=True)
                args = (sequences, costs, tokens, repeats, packed)
                rows.append({"budget": budget} | row_of(directory, plan, prefetch, *args))
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_average": [load_before, os.getloadavg()[0]],
        "moerun": moerun.__version__,
        "model": directory.name,
        "rows": rows,
    }
    print(json.dumps(result) if as_json else report(result))


if __name__ == "__main__":
    main()
