"""Import of the study's router dumps."""

import json
import signal

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from moerun import Trace, TraceWriter
from moerun.errors import FileError, FormatError, InvalidArgumentError, MissingFileError
from moerun.recording import import_study

SHAPES = {"wiki": (3, 5, 8), "code": (2, 4, 8)}


def logits_of(layer, name):
    seed = [layer, *map(ord, name)]
    return np.random.default_rng(seed).normal(size=SHAPES[name]).astype(np.float32)


def write_dumps(directory, model="olmoe", layers=(0, 1, 2)):
    for layer in layers:
        tensors = {name: logits_of(layer, name) for name in SHAPES}
        save_file(tensors, directory / f"{model}_{layer:02d}.safetensors")


def read(path):
    trace = Trace.open(path)
    (shard,) = trace.shards()
    return trace, shard


def test_domains_layers_and_experts_are_those_of_the_dumps(tmp_path):
    write_dumps(tmp_path, layers=(1, 3, 5))
    output = tmp_path / "t.safetensors"
    assert import_study([tmp_path], output, top_k=3) == [output]
    trace, shard = read(output)
    assert (trace.model, trace.num_experts, trace.top_k) == ("olmoe", 8, 3)
    assert trace.moe_layers == [1, 3, 5]
    assert trace.metadata["engine"] == "import"
    assert sorted(trace.domains) == ["code"] * 2 + ["wiki"] * 3
    assert "token_ids" not in trace.tensors
    for name, (sequences, tokens, _) in SHAPES.items():
        rows = [i for i, domain in enumerate(trace.domains) if domain == name]
        assert trace.lengths[rows].tolist() == [tokens] * sequences
        for index, layer in enumerate((1, 3, 5)):
            best = np.argsort(-logits_of(layer, name), axis=-1)[..., :3]
            assert np.array_equal(shard.expert_ids[rows, index, :tokens], best)


def test_equal_logits_go_to_the_lower_expert(tmp_path):
    logits = np.array([[[0, 2, 2, 1, 2, 0]]], np.float32)
    save_file({"d": logits}, tmp_path / "m_00.safetensors")
    import_study([tmp_path], tmp_path / "t.safetensors", top_k=4)
    assert read(tmp_path / "t.safetensors")[1].expert_ids.tolist() == [[[[1, 2, 4, 3]]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_number_formats_give_the_experts_of_their_values(tmp_path, dtype):
    logits = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_torch({"d": logits}, tmp_path / "m_00.safetensors")
    import_study([tmp_path], tmp_path / "t.safetensors", top_k=2, with_logits=True)
    _, shard = read(tmp_path / "t.safetensors")
    best = np.argsort(-logits.float().numpy(), axis=-1, kind="stable")[..., :2]
    assert np.array_equal(shard.expert_ids[:, 0], best)
    stored = shard.tensor("router_logits")[:, 0]
    np.testing.assert_allclose(stored, logits.float().numpy(), atol=2e-3)


def test_files_may_be_named_one_by_one_and_a_model_chosen(tmp_path):
    write_dumps(tmp_path)
    write_dumps(tmp_path, "mixtral", layers=(0,))
    files = sorted(tmp_path.glob("olmoe_*"))
    import_study(files, tmp_path / "a.safetensors", top_k=2)
    import_study([tmp_path], tmp_path / "b.safetensors", top_k=2, model="olmoe")
    with pytest.raises(InvalidArgumentError, match=r"several models.*mixtral, olmoe"):
        import_study([tmp_path], tmp_path / "c.safetensors", top_k=2)
    with pytest.raises(MissingFileError, match=r"no files other_00.*mixtral, olmoe"):
        import_study([tmp_path], tmp_path / "c.safetensors", top_k=2, model="other")
    assert (
        read(tmp_path / "a.safetensors")[0].domains == read(tmp_path / "b.safetensors")[0].domains
    )


def test_what_does_not_fit_together_is_named(tmp_path):
    output = tmp_path / "t.safetensors"
    write_dumps(tmp_path)
    with pytest.raises(InvalidArgumentError, match="at most the number of experts, 8, not 9"):
        import_study([tmp_path], output, top_k=9)
    third = tmp_path / "olmoe_02.safetensors"
    save_file({"wiki": logits_of(2, "wiki")}, third)
    with pytest.raises(FormatError, match=r"olmoe_02.*only one of them has 'code'"):
        import_study([tmp_path], output, top_k=2)
    save_file({"wiki": logits_of(2, "wiki")[:2], "code": logits_of(2, "code")}, third)
    with pytest.raises(FormatError, match=r"olmoe_02.*'wiki': expected the shape \[3, 5, 8\]"):
        import_study([tmp_path], output, top_k=2)
    save_file({"wiki": logits_of(2, "wiki")[0], "code": logits_of(2, "code")}, third)
    with pytest.raises(FormatError, match=r"'wiki': expected router logits .* \[5, 8\]"):
        import_study([tmp_path], output, top_k=2)
    assert not output.exists()


def test_a_logit_that_is_not_a_number_is_named_with_its_index(tmp_path):
    logits = logits_of(0, "wiki")
    logits[1, 2, 3] = np.nan
    save_file({"wiki": logits}, tmp_path / "m_00.safetensors")
    with pytest.raises(FormatError, match=r"m_00\.safetensors: tensor 'wiki'\[1, 2, 3\]"):
        import_study([tmp_path], tmp_path / "t.safetensors", top_k=2)


def test_a_damaged_file_is_an_error_at_every_length(tmp_path):
    write_dumps(tmp_path, layers=(0,))
    file = tmp_path / "olmoe_00.safetensors"
    data = file.read_bytes()
    for size in (*range(0, 200, 7), len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises((FormatError, FileError), match="olmoe_00"):
            import_study([file], tmp_path / "t.safetensors", top_k=2)
    file.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(FormatError, match="olmoe_00"):
        import_study([file], tmp_path / "t.safetensors", top_k=2)


def test_integers_and_no_tensors_are_not_router_dumps(tmp_path):
    save_file({"d": np.zeros((1, 1, 4), np.int32)}, tmp_path / "m_00.safetensors")
    with pytest.raises(FormatError, match=r"'d': expected router logits .* found I32"):
        import_study([tmp_path], tmp_path / "t.safetensors", top_k=1)
    header = json.dumps({"__metadata__": {"a": "b"}}).encode()
    (tmp_path / "m_00.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FormatError, match="holds no tensors"):
        import_study([tmp_path], tmp_path / "t.safetensors", top_k=1)


def test_after_an_error_nothing_is_there_but_what_was_there_before(tmp_path):
    write_dumps(tmp_path)
    output = tmp_path / "out" / "t.safetensors"
    output.parent.mkdir()

    def fail(done, total):
        raise RuntimeError

    options = {"top_k": 2, "shard_bytes": 1, "overwrite": True}
    with pytest.raises(RuntimeError):
        import_study([tmp_path], output, progress=fail, **options)
    assert list(output.parent.iterdir()) == []
    import_study([tmp_path], output, **{**options, "shard_bytes": 2**20})
    before = output.read_bytes()
    with pytest.raises(RuntimeError):
        import_study([tmp_path], output, progress=fail, **options)
    assert list(output.parent.iterdir()) == [output]
    assert output.read_bytes() == before


def test_ctrl_c_while_the_last_file_is_written_comes_too_late(tmp_path, monkeypatch):
    write_dumps(tmp_path)
    close = TraceWriter.close

    def interrupted_close(writer):
        signal.raise_signal(signal.SIGINT)
        return close(writer)

    monkeypatch.setattr(TraceWriter, "close", interrupted_close)
    output = tmp_path / "t.safetensors"
    assert import_study([tmp_path], output, top_k=2) == [output]
    assert Trace.open(output).num_sequences == 5


def test_layers_that_are_missing_between_others_are_told(tmp_path):
    write_dumps(tmp_path, layers=(1, 2, 5))
    told = []
    import_study([tmp_path], tmp_path / "t.safetensors", top_k=2, warn=told.append)
    assert len(told) == 1 and "no dumps of layers 3, 4" in told[0]
    write_dumps(tmp_path, layers=(3, 4))
    options = {"top_k": 2, "overwrite": True, "warn": told.append}
    import_study([tmp_path], tmp_path / "t.safetensors", **options)
    assert len(told) == 1


def test_without_dumps_the_expected_name_is_told(tmp_path):
    with pytest.raises(MissingFileError, match="MODEL_00"):
        import_study([tmp_path], tmp_path / "t.safetensors", top_k=1)
    with pytest.raises(MissingFileError, match="nowhere"):
        import_study([tmp_path / "nowhere"], tmp_path / "t.safetensors", top_k=1)
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(InvalidArgumentError, match="layer's number"):
        import_study([tmp_path / "x.safetensors"], tmp_path / "t.safetensors", top_k=1)
