"""Plans written from a loaded model, and runs that start from them."""

import json

import numpy as np
import pytest
from cached import generate, plan_of
from conftest import as_json, assert_failed, offline_environment

import moerun
from moerun import Model
from moerun.errors import FileError, InvalidArgumentError
from moerun.planning.stored_plans import plans_folder, stored_plan

MOVED = {0: 3, 1: 15}  # slots that a cache without a plan would not have


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Nothing that is stored on the machine is seen or touched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moerun" / "plans"


@pytest.fixture
def auto(shipped):
    def load(budget="30%", **options):
        return Model.load(
            shipped.directory, device="cpu", expert_budget=budget, plan="auto", **options
        )

    return load


def slots_of(stats_or_sizes):
    return [layer["slots"] for layer in stats_or_sizes["layers"]]


def residents_of(model):
    return {layer: set(ids) for layer, ids in model.residents().items()}


def moved_slots(model, tmp_path):
    """Take slots from one layer and give some of them to another."""
    file = model.save_plan(tmp_path / "moved.json")
    plan = json.loads(file.read_text())
    for layer in plan["layers"]:
        layer["slots"] = MOVED.get(layer["layer"], layer["slots"])
        layer["warm"] = layer["warm"][: layer["slots"]]
    file.write_text(json.dumps(plan))
    model.reconfigure(file)


# plan="auto"


def test_a_run_starts_where_the_last_one_ended(shipped, auto, folder, tmp_path):
    with auto() as model:
        assert model.stats()["plan"]["started_from"] == "uniform"
        uniform = model.stats()["cache"]
        assert generate(model, shipped.prompt) == shipped.tokens
        moved_slots(model, tmp_path)
        generate(model, shipped.prompt)
        residents, slots = residents_of(model), slots_of(model.stats()["cache"])
        file = model.save_plan()
    assert slots != slots_of(uniform)
    assert file.parent == folder == plans_folder()
    assert [*folder.iterdir()] == [file]
    with auto() as model:
        assert model.stats()["plan"]["started_from"] == "stored"
        cache = model.stats()["cache"]
        assert slots_of(cache) == slots
        assert residents_of(model) == residents
        assert cache["warm_bytes"] > 0
        # What the plan leaves over is still there for the next one.
        assert cache["arena_bytes"] == uniform["arena_bytes"] > cache["slot_bytes"]
        assert cache["budget_bytes"] == uniform["budget_bytes"]
        assert generate(model, shipped.prompt) == shipped.tokens
        assert model.stats()["logits_hash"] == shipped.logits_hash
        assert model.save_plan() == file
    sizes = moerun.dry_run(shipped.directory, device="cpu", expert_budget="30%", plan="auto")
    assert slots_of(sizes) == slots
    assert sizes["arena_bytes"] == cache["arena_bytes"]
    assert sizes["slot_bytes"] == cache["slot_bytes"]


def test_the_stored_plan_leaves_prefetch_to_the_run(auto):
    with auto(prefetch=False) as model:
        generate(model, [1, 2, 3])
        model.save_plan()
    with auto() as model:
        assert model.stats()["plan"]["started_from"] == "stored"
        assert model.stats()["cache"]["prefetch"] == "auto"
    with auto(prefetch=True) as model:
        assert model.stats()["cache"]["prefetch"] == "on"


def test_only_a_plan_of_this_budget_policy_and_store_is_taken(shipped, auto, tmp_path):
    with auto() as model:
        generate(model, shipped.prompt)
        file = model.save_plan()
        budget = model.stats()["cache"]["budget_bytes"]

    def found(**options):
        with auto(**options) as model:
            return model.stats()["plan"]["started_from"]

    assert found() == "stored"
    assert found(budget="33%") == "stored"  # somewhat more memory than it needs
    assert found(budget="34%") == "uniform"
    assert found(budget=budget - 1) == "uniform"
    assert found(policy="lcp") == "stored"
    assert found(policy="lru") == "uniform"
    options = {"device": "cpu", "budget_bytes": budget}
    assert stored_plan(shipped.directory, **options) == file
    assert stored_plan(shipped.directory, pack=tmp_path, **options) is None
    assert stored_plan(shipped.directory, **{**options, "device": "cuda"}) is None
    larger = file.with_name(file.name.replace(str(budget), str(budget + 9)))
    larger.write_bytes(file.read_bytes())
    file.with_name(file.name.replace(str(budget), "x")).write_text("{}")
    options["budget_bytes"] = budget + 10
    assert stored_plan(shipped.directory, **options) == larger


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"slots": 9', '"slots": 99'),
        lambda text: json.dumps({**json.loads(text), "model_id": "0123456789abcdef"}),
    ],
)
def test_a_damaged_stored_plan_is_passed_over_and_written_again(shipped, auto, damage):
    with auto() as model:
        generate(model, shipped.prompt)
        file = model.save_plan()
    good = file.read_text()
    file.write_text(damage(good))
    assert file.read_text() != good
    sizes = moerun.dry_run(shipped.directory, device="cpu", expert_budget="30%", plan="auto")
    with auto() as model:
        assert model.stats()["plan"]["started_from"] == "uniform"
        assert slots_of(model.stats()["cache"]) == slots_of(sizes)
        assert generate(model, shipped.prompt) == shipped.tokens
        assert model.save_plan() == file
    assert file.read_text() == good


def test_a_stored_plan_that_needs_more_than_the_cache_has_is_passed_over(shipped, auto):
    """A plan made by hand may use what equal layers leave of a budget."""
    with auto() as model:
        cache = model.stats()["cache"]
        file = model.save_plan()
    plan = json.loads(file.read_text())
    first = plan["layers"][0]
    first.update(split=0.5, slots=2 * first["slots"] + 1)
    file.write_text(json.dumps(plan))
    by_hand = moerun.dry_run(shipped.directory, device="cpu", plan=file)
    assert cache["arena_bytes"] < by_hand["arena_bytes"] <= cache["budget_bytes"]
    with auto() as model:
        assert model.stats()["plan"]["started_from"] == "uniform"
        assert slots_of(model.stats()["cache"]) == slots_of(cache)
    sizes = moerun.dry_run(shipped.directory, device="cpu", expert_budget="30%", plan="auto")
    assert slots_of(sizes) == slots_of(cache)


@pytest.mark.parametrize("take", [Model.load, moerun.dry_run])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": 0.5}, "split"),
        ({"policy": "static"}, "lcp, lfu, lru.*'static'"),
        ({"policy": "off"}, "lcp, lfu, lru.*'off'"),
    ],
)
def test_what_excludes_planning_is_refused(default_path, take, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        take(default_path, device="cpu", expert_budget="30%", plan="auto", **options)


# save_plan


def test_a_saved_plan_starts_warm(shipped, tmp_path):
    options = {"device": "cpu", "prefetch": False}
    with Model.load(shipped.directory, expert_budget="40%", **options) as model:
        generate(model, shipped.prompt)
        residents = residents_of(model)
        file = model.save_plan(tmp_path / "plan.json")
    assert file == tmp_path / "plan.json"

    def first_hits(file):
        with Model.load(shipped.directory, plan=file, **options) as model:
            before = residents_of(model)
            generate(model, shipped.prompt[:1], 4)  # a prompt of one token is decoded
            return before, model.stats()["cache"]["total"]["hits"]

    plan = json.loads(file.read_text())
    assert plan["model_id"] == moerun.planning.model_id(shipped.directory)
    cold = tmp_path / "cold.json"
    for layer in plan["layers"]:
        del layer["warm"]
    cold.write_text(json.dumps(plan))
    warm_residents, warm_hits = first_hits(file)
    cold_residents, cold_hits = first_hits(cold)
    assert warm_residents == residents
    assert not any(cold_residents.values())
    assert warm_hits > cold_hits


def test_a_file_is_replaced_and_a_missing_folder_said(shipped, auto, tmp_path, monkeypatch):
    file = tmp_path / "plan.json"
    file.write_text("old")
    with auto() as model:
        model.save_plan(file)
        cold = json.loads(file.read_text())
        assert not any("warm" in layer for layer in cold["layers"])
        generate(model, shipped.prompt)
        model.save_plan(str(file))
        assert all(layer["warm"] for layer in json.loads(file.read_text())["layers"])
        with pytest.raises(FileError, match="cannot write"):
            model.save_plan(tmp_path / "none" / "plan.json")
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))
        with pytest.raises(FileError, match="cannot store the plan"):
            model.save_plan()
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json"}
    with pytest.raises(moerun.errors.MoerunError, match="closed"):
        model.save_plan(file)


def test_static_has_its_plan_and_resident_models_say_that_they_are(shipped, tmp_path):
    layers = [{"layer": layer, "slots": 2, "split": 1, "experts": [1, 7]} for layer in range(8)]
    file, saved = tmp_path / "static.json", tmp_path / "saved.json"
    file.write_text(json.dumps(plan_of(shipped.sizes, "static", layers)))
    with (
        Model.load(shipped.directory, device="cpu", plan=file) as model,
        pytest.raises(InvalidArgumentError, match="copy that file"),
    ):
        model.save_plan(saved)
    assert not saved.exists()
    with Model.load(shipped.directory, device="cpu", expert_budget="100%") as model:
        model.save_plan(saved)
    with Model.load(shipped.directory, device="cpu", plan=saved) as model:
        assert model.stats()["cache"]["state"] == "resident"
        assert np.array_equal(model.forward(shipped.prompt), shipped.logits)


# moe-run


@pytest.fixture
def run(run_cli, tmp_path):
    environment = offline_environment(XDG_CACHE_HOME=str(tmp_path / "cache"))

    def run(*args):
        return run_cli("--device", "cpu", "-n", "20", *map(str, args), "import os", env=environment)

    return run


AUTO = ("--plan", "auto", "--expert-budget", "30%")


def test_moe_run_says_what_it_started_from(run, folder):
    plain = run("--expert-budget", "30%")
    first = run(*AUTO, "--stats")
    assert "plan auto, without a stored plan: planned 0 times, changed 0" in " ".join(
        first.stderr.split()
    )
    (file,) = folder.iterdir()
    second = run(*AUTO, "--stats")
    assert "plan auto, from a stored plan: planned 0 times, changed 0" in " ".join(
        second.stderr.split()
    )
    assert [*folder.iterdir()] == [file]
    assert first.stdout == second.stdout == plain.stdout
    assert "plan auto" not in plain.stderr
    stats = as_json(run(*AUTO, "--json"))["stats"]
    assert stats["plan"]["started_from"] == "stored"
    assert set(stats["plan"]) == {
        "started_from",
        "every",
        "planned",
        "changed",
        "costs",
        "last",
    }
    assert stats["cache"]["warm_bytes"] > 0
    sizes = as_json(run(*AUTO, "--dry-run", "--json"))
    assert slots_of(sizes) == slots_of(stats["cache"])
    assert as_json(run("--json"))["stats"]["plan"] is None


def test_moe_run_saves_a_plan_and_starts_from_it(run, folder, tmp_path):
    file = tmp_path / "plan.json"
    cold = as_json(run("--expert-budget", "40%", "--save-plan", file, "--json"))
    warm = as_json(run("--plan", file, "--json"))
    assert warm["text"] == cold["text"]
    assert warm["stats"]["cache"]["warm_bytes"] > 0 == cold["stats"]["cache"]["warm_bytes"]
    assert warm["stats"]["cache"]["total"]["hits"] > cold["stats"]["cache"]["total"]["hits"]
    assert not folder.exists()
    resident = run("--expert-budget", "100%", "--plan", "auto", "--save-plan", file)
    assert resident.returncode == 0, resident.stderr
    assert json.loads(file.read_text())["resident"] is True
    assert not folder.exists()


def test_moe_run_refuses_before_it_loads(run, run_cli, model_copy, tmp_path):
    weights = model_copy / "model.safetensors"
    weights.unlink()
    weights.write_bytes(b"not weights")
    missing = tmp_path / "none" / "plan.json"
    assert_failed(run("-m", model_copy, "--save-plan", missing), "there is no folder")
    assert_failed(run("-m", model_copy, "--save-plan", tmp_path), "not a plain file")
    assert_failed(run("-m", model_copy, *AUTO, "--policy", "off"), "lcp, lfu, lru")
    for args, text in (
        (("--save-plan", ""), "not empty"),
        ((*AUTO, "--split", "0.5"), "--plan and --split exclude each other"),
    ):
        done = run("-m", model_copy, *args)
        assert done.returncode == 2
        assert text in done.stderr


def test_moe_run_keeps_the_text_where_the_plan_cannot_be_stored(run_cli, tmp_path):
    (tmp_path / "file").write_text("")
    done = run_cli(
        "--device", "cpu", "-n", "5", *AUTO, "import os",
        env=offline_environment(XDG_CACHE_HOME=str(tmp_path / "file")),
    )  # fmt: skip
    assert done.returncode == 0
    assert "warning: cannot store the plan" in done.stderr
    assert done.stdout.startswith("import os")
