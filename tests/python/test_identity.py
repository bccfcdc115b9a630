"""What is the same model, and that everything that is stored asks the same question."""

import getpass
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import as_json, assert_failed, change_json, offline_environment
from predictors import random_predictor
from test_recording import TEXTS, record

import moerun
from moerun import Model, _moerun
from moerun.errors import FormatError, InvalidArgumentError, MissingFileError
from moerun.identity import ModelIdentity, machine_name, model_id, parts_of_recording
from moerun.planning import CostModel, store_costs, stored_costs
from moerun.planning.stored_plans import stored_plan
from moerun.predictor import PathPredictor
from moerun.recording import NativeEngine

COSTS = CostModel(
    attention_s=(1e-4,) * 8,
    moe_s=(1e-4,) * 8,
    prompt_s=(1e-5,) * 8,
    head_s=1e-4,
    link_fixed_s=1e-5,
    link_bytes_per_s=1e9,
    device="cpu",
    store="checkpoint",
    moerun_version=moerun.__version__,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing that is stored on the machine is seen or touched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MOERUN_CACHE", str(tmp_path / "cache" / "packs"))
    return tmp_path / "cache"


@pytest.fixture
def own_copy(own_weights):
    """A copy of the shipped model with weights of its own."""
    return own_weights.parent


def train(directory):
    """Other weights in the same file: of the same size, with the same time."""
    weights = directory / "model.safetensors"
    times = os.stat(weights)
    data = bytearray(weights.read_bytes())
    header = int.from_bytes(data[:8], "little") + 8
    for place in range(header, len(data), 512):
        data[place] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(weights).st_mtime_ns == times.st_mtime_ns
    assert os.stat(weights).st_size == times.st_size


def another_tokenizer(directory):
    """Two tokens change places: the same ids mean another text."""
    path = directory / "tokenizer.json"
    value = json.loads(path.read_text())
    vocabulary = value["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.__getitem__)[2000:2002]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(value))


def parts(directory):
    return ModelIdentity(directory).all_parts


def differing(directory, before):
    return {name for name, value in parts(directory).items() if before[name] != value}


def test_where_a_model_lies_and_when_it_was_written_is_not_a_part_of_it(default_path, tmp_path):
    copy = shutil.copytree(default_path, tmp_path / "another name")
    assert parts(copy) == parts(default_path) == parts(None)
    assert model_id(copy) == model_id() == ModelIdentity(copy).model_id
    assert len(model_id()) == 16
    assert int(model_id(), 16) >= 0


def test_every_part_of_a_model_is_of_its_own_files(own_copy):
    before = parts(own_copy)
    train(own_copy)
    assert differing(own_copy, before) == {"weights"}
    before = parts(own_copy)
    for name, change, part in (
        ("config.json", {"num_experts_per_tok": 3}, "config"),
        ("config.json", {"rope_theta": 5000.0}, "config"),
        ("special_tokens_map.json", {"pad_token": "x"}, "tokenizer"),
        ("added_tokens.json", {"x": 4095}, "tokenizer"),
        ("tokenizer_config.json", {"add_bos_token": True}, "tokenizer"),
        ("tokenizer_config.json", {"chat_template": "{{ 1 }}"}, "chat template"),
        ("chat_template.json", {"chat_template": "{{ 1 }}"}, "chat template"),
        ("generation_config.json", {"temperature": 0.123}, "generation config"),
    ):
        file = own_copy / name
        original = file.read_bytes() if file.exists() else None
        if original is None:
            file.write_text("{}")
        change_json(file, **change)
        assert differing(own_copy, before) == {part}, (name, change)
        file.unlink() if original is None else file.write_bytes(original)
    (own_copy / "chat_template.jinja").write_text("{{ messages }}")
    assert differing(own_copy, before) == {"chat template"}
    another_tokenizer(own_copy)
    assert differing(own_copy, before) == {"chat template", "tokenizer"}


def test_what_changes_no_token_is_not_a_part_of_a_model(own_copy):
    before = parts(own_copy)
    config = json.loads((own_copy / "config.json").read_text())
    for name in ("_name_or_path", "transformers_version", "architectures", "use_cache"):
        config[name] = "other"
    (own_copy / "config.json").write_text(json.dumps(config, indent=7, sort_keys=True))
    change_json(own_copy / "generation_config.json", transformers_version="9")
    (own_copy / "README.md").write_text("a model")
    (own_copy / "trace.safetensors").write_bytes(b"a trace")
    assert parts(own_copy) == before


def test_shards_are_the_same_model_as_one_file(own_copy, default_path):
    single = own_copy / "model.safetensors"
    data = single.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    names = sorted(header)
    files = {}
    for index in range(3):
        own, body = {}, b""
        for name in names[index::3]:
            begin, end = header[name]["data_offsets"]
            own[name] = {**header[name], "data_offsets": [len(body), len(body) + end - begin]}
            body += data[8 + length + begin : 8 + length + end]
            files[name] = f"model-{index}.safetensors"
        text = json.dumps(own).encode()
        (own_copy / f"model-{index}.safetensors").write_bytes(
            len(text).to_bytes(8, "little") + text + body
        )
    single.unlink()
    (own_copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert parts(own_copy) == parts(default_path)


def test_weights_are_read_once_while_no_file_changes(own_copy, monkeypatch):
    calls = []
    real = _moerun.checkpoint_fingerprint

    def counted(path):
        calls.append(path)
        return real(path)

    monkeypatch.setattr(_moerun, "checkpoint_fingerprint", counted)
    first = ModelIdentity(own_copy)
    assert first.weights_hash == ModelIdentity(own_copy).weights_hash
    assert first.sizes_id == ModelIdentity(own_copy).sizes_id
    assert len(calls) == 1
    train(own_copy)
    assert ModelIdentity(own_copy).weights_hash != first.weights_hash
    assert ModelIdentity(own_copy).sizes_id == first.sizes_id
    assert len(calls) == 2


def test_a_file_that_is_missing_or_a_pipe_is_an_error_and_no_wait(own_copy):
    tokenizer = own_copy / "tokenizer.json"
    tokenizer.unlink()
    assert ModelIdentity(own_copy).tokenizer_hash == "0" * 64
    os.mkfifo(tokenizer)
    with pytest.raises(moerun.errors.FileError, match="a pipe"):
        _ = ModelIdentity(own_copy).tokenizer_hash
    (own_copy / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"config\.json"):
        model_id(own_copy)


# Everything that is stored


def test_a_plan_of_weights_that_were_there_before_is_refused(own_copy, tmp_path):
    options = {"device": "cpu", "expert_budget": "30%"}
    with Model.load(own_copy, **options) as model:
        plan = model.save_plan(tmp_path / "plan.json")
        model.save_plan()
        budget = model.stats()["cache"]["budget_bytes"]
    assert stored_plan(own_copy, device="cpu", budget_bytes=budget) is not None
    train(own_copy)
    with pytest.raises(FormatError, match=r"of another model: its model_id is [0-9a-f]{16}"):
        Model.load(own_copy, device="cpu", plan=plan)
    with pytest.raises(FormatError, match="of another model"):
        moerun.dry_run(own_copy, plan=plan)
    assert stored_plan(own_copy, device="cpu", budget_bytes=budget) is None
    with Model.load(own_copy, **options, plan="auto") as model:
        assert model.stats()["plan"]["started_from"] == "uniform"
        with pytest.raises(FormatError, match="of another model"):
            model.reconfigure(plan)


def test_a_predictor_of_other_weights_or_another_tokenizer_is_refused(own_copy, tmp_path):
    sizes = {"vocab_size": 4096, "layers": 8, "experts": 32, "top_k": 4}
    identity = ModelIdentity(own_copy)
    file = tmp_path / "p.safetensors"
    hashes = {"model_id": identity.model_id, "tokenizer_hash": identity.tokenizer_hash}
    random_predictor(file, **sizes, **hashes)
    PathPredictor.open(file, own_copy)
    train(own_copy)
    another_tokenizer(own_copy)
    with pytest.raises(FormatError, match=r"its model_id is .*; tokenizer_hash is .* train"):
        PathPredictor.open(file, own_copy)
    with (
        Model.load(own_copy, device="cpu") as model,
        pytest.raises(FormatError, match="of another model"),
    ):
        model.batch(2, predictor=file)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (train, "weights"),
        (another_tokenizer, "tokenizer"),
        (lambda copy: change_json(copy / "config.json", rope_theta=5000.0), "config"),
    ],
    ids=["weights", "tokenizer", "config"],
)
def test_a_recording_is_not_resumed_with_another_model(own_copy, tmp_path, change, part):
    path = tmp_path / "t.safetensors"
    size = {"length": 8, "samples": 1}

    def go_on(resume):
        with Model.load(own_copy, device="cpu", threads=1) as model:
            return record(NativeEngine(model, "tiny"), TEXTS, path, resume=resume, **size)

    go_on(False)
    assert go_on(True).num_new_sequences == 0
    change(own_copy)
    with pytest.raises(InvalidArgumentError, match=f"cannot be resumed.* with {part} = "):
        go_on(True)


def test_a_batch_is_not_resumed_with_another_model(own_copy, tmp_path, run_cli):
    prompts = tmp_path / "b.jsonl"
    prompts.write_text('"import os"\n"def f("\n')
    out = tmp_path / "r.jsonl"
    partial = tmp_path / "r.jsonl.partial"
    arguments = ("--batch", str(prompts), "-m", str(own_copy), "-n", "2", "-o", str(out), "-q")
    done = run_cli(*arguments, "--seed", "1")
    assert done.returncode == 0, done.stderr
    for change, part in ((another_tokenizer, "tokenizer"), (train, "weights")):
        identity = ModelIdentity(own_copy)
        header = {"format": "moerun-batch", "version": 2, "seed": 1}
        run = {"prompts": "?", **identity.all_parts, "options of generation": "?"}
        partial.write_text(json.dumps({**header, "run": run}) + "\n")
        assert part not in run_cli(*arguments, "--seed", "1", "--resume").stderr.split(";")[0]
        change(own_copy)
        assert_failed(run_cli(*arguments, "--seed", "1", "--resume"), "of another run", part)


def test_a_record_file_of_weights_that_were_there_before_is_written_anew(own_copy, cache):
    def text(**options):
        with Model.load(own_copy, device="cpu", **options) as model:
            list(model.generate([1, 2, 3], max_new_tokens=8, temperature=0.0))
            return model.stats()["logits_hash"], model.stats()["load"]["notes"]

    packed = {"expert_budget": "30%", "pack": True}
    before, notes = text(**packed)
    assert not notes
    (old,) = (cache / "packs").iterdir()
    train(own_copy)
    with pytest.warns(moerun.errors.MoerunWarning, match=f"removed .*{old.name}.* before"):
        after, notes = text(**packed)
    assert after == text()[0] != before
    (new,) = (cache / "packs").iterdir()
    assert new != old
    size = new.stat().st_size
    assert moerun.packs.remove_record_files(own_copy) == {new: size}
    assert not list((cache / "packs").iterdir())


def test_costs_are_of_the_sizes_of_a_model_and_not_of_its_weights(own_copy):
    store_costs(replace(COSTS, machine=machine_name(), sizes_id=ModelIdentity(own_copy).sizes_id))
    train(own_copy)
    assert stored_costs(own_copy, "cpu") is not None
    config = own_copy / "config.json"
    original = config.read_bytes()
    change_json(config, num_experts_per_tok=3)
    assert stored_costs(own_copy, "cpu") is None
    config.write_bytes(original)
    change_json(config, num_hidden_layers=7)
    assert stored_costs(own_copy, "cpu") is None


def test_models_that_only_transformers_reads_have_an_identity_too(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "switch_transformers"}')
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(200_000))
    first = parts_of_recording(tmp_path)
    assert sorted(first) == ["config", "tokenizer", "weights"]
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(100_000) + b"x" + bytes(99_999))
    assert parts_of_recording(tmp_path)["weights"] != first["weights"]
    assert parts_of_recording(tmp_path, with_weights=False).keys() == {"config", "tokenizer"}
    assert parts_of_recording(tmp_path / "config.json") == {"config": first["config"]}
    assert parts_of_recording(None) == {}


def test_files_that_people_pass_on_name_no_folder_and_no_user(own_copy, tmp_path, cache, run_cli):
    env = offline_environment(MOERUN_CACHE=str(cache / "packs"), XDG_CACHE_HOME=str(cache))
    prompts = tmp_path / "b.jsonl"
    prompts.write_text('"import os"\n')
    out = tmp_path / "r.jsonl"
    plan = tmp_path / "plan.json"
    named = ("-m", str(own_copy), "--expert-budget", "30%", "--device", "cpu", "-n", "4")
    done = run_cli(*named, "--pack", "--batch", str(prompts), "-o", str(out), "-q", env=env)
    assert done.returncode == 0, done.stderr
    done = run_cli(*named, "--save-plan", str(plan), "-q", "import os", env=env)
    assert done.returncode == 0, done.stderr
    run_cli(*named, "--plan", "auto", "-q", "import os", env=env)
    written = [out, plan, *(file for file in cache.rglob("*") if file.is_file())]
    assert len(written) >= 4
    for file in written:
        data = file.read_bytes()
        for secret in (str(tmp_path), str(Path.home()) + "/", f"/{getpass.getuser()}/"):
            assert secret.encode() not in data, (file, secret)


def test_a_model_of_a_folder_with_a_long_name_or_one_that_is_not_utf_8_is_packed(
    own_copy, tmp_path, cache, run_cli
):
    env = offline_environment(MOERUN_CACHE=str(cache / "packs"))
    options = ("--expert-budget", "30%", "--device", "cpu", "-n", "4", "--json", "import os")
    plain = as_json(run_cli("-m", str(own_copy), *options))["stats"]["logits_hash"]
    folder = own_copy.rename(tmp_path / ("a" * 255))
    packed = as_json(run_cli("-m", str(folder), "--pack", *options, env=env))
    assert packed["stats"]["logits_hash"] == plain
    folder = folder.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    with Model.load(folder, device="cpu", expert_budget="30%", pack=True) as model:
        list(model.generate([1, 2, 3], max_new_tokens=2, temperature=0))
        assert len(list((cache / "packs").iterdir())) == 1
        assert model.stats()["cache"]["state"] == "cached"
        model.save_plan(tmp_path / "p.json")
    moerun.dry_run(folder, plan=tmp_path / "p.json")
    assert moerun.remove_pack(folder) > 0


def test_an_identity_needs_no_library_of_tables():
    code = "import sys, moerun.identity; sys.exit('moerun.planning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
