"""Many texts at once: each is the one that it is alone."""

import subprocess
import sys
import threading

import pytest

import moerun
from moerun.errors import InvalidArgumentError, MoerunError

CODE = [
    "def read_file(path):\n",
    "import os\n",
    "class Test(unittest.TestCase):\n",
    "    for i in ",
]
MANUAL = ["NAME\n       ls - list", "DESCRIPTION\n       The", "OPTIONS\n       -a", "SEE ALSO\n"]


@pytest.fixture(scope="module")
def prompts(model):
    """64 prompts of two domains, no two of them alike."""
    texts = [
        text + f"{'    x' if domain is CODE else ' the'} {n}"
        for n in range(8)
        for domain in (CODE, MANUAL)
        for text in domain
    ]
    return [model.tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def alone(model, prompts):
    return [list(model.generate(prompt, max_new_tokens=16, temperature=0)) for prompt in prompts]


def texts_of(batch):
    return [result.token_ids for result in batch.results()]


@pytest.mark.parametrize("batch_size", [1, 5, 16, 64])
def test_every_prompt_has_its_own_text(model, prompts, alone, batch_size):
    batch = model.generate_batch(prompts, max_new_tokens=16, batch_size=batch_size, temperature=0)
    assert texts_of(batch) == alone
    stats = model.stats()["batch"]
    assert stats["most_running"] == batch_size
    assert stats["finished"] == 64
    assert stats["waiting"] == stats["running"] == stats["kv_cache"]["used_bytes"] == 0
    layers = stats["active_experts_of_layers"]
    assert stats["active_experts"] == pytest.approx(sum(layers) / len(layers))
    assert min(layers) >= model.config["top_k"]
    assert stats["hit_rate"] is None


def test_the_order_of_arrival_changes_no_text(model, prompts, alone):
    batch = model.generate_batch(prompts[::-1], max_new_tokens=16, batch_size=16, temperature=0)
    assert texts_of(batch) == alone[::-1]


@pytest.mark.parametrize(
    "cache",
    [
        {"policy": "lru", "prefetch": False},
        {"policy": "lcp", "split": 0.5, "prefetch": True},
        {"policy": "lfu", "prefetch": "auto"},
        {"policy": "off"},
    ],
)
def test_the_expert_cache_changes_no_text(prompts, alone, cache):
    with moerun.Model.load(expert_budget="25%", **cache) as model:
        batch = model.generate_batch(prompts[:24], max_new_tokens=16, batch_size=8, temperature=0)
        assert texts_of(batch) == alone[:24]
        stats = model.stats()
    assert stats["batch"]["bytes_per_token"] > 0
    assert (stats["batch"]["hit_rate"] > 0) == (cache["policy"] != "off")
    decoded = stats["batch"]["decode_tokens"]
    assert stats["cache"]["decode_tokens"] == decoded
    assert decoded == sum(map(len, alone[:24])) - 24


def test_sequences_join_and_leave_while_others_run(model, prompts, alone):
    with model.batch(batch_size=3) as batch:
        added = [batch.add(prompts[i], max_new_tokens=16, temperature=0) for i in range(2)]
        for _ in range(5):
            batch.step()
        added += [batch.add(prompts[i], max_new_tokens=16, temperature=0) for i in range(2, 8)]
        batch.cancel(added[1])
        found = {result.sequence: result for result in batch}
        assert batch.num_unfinished == 0
    assert sorted(found) == [0, 2, 3, 4, 5, 6, 7]
    for number, result in found.items():
        assert result.token_ids == alone[number]
        assert result.finish_reason == "length"
        assert result.prompt_tokens == len(prompts[number])
    with pytest.raises(MoerunError, match="closed"):
        batch.add(prompts[0], temperature=0)


def test_sampling_is_of_each_sequence_alone(model, prompts):
    options = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 12}
    alone = [list(model.generate(prompts[i], seed=40 + i, **options)) for i in range(8)]
    results = model.generate_batch(prompts[:8], seed=40, batch_size=3, **options).results()
    assert [result.token_ids for result in results] == alone
    assert [result.seed for result in results] == list(range(40, 48))
    same = model.generate_batch([prompts[0]] * 6, seed=1, **options).results()
    assert len({tuple(result.token_ids) for result in same}) > 1


def test_texts_end_as_they_do_alone(model, prompts, alone):
    stop = model.tokenizer.decode(alone[0])[5:9]
    for options in ({"stop": stop}, {"stop": alone[0][3]}, {"max_new_tokens": 3}):
        generation = model.generate(
            prompts[0], **{"max_new_tokens": 16, "temperature": 0, **options}
        )
        tokens = list(generation)
        batch = model.generate_batch(
            [prompts[0]] * 2, **{"max_new_tokens": 16, "temperature": 0, **options}
        )
        for result in batch.results():
            assert (result.token_ids, result.finish_reason) == (tokens, generation.finish_reason)


def test_a_full_context_ends_a_text(prompts):
    with moerun.Model.load(context_length=24) as model:
        generation = model.generate(prompts[0], ignore_eos=True, temperature=0)
        tokens = list(generation)
        (result,) = model.generate_batch([prompts[0]], ignore_eos=True, temperature=0).results()
    assert generation.finish_reason == result.finish_reason == "context"
    assert result.token_ids == tokens


def test_the_kv_budget_is_hard_and_sequences_without_room_wait(model, prompts, alone):
    sizes = model.config
    per_token = 2 * 4 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * 64
    budget = 3 * 48 * per_token
    batch = model.generate_batch(
        prompts, max_new_tokens=16, batch_size=16, kv_budget=budget, temperature=0
    )
    assert texts_of(batch) == alone
    kv = model.stats()["batch"]["kv_cache"]
    assert 0 < kv["peak_bytes"] <= kv["budget_bytes"] == budget
    assert model.stats()["batch"]["most_running"] < 16


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 513}, "1 to 512"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_k": 2**63}, "top_k"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        ({"kv_budget": "lots"}, "kv_budget.*lots"),
        ({"kv_budget": 0}, "kv_budget"),
        ({"temperature": -1}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"prompts": [[1, 2], []]}, r"prompts\[1\].*empty"),
        ({"prompts": [[1, 4096]]}, r"prompts\[0\].*4096"),
        ({"prompts": [[1] * 1024]}, r"prompts\[0\].*1024 tokens"),
        ({"prompts": [[1] * 100], "kv_budget": "1%", "batch_size": 1}, "KV budget"),
    ],
)
def test_wrong_arguments_are_refused(model, arguments, pattern):
    prompts = arguments.pop("prompts", [[1, 2]])
    with pytest.raises(InvalidArgumentError, match=pattern):
        model.generate_batch(prompts, **arguments)


def test_other_threads_may_add_and_cancel(model, prompts, alone):
    with model.batch(batch_size=4) as batch:
        for prompt in prompts[:4]:
            batch.add(prompt, max_new_tokens=16, temperature=0)

        def add_more():
            for prompt in prompts[4:16]:
                batch.add(prompt, max_new_tokens=16, temperature=0)
            batch.cancel(15)

        thread = threading.Thread(target=add_more)
        thread.start()
        found = {result.sequence: result.token_ids for result in batch}
        thread.join()
        found |= {result.sequence: result.token_ids for result in batch}
    found.pop(15, None)
    assert found == dict(enumerate(alone[:15]))


def test_statistics_are_right_when_strings_end_the_texts(model, prompts, alone):
    stop = model.tokenizer.decode(alone[0])[3:5]
    model.generate_batch([prompts[0]] * 3, max_new_tokens=16, stop=stop, temperature=0).results()
    stats = model.stats()["batch"]
    assert (stats["running"], stats["finished"], stats["kv_cache"]["used_bytes"]) == (0, 3, 0)


def test_a_small_context_takes_a_smaller_batch():
    with moerun.Model.load(context_length=12) as model:
        results = model.generate_batch([[1, 2, 3]] * 20, max_new_tokens=2, temperature=0).results()
        assert len(results) == 20
        assert model.stats()["batch"]["most_running"] == 12


def test_other_generations_beside_a_batch_are_not_counted(model, prompts):
    with model.batch(batch_size=4) as batch:
        for prompt in prompts[:4]:
            batch.add(prompt, max_new_tokens=8, temperature=0)
        while batch.step():
            list(model.generate(prompts[9], max_new_tokens=8, temperature=0))
    stats = model.stats()["batch"]
    assert model.config["top_k"] <= stats["active_experts"] <= 4 * model.config["top_k"]


def test_unknown_arguments_are_refused(model):
    with pytest.raises(InvalidArgumentError, match="beam"):
        model.generate_batch([[1]], beam=4, temperature=0)


def test_ctrl_c_ends_a_batch_and_the_model_goes_on():
    code = """
import _thread, threading, moerun
model = moerun.Model.load()
batch = model.generate_batch([[5, 6, 7]] * 400, batch_size=64, ignore_eos=True)
threading.Timer(0.3, _thread.interrupt_main).start()
try:
    batch.results()
except KeyboardInterrupt:
    assert batch.num_unfinished == 0
    print(len(list(model.generate([5, 6, 7], max_new_tokens=4))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "4\n", done.stderr
