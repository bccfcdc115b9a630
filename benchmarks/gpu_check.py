"""Is the CUDA backend right on this machine's card, and how fast? Compares with the CPU backend.

Needs a build with nvcc on a machine with a card, and nothing from a network. Right first: logits of
few and of many tokens, greedy text, and the bits of text over budgets, splits and prefetch. Then
decode speed, beside the bytes that a token reads.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

import moerun

FEW_TOLERANCE = 1e-4  # activations of few tokens stay float32
MANY_TOLERANCE = 1e-2  # those of many are rounded to bf16


def prompt_of(model: moerun.Model, count: int) -> list[int]:
    text = Path(moerun.__file__).read_text() * 8
    return model.tokenizer.encode(text)[:count]


def relative_error(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check_results(device: str) -> Iterator[dict[str, Any]]:
    """Yield what was compared, how, and whether it agrees."""
    with moerun.Model.load(device="cpu") as cpu, moerun.Model.load(device=device) as card:
        for count, tolerance in ((5, FEW_TOLERANCE), (200, MANY_TOLERANCE)):
            ids = prompt_of(cpu, count)
            error = relative_error(card.forward(ids), cpu.forward(ids))
            yield {"check": f"logits of {count} tokens", "value": error, "ok": error <= tolerance}
        ids = prompt_of(cpu, 20)
        texts = [list(m.generate(ids, 100, ignore_eos=True)) for m in (cpu, card)]
        same = sum(a == b for a, b in zip(*texts, strict=True))
        yield {"check": "greedy text of 100 tokens", "value": same, "ok": same == 100}
        expected = (texts[1], card.stats()["logits_hash"])
    for budget, split, prefetch in (
        ("8%", 1.0, False),
        ("25%", 1.0, True),
        ("25%", 0.4, True),
        ("50%", 0.4, False),
        ("75%", 1.0, "auto"),
    ):
        with moerun.Model.load(
            device=device, expert_budget=budget, split=split, prefetch=prefetch
        ) as card:
            text = list(card.generate(ids, 100, ignore_eos=True))
            same_bits = (text, card.stats()["logits_hash"]) == expected
            cache = card.stats()["cache"]["total"]
        name = f"bits at {budget}, split {split:g}, prefetch {prefetch}"
        yield {"check": name, "value": cache["hit_rate"], "ok": same_bits}


def run_sanitizer(device: str, tool: str) -> dict[str, Any]:
    """A short generation under compute-sanitizer."""
    name = f"compute-sanitizer {tool}"
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"check": name, "value": "not done: compute-sanitizer was not found", "ok": False}
    code = (
        "import moerun\n"
        f"m = moerun.Model.load(device={device!r}, expert_budget='25%', prefetch=True)\n"
        "list(m.generate(list(range(5, 25)), 4, ignore_eos=True))\n"
    )
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        return {"check": name, "value": "not done in 240 s", "ok": False}
    lines = (done.stdout + done.stderr).strip().splitlines()
    return {"check": name, "value": lines[-1] if lines else "", "ok": done.returncode == 0}


def measure(checkpoint: Path, device: str, budget: str | None, tokens: int) -> dict[str, Any]:
    begin = time.perf_counter()
    with moerun.Model.load(checkpoint, device=device, expert_budget=budget) as model:
        loaded = time.perf_counter() - begin
        vocabulary = model.config["vocab_size"]
        ids = np.random.default_rng(0).integers(5, vocabulary, 512).tolist()
        list(model.generate(ids, tokens, ignore_eos=True))
        stats = model.stats()
    return {
        "budget": budget or "all",
        "load_s": loaded,
        "prefill_tokens_per_s": stats["prefill_tokens_per_s"],
        "decode_tokens_per_s": stats["decode_tokens_per_s"],
        "decode_gb_per_s": stats["decode_gb_per_s"],
        "hit_rate": stats["cache"]["total"]["hit_rate"],
        "link_gb_per_s": stats["cache"]["link_gb_per_s"],
    }


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="From make_checkpoint.py: also measure speed with real dimensions.",
)
@click.option("--tokens", default=64, show_default=True, help="To decode for each speed.")
@click.option("--sanitizer/--no-sanitizer", default=True, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Everything, as JSON.")
def main(
    device: str, checkpoint: Path | None, tokens: int, sanitizer: bool, output: Path | None
) -> None:
    """Check and measure the CUDA backend on this machine's card."""
    result: dict[str, Any] = {"build": moerun.build_info(), "checks": [], "speeds": []}
    for check in check_results(device):
        result["checks"].append(check)
        click.echo(f"{'ok  ' if check['ok'] else 'BAD '} {check['check']}: {check['value']}")
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        check = run_sanitizer(device, tool)
        result["checks"].append(check)
        click.echo(f"{'ok  ' if check['ok'] else 'BAD '} {check['check']}: {check['value']}")
    if checkpoint is not None:
        for budget in (None, "75%", "50%", "25%"):
            speed = measure(checkpoint, device, budget, tokens)
            result["speeds"].append(speed)
            click.echo(json.dumps(speed))
    if output is not None:
        output.write_text(json.dumps(result, indent=2))
    bad = [check["check"] for check in result["checks"] if not check["ok"]]
    click.echo(f"{len(result['checks']) - len(bad)} of {len(result['checks'])} checks agree")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
