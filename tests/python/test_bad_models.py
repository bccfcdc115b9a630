"""Models whose files are damaged or lie: each is refused with a message that names the place."""

import json
import os
import struct

import pytest
from conftest import change_json

from moerun import Model, errors


def assert_refused(directory, *expected):
    with pytest.raises((errors.FormatError, errors.UnsupportedModelError)) as caught:
        Model.load(directory)
    for text in expected:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "llama"}, ["model_type", "llama", "olmoe", "mixtral"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
        ({"hidden_size": 10**15}, ["hidden_size"]),
        ({"hidden_size": -192}, ["hidden_size"]),
        ({"hidden_size": "many"}, ["hidden_size"]),
        ({"num_experts": 2**62}, ["num_experts"]),
        ({"num_experts_per_tok": 33}, ["num_experts_per_tok", "33"]),
        ({"num_key_value_heads": 2}, ["num_key_value_heads"]),
        ({"num_hidden_layers": 9}, ["model.layers.8"]),
        ({"vocab_size": 4097}, ["model.embed_tokens.weight", "4097"]),
        ({"intermediate_size": 65}, ["model.layers.0.mlp.experts.0", "65"]),
        ({"rope_theta": None, "max_position_embeddings": 0}, ["max_position_embeddings"]),
    ],
)
def test_a_configuration_that_lies_is_an_error_that_names_the_field(model_copy, changes, expected):
    change_json(model_copy / "config.json", **changes)
    assert_refused(model_copy, str(model_copy), *expected)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model_type": 3}'])
def test_a_configuration_that_is_no_json_object_is_named(model_copy, content):
    (model_copy / "config.json").write_bytes(content)
    assert_refused(model_copy, str(model_copy / "config.json"))


NORM = "model.layers.3.input_layernorm.weight"
EMBED = "model.embed_tokens.weight"
LAST = "model.norm.weight"


def change_entry(**changes):
    return lambda header: header[NORM].update(changes)


def lengthen_the_last(header):
    entry = header[LAST]
    assert entry["data_offsets"][1] == max(
        other["data_offsets"][1] for other in header.values() if "data_offsets" in other
    )
    entry["shape"][0] += 1
    entry["data_offsets"][1] += 2


HEADERS = {
    "a_wrong_dtype": (change_entry(dtype="I16"), [NORM, "I16"]),
    "an_unknown_dtype": (change_entry(dtype="F13"), [NORM, "F13"]),
    "a_wrong_shape": (change_entry(shape=[2, 96]), [NORM, "192"]),
    "a_shape_of_other_bytes": (change_entry(shape=[191]), [NORM]),
    "a_shape_that_overflows": (change_entry(shape=[2**40, 2**40]), [NORM]),
    "offsets_far_away": (change_entry(data_offsets=[2**50, 2**50 + 384]), ["data_offsets"]),
    "a_tensor_longer_than_the_file": (lengthen_the_last, [LAST]),
    "offsets_that_overlap": (lambda h: h[NORM].update(data_offsets=h[EMBED]["data_offsets"]), []),
    "offsets_backwards": (lambda h: h[NORM]["data_offsets"].reverse(), [NORM]),
    "no_offsets": (lambda header: header[NORM].pop("data_offsets"), [NORM, "data_offsets"]),
    "a_number_as_an_entry": (lambda header: header.update({NORM: 3}), [NORM]),
}


def read_header(path):
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), length, os.path.getsize(path)


def write_header(directory, default_path, spoil):
    """Replace the weights by a file with a spoilt header and zeros, which take no room."""
    header, length, size = read_header(default_path / "model.safetensors")
    spoil(header)
    text = json.dumps(header).encode()
    path = directory / "model.safetensors"
    path.unlink()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size - 8 - length)


@pytest.mark.parametrize("change", HEADERS)
def test_a_header_that_lies_is_an_error_that_names_file_and_tensor(
    model_copy, default_path, change
):
    spoil, expected = HEADERS[change]
    write_header(model_copy, default_path, spoil)
    assert_refused(model_copy, str(model_copy / "model.safetensors"), *expected)


def test_a_missing_tensor_is_named(model_copy, default_path):
    write_header(model_copy, default_path, lambda h: h.update({f"{NORM}2": h.pop(NORM)}))
    assert_refused(model_copy, str(model_copy), f"'{NORM}'")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:4],
        lambda data: data[:1000],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: struct.pack("<Q", 2**63) + data[8:],
        lambda data: struct.pack("<Q", len(data)) + data[8:],
        lambda data: struct.pack("<Q", 0) + data[8:],
        lambda data: data[:8] + b"[" * 1000 + data[1008:],
    ],
    ids=[
        "empty",
        "4_bytes",
        "1000_bytes",
        "a_byte_short",
        "a_byte_long",
        "a_huge_header",
        "a_header_as_long_as_the_file",
        "no_header",
        "a_header_that_is_no_object",
    ],
)
def test_a_damaged_file_of_weights_is_named(model_copy, default_path, spoil):
    path = model_copy / "model.safetensors"
    path.unlink()
    path.write_bytes(spoil((default_path / "model.safetensors").read_bytes()))
    assert_refused(model_copy, str(path))
