"""Batches that are put together by predicted experts: fewer experts, the same texts."""

import pytest
from predictors import predictor_of_shipped_model
from test_batch import CODE, MANUAL, texts_of

import moerun
from moerun.errors import FormatError, InvalidArgumentError, MissingFileError


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """Random weights: they name experts by the token, which is enough to tell texts apart."""
    return predictor_of_shipped_model(tmp_path_factory.mktemp("predictor") / "p.safetensors")


@pytest.fixture(scope="module")
def prompts(model):
    texts = [
        text + f" {n}" for n in range(4) for pair in zip(CODE, MANUAL, strict=True) for text in pair
    ]
    return [model.tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def alone(model, prompts):
    return [list(model.generate(prompt, max_new_tokens=12, temperature=0)) for prompt in prompts]


@pytest.mark.parametrize("schedule", [True, "auto"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scheduled_texts_are_those_of_each_prompt(
    model, predictor, prompts, alone, batch_size, schedule
):
    options = {"batch_size": batch_size, "predictor": predictor, "schedule": schedule}
    batch = model.generate_batch(prompts, max_new_tokens=12, temperature=0, **options)
    assert texts_of(batch) == alone
    stats = model.stats()["batch"]
    assert stats["most_running"] == 2 * batch_size
    assert stats["tokens_per_step"] <= batch_size
    assert stats["schedule"]["rounds"] > 0
    if schedule is True:
        assert stats["schedule"]["scheduled_rounds"] == stats["schedule"]["rounds"]
        assert stats["schedule"]["predicted_experts"] <= stats["schedule"]["predicted_in_order"]
        assert stats["prediction"]["ms"] > 0


@pytest.mark.parametrize("cache", [{"policy": "lru"}, {"policy": "lcp", "split": 0.5}])
def test_the_cache_changes_no_scheduled_text(predictor, prompts, alone, cache):
    with moerun.Model.load(expert_budget="30%", **cache) as model:
        batch = model.generate_batch(
            prompts, max_new_tokens=12, batch_size=4, predictor=predictor, temperature=0
        )
        assert texts_of(batch) == alone


def test_auto_is_what_a_predictor_stands_for(model, predictor, prompts):
    model.generate_batch(
        prompts[:2], max_new_tokens=2, predictor=predictor, temperature=0
    ).results()
    assert model.stats()["batch"]["schedule"] is not None
    model.generate_batch(prompts[:2], max_new_tokens=2, temperature=0).results()
    assert model.stats()["batch"]["schedule"] is None
    off = {"predictor": predictor, "schedule": False}
    model.generate_batch(prompts[:2], max_new_tokens=2, **off).results()
    assert model.stats()["batch"]["schedule"] is None


def test_auto_tries_and_says_what_it_found(model, predictor, prompts):
    batch = model.generate_batch(
        prompts[:4],
        max_new_tokens=60,
        ignore_eos=True,
        batch_size=2,
        predictor=predictor,
        temperature=0,
    )
    batch.results()
    schedule = model.stats()["batch"]["schedule"]
    assert schedule["token_ms_on"] > 0
    assert schedule["token_ms_off"] > 0
    assert 0 < schedule["scheduled_rounds"] < schedule["rounds"]
    worth_it = schedule["token_ms_on"] <= 1.02 * schedule["token_ms_off"]
    assert schedule["active"] == worth_it


def test_sequences_join_leave_and_are_cancelled_while_others_are_scheduled(
    model, predictor, prompts, alone
):
    with model.batch(2, predictor=predictor, schedule=True) as batch:
        for prompt in prompts[:3]:
            batch.add(prompt, max_new_tokens=12, temperature=0)
        for _ in range(4):
            batch.step()
        for prompt in prompts[3:8]:
            batch.add(prompt, max_new_tokens=12, temperature=0)
        batch.cancel(1)
        found = {result.sequence: result.token_ids for result in batch}
    assert found == {n: alone[n] for n in (0, 2, 3, 4, 5, 6, 7)}


def test_predictors_that_do_not_fit_are_refused(model, predictor, tmp_path):
    with pytest.raises(InvalidArgumentError, match="needs a predictor"):
        model.batch(schedule=True)
    with pytest.raises(InvalidArgumentError, match="schedule must be"):
        model.batch(predictor=predictor, schedule="always")
    with pytest.raises(MissingFileError, match=r"none\.safetensors"):
        model.batch(predictor=tmp_path / "none.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(predictor.read_bytes()[:-100])
    with pytest.raises(FormatError):
        model.batch(predictor=damaged)
    for name, wrong in (("model_id", "f" * 16), ("tokenizer_hash", "f" * 64)):
        other = tmp_path / f"{name}.safetensors"
        predictor_of_shipped_model(other, **{name: wrong})
        with pytest.raises(FormatError, match=r"model|tokenizer"):
            model.batch(predictor=other)


def test_moe_run_schedules_a_batch_and_says_what_came_of_it(run_cli, tmp_path, predictor):
    lines = tmp_path / "p.jsonl"
    lines.write_text("".join(f'"{text} {n}"\n' for n in range(6) for text in ("import", "NAME")))
    plain, scheduled = tmp_path / "plain", tmp_path / "scheduled"
    arguments = ("--batch", str(lines), "-n", "10", "--batch-size", "3", "--seed", "1")
    assert run_cli(*arguments, "-o", str(plain)).returncode == 0
    options = ("--predictor", str(predictor), "--schedule", "on", "--stats")
    done = run_cli(*arguments, "-o", str(scheduled), *options)
    assert done.returncode == 0
    assert "rounds of two batches" in " ".join(done.stderr.split())
    assert scheduled.read_text() == plain.read_text()
