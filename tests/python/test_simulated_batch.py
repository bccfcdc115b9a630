"""Simulated batches against live ones, against arithmetic, and on made-up routing."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from predictors import random_predictor
from traces import write_trace

import moerun
from moerun import Model, SequenceRouting, SimulationCosts, simulate
from moerun.errors import FormatError, InvalidArgumentError, MissingFileError
from moerun.identity import ModelIdentity
from moerun.predictor.files import write_predictor
from moerun_tools.plan import main as moe_plan

COSTS = SimulationCosts(
    attention_s=1e-3, moe_s=2e-3, prompt_s=5e-4, head_s=4e-3, link_bytes_per_s=1e9
)
SIZES = {"vocab_size": 4096, "layers": 8, "experts": 32, "top_k": 4}
TEXTS = [
    "def read_file(path):\n    with",
    "NAME\n       ls - list directory contents",
    "import os\n",
]
LENGTHS = (9, 14, 5, 20, 12, 7, 16, 3, 11, 18)  # new tokens, so that texts join and leave
PROMPT = 6


@pytest.fixture(scope="module")
def facts():
    found = ModelIdentity(None)
    return {"model_id": found.model_id, "tokenizer_hash": found.tokenizer_hash}


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, facts):
    """Random weights: as good a reason as any to put texts together."""
    path = tmp_path_factory.mktemp("predictor") / "random.safetensors"
    random_predictor(path, **SIZES, **facts)
    return path


@pytest.fixture(scope="module")
def prompts(model):
    words = [f"{TEXTS[n % len(TEXTS)]} {n} the file of a user" for n in range(len(LENGTHS))]
    return [model.tokenizer.encode(text)[:PROMPT] for text in words]


@pytest.fixture(scope="module")
def texts(model, prompts):
    batch = model.batch(4)
    for prompt, length in zip(prompts, LENGTHS, strict=True):
        batch.add(prompt, max_new_tokens=length, ignore_eos=True, temperature=0)
    return [result.token_ids for result in batch.results()]


@pytest.fixture(scope="module")
def routings(model, prompts, texts):
    """What each text's tokens used; of its last token nothing is computed."""
    return [
        model.trace([*prompt, *text[:-1]], with_prefetch=True)
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def live_batch(prompts, texts, cache, **options):
    with (
        Model.load(device="cpu", cache_events=True, **cache) as live,
        live.batch(**options) as batch,
    ):
        for prompt, length in zip(prompts, LENGTHS, strict=True):
            batch.add(prompt, max_new_tokens=length, ignore_eos=True, temperature=0)
        assert [result.token_ids for result in batch.results()] == texts
        return live.cache_events(), live.stats()


def simulated_batch(routings, cache, **options):
    return simulate(
        routings, costs=COSTS, prompt_tokens=PROMPT, cache_events=True, **cache, **options
    )


def of_steps(events, kinds):
    """How many events of these kinds each step had."""
    return Counter(event.token for event in events if event.kind in kinds)


TIMES = {"prefill_s", "decode_s", "prefill_tokens_per_s", "decode_tokens_per_s"}
SAME = {"waiting", "running", "finished", "most_running", "prompt_tokens", "generated_tokens"} | {
    "decode_tokens",
    "steps",
    "tokens_per_step",
    "active_experts",
    "active_experts_of_layers",
}


# Against live runs


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize(
    "cache",
    [{"policy": "lru"}, {"policy": "lcp"}, {"policy": "lfu", "split": 0.4}],
    ids=lambda cache: cache["policy"],
)
def test_a_simulated_batch_does_what_the_live_one_did(
    prompts, texts, routings, predictor, cache, schedule
):
    cache = {"expert_budget": "40%", "prefetch": False, **cache}
    options = {"batch_size": 3, **({"predictor": predictor, "schedule": True} if schedule else {})}
    events, stats = live_batch(prompts, texts, cache, **options)
    result = simulated_batch(routings, cache, **options)
    assert result.events == events
    assert result.cache["total"]["hits"] + result.cache["total"]["top_hits"] > 0
    found, expected = result.batch, stats["batch"]
    assert found.keys() == expected.keys() - {"kv_cache"}
    for name in SAME | {"hit_rate", "ready_rate"}:
        assert found[name] == expected[name], name
    if result.cache["direct_io"] == stats["cache"]["direct_io"]:
        assert found["bytes_per_token"] == expected["bytes_per_token"]
    if not schedule:
        assert found["schedule"] is found["prediction"] is None
        return
    for name in ("active", "rounds", "scheduled_rounds", "predicted_experts", "predicted_in_order"):
        assert found["schedule"][name] == expected["schedule"][name], name
    assert found["schedule"]["rounds"] > 0
    assert found["prediction"]["predictions"] == expected["prediction"]["predictions"]


@pytest.mark.parametrize("schedule", [False, True])
def test_with_the_policy_predictive_it_hits_about_as_often(
    prompts, texts, routings, predictor, schedule
):
    """Live forecasts come a moment late, and reads end in any order: 2 % of the look-ups."""
    cache = {"expert_budget": "40%", "prefetch": False, "policy": "predictive"}
    options = {"batch_size": 3, "predictor": predictor, "schedule": schedule}
    events, stats = live_batch(prompts, texts, cache, **options)
    result = simulated_batch(routings, cache, **options)
    looked_up = {"hit", "miss"}
    assert of_steps(result.events, looked_up) == of_steps(events, looked_up)
    for name in SAME:
        assert result.batch[name] == stats["batch"][name], name
    assert result.batch["hit_rate"] == pytest.approx(stats["batch"]["hit_rate"], abs=0.02)
    assert result.batch["hit_rate"] > 0.1
    assert result.cache["policy"] == "predictive"


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_batch_of_one_is_one_sequence_after_the_other(routings, prefetch):
    cache = {"expert_budget": "40%", "prefetch": prefetch}
    result = simulated_batch(routings, cache, batch_size=1)
    expected = simulated_batch(routings, cache)
    assert expected.batch is None
    assert result.events == expected.events
    assert result.cache == expected.cache
    assert result.moved_bytes == expected.moved_bytes
    np.testing.assert_allclose(result.token_s, expected.token_s)
    np.testing.assert_allclose(result.ttft_s, expected.ttft_s)
    assert result.batch["steps"] == result.batch["decode_tokens"] == len(result.token_s)
    assert result.batch["active_experts"] == 4
    assert result.tokens_per_s == pytest.approx(expected.tokens_per_s)


def test_what_the_next_layers_routers_name_for_a_batch_is_read_ahead(prompts, texts, routings):
    cache = {"expert_budget": "40%", "prefetch": True}
    result = simulated_batch(routings, cache, batch_size=4)
    total = result.cache["total"]
    assert 0 < total["prefetch_useful"] <= total["prefetch_issued"]
    assert result.batch["ready_rate"] > result.batch["hit_rate"]
    events, stats = live_batch(prompts, texts, cache, batch_size=4)
    plain = {"hit", "miss", "insert", "evict"}
    assert [e for e in result.events if e.kind in plain] == [e for e in events if e.kind in plain]
    assert stats["cache"]["total"]["prefetch_issued"] > 0


# Times


def test_further_tokens_take_what_those_of_a_prompt_take(routings):
    twice = [routings[0], routings[0]]
    options = {"costs": COSTS, "expert_budget": "100%", "prompt_tokens": PROMPT}
    result = simulate(twice, batch_size=2, **options)
    step = 8 * (3e-3 + 5e-4) + 4e-3 * (1 + 5e-4 / 3e-3)
    np.testing.assert_allclose(result.token_s, step)
    np.testing.assert_allclose(result.ttft_s, 8 * 2 * PROMPT * 5e-4 + 4e-3 * (1 + 5e-4 / 3e-3))
    assert result.tokens_per_s == pytest.approx(2 / step)
    assert result.to_dict()["tokens_per_s"] == result.tokens_per_s
    assert result.batch["active_experts"] == 4
    assert result.batch["hit_rate"] is None
    # A prompt as slow as decoding: nothing is gained.
    slow = replace(COSTS, prompt_s=3e-3)
    assert simulate(twice, batch_size=2, **{**options, "costs": slow}).tpot_s == pytest.approx(
        2 * simulate(twice, **options).tpot_s
    )


def test_predicting_takes_the_time_that_it_is_given(routings, predictor):
    options = {"expert_budget": "100%", "predictor": predictor, "batch_size": 3}
    free, dear = (
        simulate(routings, costs=replace(COSTS, predict_s=seconds), **options)
        for seconds in (0.0, 1e-3)
    )
    assert dear.batch["steps"] == free.batch["steps"]
    assert free.batch["prediction"]["ms"] is None
    assert dear.batch["prediction"]["ms"] >= 1
    # What is predicted to choose a batch is predicted before its step.
    assert dear.batch["decode_s"] > free.batch["decode_s"]
    assert dear.batch["schedule"]["split_ms"] is None


# Two domains that share no expert


@pytest.fixture(scope="module")
def domains():
    """Sequences of two domains in turns; a token tells its domain."""
    random = np.random.default_rng(0)

    def sequence(domain):
        experts = [[16 * domain + random.permutation(16)[:4] for _ in range(40)] for _ in range(8)]
        tokens = np.full(40, 7 if domain == 0 else 2000, np.int32)
        return SequenceRouting(np.array(experts, np.uint16), tokens)

    return [sequence(number % 2) for number in range(8)]


@pytest.fixture(scope="module")
def knowing(tmp_path_factory, facts):
    """A predictor that says which domain a token is of, and no more than that."""
    path = tmp_path_factory.mktemp("predictor") / "domains.safetensors"
    info, weights = random_predictor(path, **SIZES, **facts)
    for name, values in weights.items():
        values[...] = 1 if name.endswith("norm.weight") else 0
    weights["embedding.weight"][:1000] = 1
    weights["embedding.weight"][1000:] = -1
    weights["embedding_projection.weight"][:] = 1
    of_domain = np.where(np.arange(8 * 32) % 32 < 16, 1.0, -1.0)
    weights["head.weight"][:] = 2 * of_domain[:, None] / info.shape.hidden_size
    write_predictor(path, info, weights)
    return path


def test_scheduled_batches_activate_fewer_experts(domains, knowing):
    options = {"costs": COSTS, "expert_budget": "40%", "batch_size": 4, "predictor": knowing}
    scheduled = simulate(domains, **options)
    in_order = simulate(domains, **options, schedule=False)
    assert scheduled.batch["active_experts"] < in_order.batch["active_experts"]
    assert scheduled.batch["active_experts"] < 16
    assert scheduled.batch["tokens_per_step"] == in_order.batch["tokens_per_step"] == 4
    assert scheduled.batch["schedule"]["scheduled_rounds"] == 40
    assert in_order.batch["schedule"] is None


@pytest.mark.parametrize("schedule", [True, False])
def test_knowing_what_comes_hits_more_often(domains, knowing, schedule):
    rates = {
        policy: simulate(
            domains,
            costs=COSTS,
            expert_budget="40%",
            batch_size=4,
            policy=policy,
            predictor=knowing,
            schedule=schedule,
            cache_events=True,
        ).batch["hit_rate"]
        for policy in ("lru", "predictive")
    }
    assert rates["predictive"] > rates["lru"]


def test_a_predictor_says_what_to_read_ahead(domains, knowing):
    options = {"costs": COSTS, "expert_budget": "60%", "batch_size": 4, "predictor": knowing}
    ahead = simulate(domains, policy="predictive", prefetch=True, cache_events=True, **options)
    assert ahead.cache["total"]["prefetch_useful"] > 0
    assert ahead.batch["ready_rate"] > ahead.batch["hit_rate"]
    with pytest.raises(InvalidArgumentError, match="--with-prefetch"):
        simulate(domains, policy="lru", prefetch=True, **options)


# The command


def test_moe_plan_simulates_a_batch(tmp_path, domains, knowing, default_path):
    path = write_trace(tmp_path / "t.safetensors", domains, num_experts=32)
    numbers = ("--link-gb-per-s", "1", "--token-ms", "2", "--prompt-token-ms", "0.4")
    batch = ("--batch-size", "4", "--predictor", knowing, "--policy", "predictive")
    command = ["simulate", "--trace", path, "--budget", "40%", *numbers, *batch]

    def run(*more):
        done = CliRunner().invoke(moe_plan, [str(each) for each in (*command, *more)])
        assert done.exit_code == 0, done.output
        return done.output

    value = json.loads(run("--schedule", "on", "--json"))
    expected = simulate(
        path,
        default_path,
        costs=SimulationCosts(
            attention_s=0.3 * 2e-3 / 8,
            moe_s=0.7 * 2e-3 / 8,
            prompt_s=0.4e-3 / 8,
            head_s=0,
            link_bytes_per_s=1e9,
            link_fixed_s=50e-6,
        ),
        expert_budget="40%",
        policy="predictive",
        batch_size=4,
        predictor=knowing,
    ).to_dict()
    assert value["batch"]["steps"] == expected["batch"]["steps"] == 80
    assert value["batch"]["schedule"] == expected["batch"]["schedule"]
    assert value["batch"]["hit_rate"] == pytest.approx(expected["batch"]["hit_rate"], abs=1e-3)
    assert value["tokens_per_s"] == pytest.approx(expected["tokens_per_s"], rel=1e-3)
    table = run()
    assert "batch       80 steps of 4.0 tokens, " in table
    assert "schedule    40 of 40 rounds of two batches scheduled" in table
    assert "rounds of two batches" not in run("--schedule", "off")


@pytest.mark.parametrize("option", [("--predictor", "p"), ("--schedule", "on")])
def test_the_command_wants_a_batch_size(tmp_path, domains, option):
    path = write_trace(tmp_path / "t.safetensors", domains[:1], num_experts=32)
    command = ["simulate", "--trace", str(path), "--budget", "40%", *option]
    done = CliRunner().invoke(moe_plan, command)
    assert done.exit_code == 2
    assert "--batch-size" in done.output


# What is refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 0}, "batch_size must be from 1 to"),
        ({"batch_size": -3}, "batch_size must be from 1 to"),
        ({"batch_size": 513}, "batch_size: expected at most 512"),
        ({"batch_size": 3, "prefill_chunk": 2}, "batch_size: expected at most 2"),
        ({"batch_size": 2, "schedule": True}, "it needs a predictor"),
        ({"schedule": True}, "they are of a batch; give batch_size"),
        ({"batch_size": 2, "schedule": "auto"}, "schedule must be True or False"),
        ({"batch_size": 2, "policy": "belady"}, "belady knows the future of one sequence"),
        ({"batch_size": 2, "costs": replace(COSTS, predict_s=-1.0)}, "predict_s must be at least"),
    ],
)
def test_options_that_make_no_sense_are_refused(routings, options, expected):
    with pytest.raises(InvalidArgumentError, match=expected):
        simulate(routings, **{"costs": COSTS, "expert_budget": "40%", **options})


def test_a_predictor_needs_a_batch_and_token_ids(tmp_path, routings, predictor):
    options = {"costs": COSTS, "expert_budget": "40%", "predictor": predictor}
    with pytest.raises(InvalidArgumentError, match="give batch_size"):
        simulate(routings, **options)
    bare = [*routings[:2], SequenceRouting(routings[2].expert_ids)]
    with pytest.raises(InvalidArgumentError, match=r"sequence 2.*moe-trace record"):
        simulate(bare, batch_size=2, **options)
    path = write_trace(tmp_path / "t.safetensors", bare[2:], num_experts=32)
    with pytest.raises(InvalidArgumentError, match=r"sequence 0.*moe-trace record"):
        simulate(path, batch_size=2, **options)
    simulate(path, batch_size=2, costs=COSTS, expert_budget="40%")
    wrong = SequenceRouting(routings[2].expert_ids, np.zeros(3, np.int32))
    with pytest.raises(InvalidArgumentError, match="token_ids must be"):
        simulate(wrong, batch_size=2, **options)
    outside = SequenceRouting(
        routings[2].expert_ids, np.full(routings[2].num_tokens, 4096, np.int32)
    )
    with pytest.raises(InvalidArgumentError, match="4095"):
        simulate([outside] * 3, batch_size=1, **options)


def test_predictors_that_do_not_fit_are_refused(tmp_path, routings, facts):
    options = {"costs": COSTS, "expert_budget": "40%", "batch_size": 2}
    with pytest.raises(MissingFileError):
        simulate(routings, predictor=tmp_path / "none.safetensors", **options)
    for name, wrong in (("model_id", "f" * 16), ("tokenizer_hash", "f" * 64)):
        other = tmp_path / f"{name}.safetensors"
        random_predictor(other, **SIZES, **{**facts, name: wrong})
        with pytest.raises(FormatError, match=r"model|tokenizer"):
            simulate(routings, predictor=other, **options)
    assert moerun.simulate is simulate
