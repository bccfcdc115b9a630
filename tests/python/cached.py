"""A model with every expert in memory, and what a model with a cache is held to."""

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import moerun
from moerun import Model

PROMPT = "import os\nimport sys\n\n\ndef main("
NUM_NEW_TOKENS = 24


@dataclass(frozen=True)
class Resident:
    """What a model gives with every expert in memory, and its sizes."""

    directory: Path
    prompt: list[int]
    logits: np.ndarray
    tokens: list[int]
    logits_hash: str
    sizes: dict


def generate(model, prompt, num_tokens=NUM_NEW_TOKENS, **options):
    options = {"temperature": 0, "max_new_tokens": num_tokens, **options}
    return list(model.generate(prompt, ignore_eos=True, **options))


def run_resident(directory, prompt, num_tokens=NUM_NEW_TOKENS):
    with Model.load(directory, device="cpu", expert_budget="100%") as model:
        logits = model.forward(prompt)
        tokens = generate(model, prompt, num_tokens)
        stats = model.stats()
    assert stats["cache"]["state"] == "resident"
    sizes = moerun.dry_run(directory, device="cpu")
    return Resident(directory, prompt, logits, tokens, stats["logits_hash"], sizes)


def assert_same(resident, **options):
    """Load with `options` and compare every bit; returns the statistics."""
    with Model.load(resident.directory, device="cpu", **options) as model:
        assert np.array_equal(model.forward(resident.prompt), resident.logits)
        assert generate(model, resident.prompt, len(resident.tokens)) == resident.tokens
        stats = model.stats()
    assert stats["logits_hash"] == resident.logits_hash
    assert_adds_up(stats["cache"], resident.sizes)
    return stats


def assert_adds_up(cache, sizes):
    total, layers = cache["total"], cache["layers"]
    if cache["state"] == "resident":
        assert layers == []
        assert not any(total.values())
        return
    assert len(layers) == sizes["num_moe_layers"]
    assert cache["arena_bytes"] == cache["slot_bytes"] + cache["ring_bytes"]
    assert cache["arena_bytes"] <= cache["budget_bytes"]
    for name in set(total) - {"hit_rate", "ready_rate"}:
        assert total[name] == pytest.approx(sum(layer[name] for layer in layers))
    assert total["lookups"] == cache["decode_tokens"] * len(layers) * sizes["top_k"]
    for counters in (total, *layers):
        lookups = counters["lookups"]
        assert counters["hits"] + counters["top_hits"] + counters["misses"] == lookups
        assert counters["hit_rate"] == (counters["hits"] / lookups if lookups else None)
        ready = counters["hits"] + counters["prefetch_useful"]
        assert counters["ready_rate"] == (ready / lookups if lookups else None)
        ended = sum(counters[f"prefetch_{end}"] for end in ("useful", "late", "wasted"))
        assert ended <= counters["prefetch_issued"]
        assert counters["stalled_s"] >= 0
    for layer in layers:
        assert layer["top_hits" if layer["split"] == 1 else "hits"] == 0
        if layer["slots"] == 0 and cache["policy"] != "predictive":
            assert layer["hits"] == layer["top_hits"] == 0


def plan_of(sizes, policy, layers, **fields):
    return {
        "version": 1,
        "model": sizes["model"],
        "policy": policy,
        "budget_bytes": 2 * sizes["total_expert_bytes"],
        "layers": layers,
        **fields,
    }


def within(seconds, function):
    """Return what `function` returns; fail if it has not by then, for a hang would be a bug."""
    outcome = []

    def run():
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still running after {seconds} s"
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
