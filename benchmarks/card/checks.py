"""Is the device right? Against the CPU backend, transformers, and itself under other budgets."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import moerun
from card.rows import Row, check, not_run

FEW_TOLERANCE = 1e-4  # activations of few tokens stay float32
MANY_TOLERANCE = 1e-2  # those of many are rounded to bf16
F32_TOLERANCE = 1e-5  # float32 weights, one token after the other
# Without choices of experts that are nearly ties, which bf16 may decide otherwise.
PEER_CASES = [
    ("olmoe", "f32", 1, 5),
    ("qwen3_moe", "f32", 1, 5),
    ("mixtral", "f32", 1, 5),
    ("phimoe", "f32", 8, 16),
    ("olmoe", "bf16", 512, 20),
    ("qwen3_moe", "bf16", 512, 12),
]
BUDGETS: list[tuple[str, float, bool | str]] = [
    ("8%", 1.0, False),
    ("25%", 1.0, True),
    ("25%", 0.4, True),
    ("50%", 0.4, False),
    ("75%", 1.0, "auto"),
]


def prompt_of(model: moerun.Model, count: int) -> list[int]:
    text = Path(moerun.__file__).read_text() * 8
    return model.tokenizer.encode(text)[:count]


def distance(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def against_cpu(device: str, quick: bool) -> Iterator[Row]:
    """The shipped model: logits, greedy text, and its bits over budgets, splits and prefetch."""
    num_prompt, num_new = (2, 3) if quick else (20, 100)
    lengths = ((2, FEW_TOLERANCE),) if quick else ((5, FEW_TOLERANCE), (200, MANY_TOLERANCE))
    with moerun.Model.load(device="cpu") as cpu, moerun.Model.load(device=device) as card:
        if card.device != device:
            yield check("the device that was asked for", card.device, False)
            return
        for count, tolerance in lengths:
            ids = prompt_of(cpu, count)
            error = distance(card.forward(ids), cpu.forward(ids))
            name = f"logits of {count} tokens, distance from the CPU's"
            yield check(name, error, error <= tolerance, target=f"<= {tolerance:g}")
        ids = prompt_of(cpu, num_prompt)
        texts = [
            list(m.generate(ids, num_new, ignore_eos=True, temperature=0)) for m in (cpu, card)
        ]
        same = sum(a == b for a, b in zip(*texts, strict=True))
        yield check(f"tokens of {num_new} as on the CPU", same, same == num_new)
        expected = (texts[1], card.stats()["logits_hash"])
    for budget, split, prefetch in BUDGETS[1:2] if quick else BUDGETS:
        options: dict[str, Any] = {"expert_budget": budget, "split": split, "prefetch": prefetch}
        with moerun.Model.load(device=device, **options) as card:
            text = list(card.generate(ids, num_new, ignore_eos=True, temperature=0))
            same_bits = (text, card.stats()["logits_hash"]) == expected
        name = f"same bits at {budget}, split {split:g}, prefetch {prefetch}"
        yield check(name, "yes" if same_bits else "no", same_bits)


def against_transformers(device: str, quick: bool) -> Iterator[Row]:
    """Small random models, made and run by transformers in float32 on the CPU."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "python"))
    try:
        import reference
    except ImportError as error:
        yield not_run("check", "logits against transformers", str(error))
        return
    cases = {case.name: case for case in reference.CASES}
    for name, dtype, chunk, num_tokens in PEER_CASES[:1] if quick else PEER_CASES:
        with tempfile.TemporaryDirectory() as folder:
            made = reference.make_reference(cases[name], dtype, Path(folder) / "model")
            with moerun.Model.load(made.directory, device=device, prefill_chunk=chunk) as card:
                logits = card.forward(made.token_ids[:num_tokens])
        error = reference.relative_error(logits, made.logits[:num_tokens])
        tolerance = F32_TOLERANCE if dtype == "f32" else MANY_TOLERANCE
        title = f"{name} {dtype}, {num_tokens} tokens, against transformers"
        yield check(title, error, error <= tolerance, target=f"<= {tolerance:g}")
