"""Resuming: with the same model and cache only, and offered after an error."""

import json

import huggingface_hub
import numpy as np
import pytest
from test_recording import TEXTS, TwoStacks, record

from moerun import Model, Trace
from moerun.errors import FileError, InvalidArgumentError
from moerun.recording import NativeEngine, TraceOptions, check_output


def test_resuming_with_another_model_of_the_same_name_is_refused(tmp_path, model, model_copy):
    path = tmp_path / "t.safetensors"
    record(NativeEngine(model, "tiny"), TEXTS, path, length=16, samples=2)
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    with Model.load(model_copy, device="cpu", threads=1) as other:
        engine = NativeEngine(other, "tiny")
        with pytest.raises(InvalidArgumentError, match="cannot be resumed"):
            record(engine, TEXTS, path, length=16, samples=2, resume=True)
    assert Trace.open(path).num_sequences == 4


def test_transformers_settings_have_the_fingerprint_of_a_local_or_downloaded_model(
    tmp_path, monkeypatch, default_path
):
    from moerun.recording.transformers_loading import local_files

    assert local_files(str(default_path)) == default_path
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("1234")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert local_files("a/b") == snapshot
    assert local_files("a/c") is None


@pytest.mark.parametrize(
    "change", [{"expert_budget": "50%"}, {"policy": "lru"}, {"prefetch": True}, {"split": 0.5}]
)
def test_resuming_cache_events_with_another_cache_is_refused(tmp_path, default_path, change):
    path = tmp_path / "t.safetensors"
    options = {"expert_budget": "30%", "policy": "lcp", "prefetch": False, "cache_events": True}

    def go_on(resume, **others):
        with Model.load(default_path, device="cpu", threads=1, **{**options, **others}) as model:
            engine = NativeEngine(model, "tiny")
            size = {"length": 8, "samples": 1, "options": TraceOptions(generate=2)}
            return record(engine, TEXTS, path, resume=resume, **size)

    go_on(False)
    assert go_on(True).num_new_sequences == 0
    with pytest.raises(InvalidArgumentError, match="cannot be resumed"):
        go_on(True, **change)


def test_without_cache_events_the_cache_is_not_among_the_settings(model):
    assert "cache" not in NativeEngine(model, "tiny").settings


def test_an_error_in_the_middle_tells_what_was_written(tmp_path):
    told = []
    options = {"length": 8, "samples": 3, "on_failure": told.append}
    with pytest.raises(MemoryError):
        record(TwoStacks(fails_at=0), TEXTS, tmp_path / "t.safetensors", **options)
    assert told == []
    with pytest.raises(MemoryError):
        record(TwoStacks(fails_at=4), TEXTS, tmp_path / "t.safetensors", **options)
    (summary,) = told
    assert summary.num_sequences == 4
    names = ("encoder", "decoder")
    assert summary.files == {name: [tmp_path / f"t-{name}.safetensors"] for name in names}


def test_a_name_in_use_is_refused_early_and_resume_offered_only_where_there_is_one(tmp_path):
    path = tmp_path / "t.safetensors"
    folder = tmp_path / "t.safetensors.partial"
    folder.mkdir()
    check_output(path)  # an empty folder is no loss
    np.save(folder / "00001.safetensors", np.zeros(1))
    for there in (folder, path):
        if there == path:
            path.touch()
        with pytest.raises(FileError, match=f"{there.name} exists already: --resume goes on"):
            check_output(path)
        with pytest.raises(FileError, match=f"{there.name} exists already: --overwrite"):
            check_output(path, can_resume=False)
