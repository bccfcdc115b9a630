"""Makes routing.safetensors and routing.json: routing of the shipped model, and what the plain
loops of tests/python/brute_force.py say of it. Run once: `python tests/data/make_goldens.py`.
"""

import inspect
import json
import sys
from itertools import chain
from pathlib import Path

import numpy as np

import moerun

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent / "python"))

import brute_force  # noqa: E402
from traces import write_trace  # noqa: E402

LENGTHS = (48, 30)
LAYERS = (0, 4, 7)
SEGMENT_LENGTHS = (4, 16)


def rounded(values):
    return np.round(values, 9).tolist()


def record():
    """Two short sequences of the shipped model, three of its layers."""
    model = moerun.Model.load(device="cpu", cpu_kernels="portable")
    texts = (inspect.getsource(json.loads), "The with statement is used to wrap a block " * 4)
    sequences = []
    for text, length in zip(texts, LENGTHS, strict=True):
        routing = model.trace(model.tokenizer.encode(text)[:length])
        sequences.append(
            moerun.SequenceRouting(routing.expert_ids[list(LAYERS)], routing.token_ids)
        )
    write_trace(
        FOLDER / "routing.safetensors", sequences, ["python", "english"], 32, moe_layers=LAYERS
    )
    return [sequence.expert_ids.tolist() for sequence in sequences]


def main():
    sequences = record()
    experts = range(32)
    by_layer = [[sequence[i] for sequence in sequences] for i in range(len(LAYERS))]
    pools = [brute_force.pooled(sequence, 32) for sequence in sequences]
    names = ("srp", "alpha", "rho_hat", "act_rate")
    golden = {"srp": {}, "sch_layer": {}, "chr_layer": {}, "sch_model": {}, "chr_model": {}}
    for m in SEGMENT_LENGTHS:
        of_expert = [
            [brute_force.window_counts(layer, [e], m) for e in experts] for layer in by_layer
        ]
        of_layer = [list(chain(*layer)) for layer in of_expert]

        def results(counts, m=m):
            return dict(zip(names, brute_force.srp(counts, m), strict=True))

        def table(rows):
            return {name: [[r[name] for r in row] for row in rows] for name in names}

        golden["srp"][m] = {
            "model": results(list(chain(*of_layer))),
            "layer": {k: v[0] for k, v in table([[results(c) for c in of_layer]]).items()},
            "expert": table(
                [
                    [results(c) if any(c) else dict.fromkeys(names, 0) for c in layer]
                    for layer in of_expert
                ]
            ),
        }
        golden["sch_model"][m] = rounded(brute_force.hit_rates(pools, 96, "sch", m))
    for number, layer in zip(LAYERS, by_layer, strict=True):
        golden["sch_layer"][number] = {
            m: rounded(brute_force.hit_rates(layer, 32, "sch", m)) for m in SEGMENT_LENGTHS
        }
        golden["chr_layer"][number] = {
            policy: rounded(brute_force.hit_rates(layer, 32, policy, 1))
            for policy in ("lru", "lfu", "belady")
        }
    golden["chr_model"] = {
        policy: rounded(brute_force.hit_rates(pools, 96, policy, 1))
        for policy in ("lru", "lfu", "belady")
    }
    (FOLDER / "routing.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
