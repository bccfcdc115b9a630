"""Policy predictive: memory that all layers share, and experts that stay by when they are used."""

import json

import pytest
from cached import assert_adds_up, assert_same, generate, plan_of
from conftest import as_json, assert_failed
from predictors import predictor_of_shipped_model
from test_batch import CODE, MANUAL, texts_of

import moerun
from moerun import Model
from moerun.errors import InvalidArgumentError, OutOfMemoryError
from moerun.sizes import size_text

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """Random weights: what it says is mostly wrong."""
    return predictor_of_shipped_model(tmp_path_factory.mktemp("predictor") / "p.safetensors")


@pytest.fixture(scope="module")
def prompts(model):
    texts = [f"{text} {n}" for n in range(2) for text in (*CODE, *MANUAL)]
    return [model.tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def alone(model, prompts):
    return [
        list(model.generate(prompt, max_new_tokens=NEW_TOKENS, temperature=0)) for prompt in prompts
    ]


@pytest.fixture(scope="module")
def smallest(default_path):
    sizes = moerun.dry_run(default_path, expert_budget="50%", policy="predictive")
    return sizes["smallest_budget_bytes"]


def load(budget, **options):
    return Model.load(device="cpu", expert_budget=budget, policy="predictive", **options)


def check_counters(stats):
    cache = stats["cache"]
    assert cache["state"] == "cached"
    assert cache["policy"] == "predictive"
    assert cache["arena_bytes"] == cache["ring_bytes"] <= cache["budget_bytes"]
    assert cache["slot_bytes"] == 0
    assert cache["arena_bytes"] == stats["memory"]["expert_bytes"]
    for counters in (cache["total"], *cache["layers"]):
        assert counters["top_hits"] == 0
        assert counters["hits"] + counters["misses"] == counters["lookups"]
        ready = counters["hits"] + counters["prefetch_useful"]
        assert counters["ready_rate"] == (
            ready / counters["lookups"] if counters["lookups"] else None
        )
        ended = sum(counters[f"prefetch_{end}"] for end in ("useful", "late", "wasted"))
        assert ended <= counters["prefetch_issued"]


# Texts


@pytest.mark.parametrize("budget", ["smallest", "15%", "50%"])
@pytest.mark.parametrize("prefetch", [True, False, "auto"])
def test_a_text_and_its_logits_are_those_without_a_cache(shipped, smallest, budget, prefetch):
    budget = smallest if budget == "smallest" else budget
    stats = assert_same(shipped, expert_budget=budget, policy="predictive", prefetch=prefetch)
    check_counters(stats)
    assert stats["cache"]["predictive_active"] is True
    total = stats["cache"]["total"]
    assert (total["prefetch_issued"] > 0) == (prefetch is not False)
    if budget == "50%":
        assert total["hits"] > 0.3 * total["lookups"]


CASES = [
    # budget, batch size, schedule, prefetch
    ("smallest", 1, True, True),
    ("smallest", 3, "auto", "auto"),
    ("smallest", 8, False, False),
    ("15%", 1, "auto", False),
    ("15%", 3, False, True),
    ("15%", 8, True, "auto"),
    ("50%", 1, False, "auto"),
    ("50%", 3, True, False),
    ("50%", 8, "auto", True),
]


@pytest.mark.parametrize(("budget", "batch_size", "schedule", "prefetch"), CASES)
def test_texts_of_a_batch_with_a_predictor_are_those_of_each_prompt(
    prompts, alone, predictor, smallest, budget, batch_size, schedule, prefetch
):
    with load(smallest if budget == "smallest" else budget, prefetch=prefetch) as model:
        options = {"batch_size": batch_size, "predictor": predictor, "schedule": schedule}
        for is_first in (True, False):
            batch = model.generate_batch(
                prompts, max_new_tokens=NEW_TOKENS, temperature=0, **options
            )
            assert texts_of(batch) == alone
            stats = model.stats()
            check_counters(stats)
            prediction = stats["batch"]["prediction"]
            if is_first:  # later it may have measured slower
                assert prediction["predictions"] > 0
                assert prediction["ms"] > 0
        assert 0 <= stats["batch"]["hit_rate"] <= stats["batch"]["ready_rate"] <= 1
        assert (stats["batch"]["schedule"] is None) == (schedule is False)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_texts_of_a_batch_without_a_predictor_are_those_of_each_prompt(prompts, alone, batch_size):
    with load("15%") as model:
        batch = model.generate_batch(
            prompts, max_new_tokens=NEW_TOKENS, batch_size=batch_size, temperature=0
        )
        assert texts_of(batch) == alone
        check_counters(model.stats())
        assert model.stats()["batch"]["prediction"] is None


def test_batches_and_a_text_may_take_turns(prompts, alone, predictor):
    with load("30%") as model, model.batch(2, predictor=predictor, schedule=True) as first:
        found = {}
        with model.batch(3, predictor=predictor, schedule=False) as second:
            text = model.generate(prompts[0], max_new_tokens=NEW_TOKENS, temperature=0)
            for prompt in prompts[:6]:
                first.add(prompt, max_new_tokens=NEW_TOKENS, temperature=0)
                second.add(prompt, max_new_tokens=NEW_TOKENS, temperature=0)
            single = []
            for _ in range(5):
                first.step()
                second.step()
                single.append(next(text))
            first.cancel(1)
        # `second` was ended in the middle.
        single += list(text)
        found = {result.sequence: result.token_ids for result in first}
        assert single == alone[0]
        assert found == {n: alone[n] for n in (0, 2, 3, 4, 5)}
        check_counters(model.stats())


def test_a_step_that_is_cut_off_leaves_the_model_as_it_was(prompts, alone, predictor):
    class Stop(Exception):
        pass

    with load("15%") as model:
        for steps in range(1, 4):
            with model.batch(4, predictor=predictor, schedule=False) as batch:
                for prompt in prompts[:4]:
                    batch.add(prompt, max_new_tokens=NEW_TOKENS, temperature=0)
                for _ in range(steps):
                    batch.step()
                batch.cancel(0)
            tokens = list(model.generate(prompts[1], max_new_tokens=NEW_TOKENS, temperature=0))
            assert tokens == alone[1]
        batch = model.generate_batch(
            prompts[:6], max_new_tokens=NEW_TOKENS, predictor=predictor, temperature=0
        )
        assert texts_of(batch) == alone[:6]


# What it says of itself


def test_a_trial_decides_and_says_so(shipped, predictor, prompts):
    with load("30%", prefetch=False) as model:
        assert model.stats()["cache"]["reason"] == "experts are cached within the budget"
        batch = model.generate_batch(
            prompts[:1],
            max_new_tokens=130,
            ignore_eos=True,
            predictor=predictor,
            schedule=False,
            temperature=0,
        )
        batch.results()
        cache = model.stats()["cache"]
        assert "prediction measured" in cache["reason"]
        verdict = "stays on" if cache["predictive_active"] else "is switched off"
        assert verdict in cache["reason"]
        check_counters(model.stats())
        # Whatever it was, the next text is right.
        assert generate(model, shipped.prompt, len(shipped.tokens)) == shipped.tokens


def test_other_policies_do_not_speak_of_predicting(default_path):
    for options in ({"policy": "lru"}, {"policy": "off"}):
        with Model.load(default_path, expert_budget="30%", **options) as model:
            assert model.stats()["cache"]["predictive_active"] is None
    with Model.load(default_path, expert_budget="100%", policy="predictive") as model:
        cache = model.stats()["cache"]
        assert cache["state"] == "resident"
        assert cache["predictive_active"] in (None, False)


def test_a_predictor_serves_only_a_schedule_or_this_policy(prompts, predictor):
    options = {"max_new_tokens": 3, "predictor": predictor, "schedule": False}
    with Model.load(expert_budget="30%", policy="lru") as model:
        model.generate_batch(prompts[:2], **options).results()
        assert model.stats()["batch"]["prediction"] is None
    with load("30%") as model:
        model.generate_batch(prompts[:2], **options).results()
        assert model.stats()["batch"]["prediction"]["predictions"] > 0


# Options and plans


def test_a_split_is_refused_for_whole_experts_stay():
    for call in (Model.load, moerun.dry_run):
        with pytest.raises(InvalidArgumentError, match=r"split.*predictive keeps whole experts"):
            call(moerun.default_model(), expert_budget="30%", policy="predictive", split=0.5)


def test_the_smallest_budget_is_that_of_the_other_policies(default_path, smallest):
    plan = moerun.dry_run(default_path, expert_budget="50%")
    assert plan["smallest_budget_bytes"] == smallest
    with pytest.raises(
        OutOfMemoryError, match=rf"smallest budget that works is {size_text(smallest, 'up')}"
    ):
        load(smallest - 1)


@pytest.mark.parametrize("budget", ["5%", "37%", "99%"])
def test_a_dry_run_says_what_a_load_then_does(default_path, budget):
    plan = moerun.dry_run(default_path, expert_budget=budget, policy="predictive")
    assert plan["state"] == "cached"
    assert plan["policy"] == "predictive"
    assert plan["slot_bytes"] == 0
    assert plan["arena_bytes"] == plan["ring_bytes"] <= plan["budget_bytes"]
    assert plan["arena_bytes"] > plan["budget_bytes"] - plan["expert_bytes_each"]
    slots = [layer["slots"] for layer in plan["layers"]]
    assert sum(slots) + plan["top_k"] == plan["arena_bytes"] // plan["expert_bytes_each"]
    assert max(slots) - min(slots) <= 1
    with load(budget) as model:
        cache = model.stats()["cache"]
    assert [layer["slots"] for layer in cache["layers"]] == slots
    assert cache["arena_bytes"] == plan["arena_bytes"]


def write_plan(path, sizes, slots, policy="lcp", **fields):
    layers = [{"layer": n, "slots": count, "split": 1} for n, count in enumerate(slots)]
    path.write_text(json.dumps(plan_of(sizes, policy, layers, **fields)))
    return path


def budget_of(sizes, num_experts):
    return {"budget_bytes": num_experts * sizes["expert_bytes_each"]}


def test_a_plan_says_the_slots_to_fall_back_to(shipped, tmp_path):
    slots = [1, 2, 3, 4, 5, 6, 7, 8]
    sizes = shipped.sizes
    file = write_plan(tmp_path / "plan.json", sizes, slots, **budget_of(sizes, sum(slots) + 4))
    stats = assert_same(shipped, plan=file, policy="predictive")
    check_counters(stats)
    assert [layer["slots"] for layer in stats["cache"]["layers"]] == slots
    assert stats["cache"]["arena_bytes"] == (sum(slots) + 4) * sizes["expert_bytes_each"]
    # A plan may also ask for the policy itself.
    own = write_plan(
        tmp_path / "own.json", sizes, slots, "predictive", **budget_of(sizes, sum(slots) + 4)
    )
    check_counters(assert_same(shipped, plan=own))
    with pytest.raises(InvalidArgumentError, match=r"plan.*policy"):
        Model.load(shipped.directory, plan=file, policy="lru")


def test_reconfigure_changes_the_slots_and_no_text(shipped, tmp_path):
    sizes = shipped.sizes
    with load("30%") as model:
        most = model.stats()["cache"]["arena_bytes"] // sizes["expert_bytes_each"]
        plans = [
            write_plan(tmp_path / f"{n}.json", sizes, slots, **budget_of(sizes, most))
            for n, slots in enumerate([[9, 9, 9, 9, 9, 9, 9, 9], [30, 1, 0, 0, 20, 8, 4, 5]])
        ]
        text = model.generate(
            shipped.prompt, max_new_tokens=len(shipped.tokens), ignore_eos=True, temperature=0
        )
        tokens = []
        for token in text:
            tokens.append(token)
            if len(tokens) % 5 == 0:
                model.reconfigure(plans[len(tokens) // 5 % 2])
        assert tokens == shipped.tokens
        cache = model.stats()["cache"]
        assert cache["reconfigured"] == len(tokens) // 5
        check_counters(model.stats())
        too_large = write_plan(tmp_path / "l.json", sizes, [9] * 8, **budget_of(sizes, most + 9))
        with pytest.raises(OutOfMemoryError, match="larger budget"):
            model.reconfigure(too_large)
        assert generate(model, shipped.prompt, len(shipped.tokens)) == shipped.tokens


def test_a_saved_plan_loads_as_the_same_cache(shipped, tmp_path):
    with load("30%") as model:
        generate(model, shipped.prompt)
        file = model.save_plan(tmp_path / "plan.json")
        cache = model.stats()["cache"]
        model.reconfigure(file)
    stats = assert_same(shipped, plan=file)
    assert stats["cache"]["policy"] == "predictive"
    assert stats["cache"]["arena_bytes"] == cache["arena_bytes"]
    for found, expected in zip(stats["cache"]["layers"], cache["layers"], strict=True):
        assert found["slots"] == expected["slots"]


def test_what_is_resident_is_no_more_than_fits(shipped):
    with load("30%") as model:
        generate(model, shipped.prompt)
        cache = model.stats()["cache"]
        residents = model.residents()
        count = sum(map(len, residents.values()))
        assert 0 < count <= cache["arena_bytes"] // shipped.sizes["expert_bytes_each"]
        for experts in residents.values():
            assert len(set(experts)) == len(experts)
        assert_adds_up(cache, shipped.sizes)


# The command line


def test_the_command_line_knows_it(run_cli, default_path):
    options = ["--expert-budget", "30%", "--policy", "predictive"]
    value = as_json(run_cli("--dry-run", "--json", *options))
    expected = moerun.dry_run(default_path, expert_budget="30%", policy="predictive")
    for name in ("policy", "arena_bytes", "ring_bytes", "slot_bytes", "layers"):
        assert value[name] == expected[name]
    done = run_cli("--dry-run", *options)
    assert done.returncode == 0, done.stderr
    assert "30.0 % of the experts" in done.stdout
    failed = run_cli("--dry-run", *options, "--split", "0.5")
    assert_failed(failed, "predictive keeps whole experts")
    plain = as_json(run_cli("--json", "-n", "12", "import os\n"))
    shared = as_json(run_cli("--json", "-n", "12", *options, "import os\n"))
    assert shared["text"] == plain["text"]
    assert shared["stats"]["cache"]["predictive_active"] is True
    done = run_cli("--stats", "-n", "12", *options, "import os\n")
    assert done.returncode == 0, done.stderr
    assert "predictive" in done.stderr


@pytest.mark.parametrize("schedule", ["on", "off", "auto"])
def test_a_batch_of_the_command_line_predicts(run_cli, tmp_path, predictor, schedule):
    lines = tmp_path / "p.jsonl"
    lines.write_text("".join(f'"{text} {n}"\n' for n in range(4) for text in ("import", "NAME")))
    plain, predicted = tmp_path / "plain", tmp_path / "predicted"
    arguments = ("--batch", str(lines), "-n", "10", "--batch-size", "3", "--seed", "1")
    assert run_cli(*arguments, "-o", str(plain)).returncode == 0
    options = ("--expert-budget", "20%", "--policy", "predictive", "--predictor", str(predictor))
    done = run_cli(*arguments, "-o", str(predicted), *options, "--schedule", schedule, "--stats")
    assert done.returncode == 0, done.stderr
    assert "predictions" in done.stderr
    assert predicted.read_text() == plain.read_text()
