"""The expert cache gives the same bits as no cache, whatever its settings."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
from cached import NUM_NEW_TOKENS, PROMPT, assert_same, generate, plan_of, run_resident, within
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moerun import Model

# Families, stored types, one file and many, layers without experts, shared experts.
CASES = [
    ("olmoe_clip_bias_tied", "bf16"),
    ("mixtral", "f32"),
    ("qwen2_moe", "f16"),
    ("qwen3_moe", "bf16"),
    ("qwen3_moe_dense_layers_bias_sliding_tied", "bf16"),
    ("qwen3_moe_yarn_attention_factor", "f32"),
    ("granitemoe", "bf16"),
    ("phimoe", "bf16"),
]
CASE_OF = {case.name: case for case in reference.CASES}


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """Makes the model of a case once, whoever asks first."""
    made = {}

    def get(name, dtype):
        if (name, dtype) not in made:
            case = CASE_OF[name]
            directory = tmp_path_factory.mktemp(name) / "model"
            model = copy.deepcopy(reference.make_model(case, dtype, seed=0))
            stored = model.to(reference.DTYPES[dtype])
            stored.save_pretrained(directory, max_shard_size=case.max_shard_size)
            made[name, dtype] = run_resident(directory, reference.token_ids(case)[:20])
        return made[name, dtype]

    return get


def budgets(sizes):
    """From the smallest that works to one byte less than all, as a strategy."""
    smallest, total = sizes["smallest_budget_bytes"], sizes["total_expert_bytes"]
    return st.one_of(
        st.just(smallest), st.just(total - 1), st.integers(min(smallest, total - 1), total - 1)
    )


def splits(num_layers):
    share = st.sampled_from([0, 0.25, 0.4, 1.0])
    return st.one_of(st.none(), share, st.lists(share, min_size=num_layers, max_size=num_layers))


def cache_settings(sizes):
    """Everything that `Model.load` takes for the cache, but plans."""
    common = {
        "expert_budget": budgets(sizes),
        "threads": st.integers(1, 4),
        "prefill_chunk": st.sampled_from([1, 7, 512]),
    }
    caching = st.fixed_dictionaries(
        {
            **common,
            "policy": st.sampled_from([None, "lru", "lfu", "lcp"]),
            "split": splits(sizes["num_moe_layers"]),
            "prefetch": st.sampled_from([None, True, False, "auto"]),
        }
    )
    off = st.fixed_dictionaries(
        {**common, "policy": st.just("off"), "prefetch": st.sampled_from([None, False, "auto"])}
    )
    return st.one_of(caching, caching, caching, off)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_random_model_gives_the_same_bits_whatever_the_cache_does(random_model, name, dtype):
    resident = random_model(name, dtype)

    @hypothesis_settings(max_examples=10)
    @given(cache_settings(resident.sizes))
    def holds(options):
        assert assert_same(resident, **options)["cache"]["state"] == "cached"

    holds()


def test_the_shipped_model_gives_the_same_bits_whatever_the_cache_does(shipped):
    @hypothesis_settings(max_examples=24)
    @given(cache_settings(shipped.sizes))
    def holds(options):
        assert assert_same(shipped, **options)["cache"]["state"] == "cached"

    holds()


@pytest.mark.parametrize("policy", ["off", "lru", "lfu", "lcp"])
def test_the_smallest_budget_gives_the_same_bits_with_every_policy(shipped, policy):
    stats = assert_same(
        shipped, policy=policy, expert_budget=shipped.sizes["smallest_budget_bytes"]
    )
    assert stats["cache"]["policy"] == policy
    assert stats["cache"]["total"]["hits"] == 0  # nothing is left for slots
    assert stats["memory"]["expert_bytes"] == shipped.sizes["smallest_budget_bytes"]


@pytest.mark.parametrize("budget", ["100%", "40GB"])
def test_a_budget_for_all_experts_needs_no_cache(shipped, budget):
    stats = assert_same(shipped, expert_budget=budget)
    assert stats["cache"]["state"] == "resident"
    assert stats["cache"]["total_expert_bytes"] == stats["memory"]["expert_bytes"]


@pytest.fixture(scope="module")
def long_text(default_path, tokenizer):
    return run_resident(default_path, tokenizer.encode(PROMPT), 300)


@pytest.mark.parametrize(
    "options",
    [{"prefetch": "auto", "split": 1}, {"prefetch": "auto", "split": 0.5}, {"prefetch": True}],
    ids=str,
)
def test_a_long_text_is_the_same_when_cache_and_prefetch_are_tried_on_and_off(long_text, options):
    cache = assert_same(long_text, expert_budget="30%", **options)["cache"]
    assert cache["decode_tokens"] >= len(long_text.tokens) - 1
    assert cache["reason"]


def test_the_bits_are_the_same_with_any_plan(shipped, tmp_path):
    file = tmp_path / "plan.json"
    layers = st.lists(
        st.fixed_dictionaries(
            {
                "slots": st.integers(0, 32),
                "split": st.sampled_from([0, 0.5, 1]),
                "experts": st.lists(st.integers(0, 31), max_size=32, unique=True),
            }
        ),
        min_size=8,
        max_size=8,
    )

    @hypothesis_settings(max_examples=16)
    @given(
        policy=st.sampled_from(["off", "lru", "lfu", "lcp", "static"]),
        layers=layers,
        threads=st.integers(1, 4),
    )
    def holds(policy, layers, threads):
        planned = [{"layer": number, **layer} for number, layer in enumerate(layers)]
        for layer in planned:
            if policy != "static":
                del layer["experts"]
            if policy == "off":
                layer["slots"] = 0
        file.write_text(json.dumps(plan_of(shipped.sizes, policy, planned)))
        assert assert_same(shipped, plan=file, threads=threads)["cache"]["policy"] == policy

    holds()


# Several at once, and leaving early


def test_several_models_run_at_once(shipped, random_model):
    small = random_model("mixtral", "f32")
    pairs = [
        (resident, Model.load(resident.directory, device="cpu", threads=1, **options))
        for resident, options in (
            (shipped, {"expert_budget": "20%"}),
            (shipped, {"expert_budget": "50%", "policy": "lru", "split": 1}),
            (shipped, {"expert_budget": "25%", "policy": "off"}),
            (small, {"expert_budget": "60%", "prefetch": True}),
        )
    ]
    try:
        with ThreadPoolExecutor(len(pairs)) as pool:
            for _ in range(2):
                texts = list(pool.map(lambda pair: generate(pair[1], pair[0].prompt), pairs))
                assert texts == [resident.tokens for resident, _ in pairs]
    finally:
        for _, model in pairs:
            model.close()


def test_several_texts_of_one_model_may_take_turns(shipped):
    with Model.load(shipped.directory, expert_budget="25%") as model:
        first = model.generate(
            shipped.prompt, max_new_tokens=NUM_NEW_TOKENS, ignore_eos=True, temperature=0
        )
        second = model.generate(
            shipped.prompt[:4], max_new_tokens=NUM_NEW_TOKENS, ignore_eos=True, temperature=0
        )
        alone = generate(model, shipped.prompt[:4])
        assert list(zip(first, second, strict=True)) == list(
            zip(shipped.tokens, alone, strict=True)
        )


def test_a_text_may_be_left_and_a_model_closed_while_reads_are_under_way(shipped):
    for _ in range(5):
        model = Model.load(shipped.directory, expert_budget="25%", prefetch=True)
        generation = model.generate(shipped.prompt, temperature=0)
        assert [next(generation) for _ in range(3)] == shipped.tokens[:3]
        within(30, model.close)
