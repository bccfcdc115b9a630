"""How long the routing-path predictor takes for the next tokens of some sequences.

    python benchmarks/bench_path_predictor.py

Random weights; by default the sizes for olmoe-1b-7b (50,304 token ids, 16 layers of 64 experts).
Between calls as much memory is read as empties the caches, as a model does with its weights.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from moerun.planning import machine_name
from moerun.predictor import PathPredictor, default_shape
from moerun.predictor.files import PredictorInfo, write_predictor


def write_random(path, vocab_size, layers, experts, top_k, **sizes):
    """Write a predictor of random weights."""
    random = np.random.default_rng(0)
    info = PredictorInfo(
        model="random",
        model_id="0" * 16,
        tokenizer_hash="0" * 64,
        vocab_size=vocab_size,
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        top_k=top_k,
        shape=default_shape(vocab_size, layers * experts, **sizes),
        training={},
        trained_sequences=np.zeros(0, np.int64),
    )
    shapes = info.shape.tensors(vocab_size, info.num_outputs)
    weights = {
        name: (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in shapes.items()
    }
    write_predictor(path, info, weights)


def measure(predictor, batch, steps, warm):
    """Milliseconds of each step of `batch` sequences, after their windows are full."""
    random = np.random.default_rng(1)
    window = predictor.info.shape.window
    states = [predictor.state() for _ in range(batch)]
    vocabulary = predictor.info.vocab_size
    predictor.advance(states, list(random.integers(vocabulary, size=(batch, window))))
    flood = np.ones(1 if warm else 32 << 20, np.float32)
    times = []
    for _ in range(steps):
        tokens = list(random.integers(vocabulary, size=(batch, 1)))
        flood.sum()
        begin = time.perf_counter()
        predictor.advance(states, tokens)
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warm", action="store_true", help="leave the caches as they are")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictor.safetensors"
        sizes = {"hidden_size": args.hidden, "num_blocks": args.blocks}
        write_random(path, args.vocabulary, args.layers, args.experts, args.top_k, **sizes)
        predictor = PathPredictor.open(path, threads=args.threads)
        rows = []
        for batch in args.batch or (1, 4, 16, 64):
            times = measure(predictor, batch, args.steps, args.warm)
            row = {"batch": batch, "median_ms": float(np.median(times)), "least_ms": min(times)}
            rows.append(row)
        found = {
            "machine": machine_name(),
            "parameters": predictor.info.num_parameters,
            "file_bytes": path.stat().st_size,
            "memory_bytes": predictor.memory_bytes,
            "state_bytes": predictor.state().bytes,
            "rows": rows,
        }
    if args.json:
        print(json.dumps(found))
        return
    print(f"{found['machine']}: {found['parameters']:,} parameters, {found['file_bytes']:,} bytes")
    for row in rows:
        print(
            f"batch {row['batch']:>3}: median {row['median_ms']:.3f} ms, least "
            f"{row['least_ms']:.3f} ms"
        )


if __name__ == "__main__":
    main()
