"""Budgets and plans that cannot be, and files that change while they are needed."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cached import NUM_NEW_TOKENS, generate, plan_of, within

import moerun
from moerun import Model, errors
from moerun.sizes import size_text

# Budgets and plans that cannot be


def test_a_budget_below_the_smallest_names_the_smallest(shipped):
    smallest = shipped.sizes["smallest_budget_bytes"]
    for call in (Model.load, moerun.dry_run):
        with pytest.raises(
            errors.OutOfMemoryError, match=rf"smallest.* {size_text(smallest, 'up')}"
        ):
            call(shipped.directory, expert_budget=smallest - 1)


LAYER = {"layer": 3, "slots": 4, "split": 0.5}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layers": [LAYER | {"layer": 8}]}, "layer 8"),
        ({"layers": [LAYER, LAYER]}, "layer 3.*twice"),
        ({"layers": [LAYER | {"slots": 33}]}, "33"),
        ({"layers": [LAYER | {"slots": -1}]}, "slots"),
        ({"layers": [LAYER | {"slots": 1.5}]}, "slots"),
        ({"layers": [LAYER | {"split": 1.5}]}, "split"),
        ({"layers": [LAYER | {"split": "much"}]}, "split"),
        ({"layers": [LAYER | {"experts": [32]}]}, "32"),
        ({"layers": [LAYER | {"slot": 4}]}, r"layers\[0\]\.slot"),
        ({"layers": [{"layer": 3, "split": 0.5}]}, "slots"),
        ({"layers": [7]}, "layers"),
        ({"layers": None}, "layers"),
        ({"budget_bytes": 1_000_000, "layers": [LAYER | {"slots": 32}]}, "976.56 KiB"),
        ({"budget_bytes": "6GiB"}, "budget_bytes"),
        ({"version": 2}, "version"),
        ({"version": None}, "version"),
        ({"polici": "lru"}, "polici"),
        ({"policy": "mru"}, "mru"),
        ({"policy": "off"}, "off"),  # has no slots
        ({"prefetch": "maybe"}, "maybe"),
        ({"model": 7}, "model"),
        ({"predicted": 7}, "predicted"),
        ({"predicted": {"hit_rate": 1.5}}, r"predicted\.hit_rate"),
        ({"predicted": {"tpot_ms": "soon"}}, r"predicted\.tpot_ms"),
        ({"predicted": {"tpot_ms": -1}}, r"predicted\.tpot_ms"),
        ({"predicted": {"luck": 1}}, r"predicted\.luck"),
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_is_refused_and_named(shipped, tmp_path, changes, expected):
    file = tmp_path / "plan.json"
    plan = plan_of(shipped.sizes, "lru", [LAYER], budget_bytes=10_000_000) | changes
    file.write_text(json.dumps({name: value for name, value in plan.items() if value is not None}))
    for call in (Model.load, moerun.dry_run):
        kinds = (errors.FormatError, errors.InvalidArgumentError)
        with pytest.raises(kinds, match=expected) as caught:
            call(shipped.directory, plan=file)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b'{"version": 1}'])
def test_a_plan_that_is_no_plan_is_named(shipped, tmp_path, content):
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(errors.FormatError, match=re.escape(str(file))):
        Model.load(shipped.directory, plan=file)


def test_a_plan_that_is_not_there_is_named(shipped, tmp_path):
    with pytest.raises(errors.MissingFileError, match=r"none\.json"):
        Model.load(shipped.directory, plan=tmp_path / "none.json")
    with pytest.raises(errors.FileError, match=re.escape(str(tmp_path))):
        Model.load(shipped.directory, plan=tmp_path)


def test_a_plan_smaller_than_what_a_token_needs_names_the_smallest(shipped, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan_of(shipped.sizes, "lru", [], budget_bytes=1000)))
    smallest = shipped.sizes["smallest_budget_bytes"]
    with pytest.raises(
        (errors.OutOfMemoryError, errors.FormatError), match=size_text(smallest, "up")
    ):
        Model.load(shipped.directory, plan=file)


# Files that change while they are needed


@pytest.fixture
def own_copy(tmp_path, default_path):
    """A copy of the shipped model whose weights may be changed too."""
    return Path(shutil.copytree(default_path, tmp_path / "own"))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def overwrite(path):
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size // 4))


def append(path):
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("spoil", [truncate, empty, overwrite, append])
@pytest.mark.parametrize("prefetch", [True, False])
def test_weights_that_change_under_a_loaded_model_are_an_error(own_copy, spoil, prefetch):
    prompt = list(range(5, 30))
    with Model.load(own_copy, expert_budget="20%", prefetch=prefetch) as model:
        file = own_copy / "model.safetensors"
        spoil(file)
        for call in (
            lambda: generate(model, prompt),
            lambda: generate(model, prompt[:1]),
            lambda: model.forward(prompt),
        ):
            with pytest.raises(errors.FileError, match=re.escape(str(file))):
                within(30, call)


@pytest.mark.parametrize("spoil", [truncate, overwrite])
def test_weights_that_change_in_the_middle_of_a_text_end_it_with_an_error(own_copy, shipped, spoil):
    with Model.load(own_copy, expert_budget="20%") as model:
        generation = model.generate(shipped.prompt, max_new_tokens=NUM_NEW_TOKENS, temperature=0)
        tokens = [next(generation) for _ in range(5)]
        file = own_copy / "model.safetensors"
        spoil(file)
        with pytest.raises(errors.FileError, match=re.escape(str(file))):
            within(30, lambda: tokens.extend(generation))
    assert tokens == shipped.tokens[: len(tokens)]  # whatever was given out before is right


def unlink(directory):
    shutil.rmtree(directory)


def replace_by_another(directory):
    other = directory / "other"
    other.write_bytes(b"something else")
    os.replace(other, directory / "model.safetensors")


@pytest.mark.parametrize("remove", [unlink, replace_by_another])
def test_files_that_are_deleted_or_replaced_are_read_on(own_copy, shipped, remove):
    with Model.load(own_copy, expert_budget="20%") as model:
        remove(own_copy)
        assert generate(model, shipped.prompt) == shipped.tokens
        assert np.array_equal(model.forward(shipped.prompt), shipped.logits)
