"""The C interface through ctypes, against the pybind11 module."""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

import moerun
from moerun import capi, errors

PROMPT = [5, 17, 300, 42, 7]


@pytest.fixture(scope="module")
def c_model():
    with capi.Model(moerun.default_model(), threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def model():
    with moerun.Model.load(threads=2) as loaded:
        yield loaded


def test_the_c_library_has_the_version_of_the_package():
    assert capi.version() == moerun.__version__


def test_both_bindings_give_the_same_logits(c_model, model):
    assert np.array_equal(c_model.forward(PROMPT), model.forward(PROMPT))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_both_bindings_give_the_same_tokens(c_model, model, temperature):
    options = {"max_new_tokens": 40, "temperature": temperature, "top_k": 50, "seed": 11}
    options |= {"top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.05}
    assert list(c_model.generate(PROMPT, **options)) == list(model.generate(PROMPT, **options))


def test_a_generation_outlives_its_model():
    model = capi.Model(moerun.default_model())
    tokens = model.generate(PROMPT, max_new_tokens=5, stop_token_ids=[], temperature=0)
    model.close()
    assert len(list(tokens)) == 5


def test_stats_are_counted(c_model):
    list(c_model.generate(PROMPT, max_new_tokens=3, stop_token_ids=[]))
    stats = c_model.stats()
    assert stats["prompt_tokens"] == len(PROMPT)
    assert stats["generated_tokens"] == 3


def test_errors_carry_the_text_of_the_library(c_model, tmp_path):
    with pytest.raises(errors.FileError, match=str(tmp_path)):
        capi.Model(tmp_path)
    with pytest.raises(errors.InvalidArgumentError, match="at least one"):
        c_model.forward([])
    with pytest.raises(errors.InvalidArgumentError, match="4096"):
        c_model.generate([4096])
    with pytest.raises(errors.InvalidArgumentError, match="temperature"):
        c_model.generate(PROMPT, temperature=-1.0)


@pytest.mark.parametrize("length", [10**9, 2**61, 2**62, 2**64 - 1])
def test_a_wild_number_of_tokens_is_refused_before_a_token_is_read(c_model, length):
    """The prompt has one token: reading `length` of them would leave its memory."""
    library, ids = capi.library(), (ctypes.c_int32 * 1)(1)
    logits, generation = (ctypes.c_float * 1)(), ctypes.c_void_p()
    handle = c_model._handle
    assert library.moerun_forward(handle, ids, length, logits, 1) == -1
    assert f"the prompt has {length} tokens".encode() in library.moerun_last_error()
    assert library.moerun_generate(handle, ids, length, None, ctypes.byref(generation)) == -1
    assert f"the prompt has {length} tokens".encode() in library.moerun_last_error()
    assert not generation


def test_a_number_that_c_cannot_hold_is_refused_and_not_cut_off(c_model):
    for name, value in {"max_new_tokens": 2**64 + 1, "top_k": 2**63, "seed": -1}.items():
        with pytest.raises(errors.InvalidArgumentError, match=f"{name}.*{value}"):
            c_model.generate(PROMPT, **{name: value})
    with pytest.raises(errors.InvalidArgumentError, match="stop_token_ids"):
        c_model.generate(PROMPT, stop_token_ids=[2**32 + 5])
    with pytest.raises(errors.InvalidArgumentError, match="max_new_tokens"):
        c_model.generate(PROMPT, max_new_tokens=None)


@pytest.mark.parametrize("length", [4097, 2**62, 2**64 - 1])
def test_a_wild_number_of_stop_tokens_is_refused_before_one_is_read(c_model, length):
    library, ids = capi.library(), (ctypes.c_int32 * 1)(1)
    generation, sampling = ctypes.c_void_p(), capi._Sampling()
    library.moerun_sampling_default(ctypes.byref(sampling), ctypes.sizeof(sampling))
    sampling.stop_token_ids = ids
    sampling.num_stop_token_ids = length
    status = library.moerun_generate(
        c_model._handle, ids, 1, ctypes.byref(sampling), ctypes.byref(generation)
    )
    assert status == -1
    assert b"num_stop_token_ids: expected at most 4096" in library.moerun_last_error()


@pytest.mark.parametrize("size", [0, 7, 12, 15, 49, 2**63])
def test_a_size_that_cuts_a_field_of_a_structure_is_refused(size):
    """Half of a pointer would be read as a whole one."""
    library, options = capi.library(), capi._Options()
    model = ctypes.c_void_p()
    options.struct_size = size
    options.device = b"cpu"
    path = str(moerun.default_model()).encode()
    assert library.moerun_open(path, ctypes.byref(options), ctypes.byref(model)) == -1
    assert b"options.struct_size: expected 48" in library.moerun_last_error()
    assert not model


def test_every_status_of_the_header_that_has_an_exception_raises_it():
    header = (Path(__file__).parents[2] / "cpp/capi/moerun.h").read_text()
    statuses = {name: int(code) for name, code in re.findall(r"MOERUN_(\w+) = (-\d+)", header)}
    assert statuses.pop("INTERNAL_ERROR") == -6
    assert {
        name.title().replace("_", "").removesuffix("Error") + "Error": code
        for name, code in statuses.items()
    } == {kind.__name__: code for code, kind in capi._EXCEPTIONS.items()}


def test_a_closed_model_is_refused():
    model = capi.Model(moerun.default_model())
    model.close()
    model.close()
    with pytest.raises(errors.InvalidArgumentError, match="model"):
        model.stats()
