"""Simulations against live runs, against arithmetic, and with nonsense."""

import json
import os
import signal
import struct
import threading
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

import moerun
from moerun import Model, SequenceRouting, Simulation, SimulationCosts, simulate
from moerun.errors import FormatError, InvalidArgumentError, OutOfMemoryError
from moerun.trace import NO_PREDICTION, Trace, TraceWriter
from moerun_tools.trace import main as moe_trace

NUM_DECODED = 20
COSTS = SimulationCosts(
    attention_s=1e-3, moe_s=2e-3, prompt_s=5e-4, head_s=4e-3, link_bytes_per_s=1e9
)


@pytest.fixture(scope="module")
def routing(model, shipped):
    """The routing of a prompt and the tokens after it, as any run of them has it."""
    text = [*shipped.prompt, *shipped.tokens[:NUM_DECODED]]
    return model.trace(text, with_prefetch=True)


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory, model, routing):
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    with TraceWriter(
        path, model="tiny", num_experts=32, top_k=4, moe_layers=model.moe_layers
    ) as writer:
        writer.append(routing, "python")
    return path


def live_run(shipped, **options):
    with Model.load(shipped.directory, device="cpu", cache_events=True, **options) as live:
        tokens = list(
            live.generate(shipped.prompt, NUM_DECODED + 1, ignore_eos=True, temperature=0)
        )
        assert tokens == shipped.tokens[: NUM_DECODED + 1]
        return live.cache_events(), live.stats()["cache"]


# Against live runs


@pytest.mark.parametrize("policy", ["lru", "lfu", "lcp"])
@pytest.mark.parametrize(("split", "budget"), [(1.0, "30%"), (0.4, "50%"), (0.0, "25%")])
def test_a_simulation_does_what_the_live_run_did(shipped, trace_file, policy, split, budget):
    options = {"policy": policy, "split": split, "expert_budget": budget, "prefetch": False}
    events, cache = live_run(shipped, **options)
    result = simulate(
        trace_file,
        shipped.directory,
        costs=COSTS,
        prompt_tokens=len(shipped.prompt),
        cache_events=True,
        **options,
    )
    assert result.events == events
    assert len(events) >= 8 * 4 * NUM_DECODED
    assert result.cache["total"]["hits"] + result.cache["total"]["top_hits"] > 0 or split == 0
    if result.cache["direct_io"] != cache["direct_io"]:
        pytest.skip("the file system opens files for direct reads and then refuses them")
    times = {"reason"} | {
        "stalled_s",
        "link_gb_per_s",
        "compute_s_per_token",
        "stalled_s_per_token",
    }
    times |= {"ratio_to_limit", "layers", "total"}
    assert without(result.cache, times) == without(cache, times)
    for found, expected in zip(result.cache["layers"], cache["layers"], strict=True):
        assert without(found, times) == without(expected, times)


def without(counters, names):
    return {name: value for name, value in counters.items() if name not in names}


def test_with_prefetch_the_policy_sees_the_same(shipped, trace_file):
    options = {"split": 0.4, "expert_budget": "50%", "prefetch": True}
    events, cache = live_run(shipped, **options)
    result = simulate(
        trace_file,
        shipped.directory,
        costs=COSTS,
        prompt_tokens=len(shipped.prompt),
        cache_events=True,
        **options,
    )
    plain = ("hit", "top_hit", "miss", "insert", "evict")
    assert [e for e in result.events if e.kind in plain] == [e for e in events if e.kind in plain]
    assert result.cache["prefetch"] == "on"
    assert result.cache["total"]["prefetch_issued"] > 0
    for name in ("lookups", "hits", "top_hits", "misses"):
        assert result.cache["total"][name] == cache["total"][name]


def test_a_prompt_of_one_token_is_decoded(shipped, model):
    prompt = shipped.prompt[:1]
    tokens = list(model.generate(prompt, 9, ignore_eos=True, temperature=0))
    options = {"expert_budget": "30%", "prefetch": False, "cache_events": True}
    with Model.load(shipped.directory, device="cpu", **options) as live:
        list(live.generate(prompt, 9, ignore_eos=True, temperature=0))
        events = live.cache_events()
    routing = model.trace([*prompt, *tokens[:8]])
    result = simulate(routing, shipped.directory, costs=COSTS, prompt_tokens=1, **options)
    assert result.events == events
    assert len(result.token_s) == 8
    assert len(result.ttft_s) == 1


def test_sequences_share_a_warm_cache(shipped, model, routing):
    options = {"expert_budget": "30%", "prefetch": False, "cache_events": True}
    with Model.load(shipped.directory, device="cpu", **options) as live:
        for _ in range(2):
            list(live.generate(shipped.prompt, NUM_DECODED + 1, ignore_eos=True, temperature=0))
        events = live.cache_events()
    result = simulate(
        [routing, routing],
        shipped.directory,
        costs=COSTS,
        prompt_tokens=len(shipped.prompt),
        **options,
    )
    assert result.events == events
    assert len(result.ttft_s) == 2


# Recorded predictions


def test_predictions_of_every_layer_are_recorded(model, routing, trace_file, shipped):
    ids = routing.prefetch_ids
    assert ids.shape == routing.expert_ids.shape
    assert (ids[0, 0] == NO_PREDICTION).all()
    assert np.array_equal(ids == NO_PREDICTION, np.arange(ids.size).reshape(ids.shape) < 4)
    # Guesses of a router on a state that is close to its own.
    used = np.array(routing.expert_ids[1:, :, :, None] == ids[1:, :, None, :]).any(-1)
    assert used.mean() > 0.5
    assert model.trace(shipped.prompt).prefetch_ids is None
    opened = Trace.open(trace_file)
    assert "prefetch_ids" in opened.tensors
    (shard,) = opened.shards()
    assert np.array_equal(shard.tensor("prefetch_ids")[0], ids)


def test_predictions_while_decoding_are_those_of_the_text(model, routing, shipped):
    decoded = model.trace(shipped.prompt, generate=NUM_DECODED, with_prefetch=True)
    start = len(shipped.prompt)
    assert np.array_equal(decoded.expert_ids, routing.expert_ids[:, start:])
    assert np.array_equal(decoded.prefetch_ids[1:], routing.prefetch_ids[1:, start:])
    # Nothing is predicted while there is only the prompt.
    assert (decoded.prefetch_ids[0, 0] == NO_PREDICTION).all()
    assert np.array_equal(decoded.prefetch_ids[0, 1:], routing.prefetch_ids[0, start + 1 :])


def test_the_tool_records_predictions_when_asked(tmp_path, default_path):
    path = tmp_path / "t.safetensors"
    arguments = ["record", "-o", str(path), "--length", "24", "--samples", "2", "--quiet"]
    done = CliRunner().invoke(moe_trace, [*arguments, "--with-prefetch"])
    assert done.exit_code == 0, done.output
    result = simulate(path, default_path, costs=COSTS, expert_budget="30%", prefetch=True)
    assert result.cache["total"]["prefetch_issued"] > 0
    done = CliRunner().invoke(moe_trace, [*arguments, "--overwrite"])
    assert done.exit_code == 0, done.output
    assert "prefetch_ids" not in Trace.open(path).tensors
    assert simulate(path, costs=COSTS, expert_budget="30%").cache["prefetch"] == "off"
    with pytest.raises(InvalidArgumentError, match="--with-prefetch"):
        simulate(path, costs=COSTS, expert_budget="30%", prefetch=True)
    wrong = CliRunner().invoke(
        moe_trace, [*arguments, "--overwrite", "--with-prefetch", "--engine", "transformers"]
    )
    assert wrong.exit_code == 2
    assert "--with-prefetch needs --engine native" in wrong.output


# Times


def test_with_every_expert_in_memory_times_are_sums(shipped, routing):
    prompt = len(shipped.prompt)
    layers = np.arange(1, 9) * 1e-3
    costs = replace(COSTS, attention_s=tuple(layers), moe_s=2 * layers)
    result = simulate(
        routing, shipped.directory, costs=costs, prompt_tokens=prompt, expert_budget="100%"
    )
    assert result.cache["state"] == "resident"
    assert result.hit_rate is None
    assert result.moved_bytes == 0
    np.testing.assert_allclose(result.token_s, 3 * layers.sum() + 4e-3)
    np.testing.assert_allclose(result.ttft_s, 8 * prompt * 5e-4 + 4e-3)
    assert result.seconds == pytest.approx(result.ttft_s.sum() + result.token_s.sum())


def test_a_faster_link_and_a_larger_budget_take_less_time(shipped, routing):
    def tpot(budget, rate):
        costs = replace(COSTS, link_bytes_per_s=rate)
        result = simulate(
            routing, shipped.directory, costs=costs, expert_budget=budget, cache_events=True
        )
        return result.tpot_s

    assert tpot("30%", 1e8) > tpot("30%", 1e9) > tpot("70%", 1e9) > tpot("100%", 1e9)


def test_a_packed_store_moves_fewer_bytes_of_a_split_expert(shipped, routing, tmp_path):
    options = {"costs": COSTS, "expert_budget": "50%", "split": 0.4, "prefetch": False}
    plain = simulate(routing, shipped.directory, **options)
    packed = simulate(routing, shipped.directory, pack=tmp_path, **options)
    assert packed.cache["total"]["top_hits"] == plain.cache["total"]["top_hits"]
    assert packed.moved_bytes < plain.moved_bytes
    assert not list(tmp_path.iterdir())


def test_belady_hits_most(shipped, routing):
    rates = {
        policy: simulate(
            routing,
            shipped.directory,
            costs=COSTS,
            expert_budget="40%",
            policy=policy,
            cache_events=True,
        )
        for policy in ("belady", "lru", "lfu", "lcp")
    }
    best = rates.pop("belady")
    assert best.cache["policy"] == "belady"
    assert best.hit_rate > max(result.hit_rate for result in rates.values())


def test_a_result_is_plain_numbers(shipped, routing):
    result = simulate(routing, shipped.directory, costs=COSTS, prompt_tokens=5, expert_budget="40%")
    assert isinstance(result, Simulation)
    assert result.events == []
    figures = json.loads(json.dumps(result.to_dict()))
    assert figures["tokens"] == routing.num_tokens - 5
    assert figures["tpot_s"]["mean"] == pytest.approx(result.token_s.mean())
    assert figures["tpot_s"]["p50"] <= figures["tpot_s"]["p99"] <= result.token_s.max()
    assert figures["ttft_s"]["mean"] == result.ttft_s[0]
    assert figures["cache"]["total"]["stalled_s"] == pytest.approx(sum(result.stall_s))
    assert len(result.stall_s) == 8


# A model that no test machine could hold


def write_empty_model(directory, layers, experts, hidden, intermediate):
    """A Mixtral of the given sizes whose weights are a hole in a file."""
    tensors, offset = {}, 0

    def add(name, *shape):
        nonlocal offset
        size = 2 * int(np.prod(shape))
        tensors[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size

    add("model.embed_tokens.weight", 64, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        add(prefix + "input_layernorm.weight", hidden)
        add(prefix + "post_attention_layernorm.weight", hidden)
        for name in "qkvo":
            add(f"{prefix}self_attn.{name}_proj.weight", hidden, hidden)
        add(prefix + "block_sparse_moe.gate.weight", experts, hidden)
        for expert in range(experts):
            for name, shape in (
                ("w1", (intermediate, hidden)),
                ("w2", (hidden, intermediate)),
                ("w3", (intermediate, hidden)),
            ):
                add(f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight", *shape)
    add("model.norm.weight", hidden)
    add("lm_head.weight", 64, hidden)
    header = json.dumps(tensors).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 64,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))


def test_a_budget_of_a_hundred_gibibytes_takes_no_memory(tmp_path):
    write_empty_model(tmp_path, layers=32, experts=16, hidden=6144, intermediate=16384)
    random = np.random.default_rng(0)
    ids = np.array([[random.permutation(16)[:2] for _ in range(40)] for _ in range(32)])
    result = simulate(
        SequenceRouting(ids.astype(np.uint16)),
        tmp_path,
        costs=COSTS,
        expert_budget="100GiB",
        policy="lru",
        split=1,
        cache_events=True,
    )
    assert result.cache["total_expert_bytes"] > 280e9
    assert 90 * 2**30 < result.cache["arena_bytes"] <= 100 * 2**30
    assert 0.05 < result.hit_rate < 0.5
    # Whole sectors; and the link is busy all the time, for an expert takes 0.6 s.
    missed = result.cache["total"]["misses"] * 3 * 6144 * 16384 * 2
    assert result.cache["total"]["demand_bytes"] == pytest.approx(missed, rel=5e-3)
    assert result.seconds == pytest.approx(missed / 1e9, rel=0.1)


def test_a_simulation_can_be_interrupted(shipped, routing):
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        while True:  # each takes longer than it takes to press the key
            simulate([routing] * 5000, shipped.directory, costs=COSTS, expert_budget="40%")


# What is refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompt_tokens": 1000}, "sequence 0 has 3. tokens.*prompt of 1000"),
        ({"prompt_tokens": -1}, "prompt_tokens must be at least 0"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ({"policy": "best"}, "policy: expected off, lru"),
        ({"costs": None}, "costs must be a SimulationCosts, not None"),
        ({"costs": replace(COSTS, head_s=-1.0)}, "head_s must be at least 0"),
        ({"costs": replace(COSTS, moe_s="fast")}, "moe_s must be a number"),
        ({"costs": replace(COSTS, moe_s=(1.0, 2.0))}, "moe_s: expected a number for each of the 8"),
        ({"costs": replace(COSTS, attention_s=float("nan"))}, "attention_s must be at least 0"),
        ({"costs": replace(COSTS, link_bytes_per_s=0)}, "link_bytes_per_s must be at least 1"),
        ({"policy": "off", "prefetch": True}, "policy off"),
        ({"context_length": 10**9}, "context_length"),
        ({"pack": 3}, "pack must be"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(shipped, routing, options, expected):
    arguments = {"costs": COSTS, "expert_budget": "40%", **options}
    with pytest.raises(InvalidArgumentError, match=expected):
        simulate(routing, shipped.directory, **arguments)


def test_a_budget_below_the_smallest_is_refused(shipped, routing):
    with pytest.raises(OutOfMemoryError, match="the smallest budget that works"):
        simulate(routing, shipped.directory, costs=COSTS, expert_budget=1000)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_experts": 64}, "the model has num_experts = 32, the trace 64"),
        ({"top_k": 3}, "the model has top_k = 4, the trace 3"),
        ({"moe_layers": [0, 1, 2, 3, 4, 5, 6, 8]}, "layers with experts"),
    ],
)
def test_a_trace_of_another_model_is_refused(tmp_path, shipped, routing, changes, expected):
    header = {"num_experts": 32, "top_k": 4, "moe_layers": range(8), **changes}
    path = tmp_path / "t.safetensors"
    with TraceWriter(path, model="other", **header) as writer:
        ids = np.ascontiguousarray(routing.expert_ids[:, :, : header["top_k"]])
        writer.append(SequenceRouting(ids), "python")
    with pytest.raises(InvalidArgumentError, match=f"another model: .*{expected}"):
        simulate(path, shipped.directory, costs=COSTS, expert_budget="40%")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.zeros((8, 3, 4), np.uint16), "different experts"),
        (np.full((8, 3, 4), 32, np.uint16), "from 0 to 31"),
        (np.zeros((7, 3, 4), np.uint16), r"shape \(8, 3, 4\)|for each of the 8"),
        (np.zeros((8, 3, 4)), "must be integers"),
        (np.zeros((8, 4), int), "must be integers"),
        (np.full((8, 3, 4), -1), "from 0 to 65535"),
        (np.zeros((8, 0, 4), int), "must be integers"),
    ],
)
def test_routing_that_is_none_is_refused(shipped, ids, expected):
    with pytest.raises(InvalidArgumentError, match=expected):
        simulate(SequenceRouting(ids), shipped.directory, costs=COSTS, expert_budget="40%")


def test_what_is_no_trace_is_refused(shipped, tmp_path):
    for wrong in (None, 3, [], [1], {}):
        with pytest.raises(InvalidArgumentError, match="trace must be"):
            simulate(wrong, shipped.directory, costs=COSTS)
    file = tmp_path / "t.safetensors"
    file.write_text("no")
    with pytest.raises((FormatError, moerun.errors.FileError)):
        simulate(file, shipped.directory, costs=COSTS)
