"""Logits and text against transformers in float32 with the same weights."""

import json

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import moerun

NAMES = [case.name for case in reference.CASES]
CASE_OF = dict(zip(NAMES, reference.CASES, strict=True))

# Both sides hold the same weights and float32 activations, whatever the dtype of the weights.
MAX_ERROR = 1e-5
# vdpbf16ps: each activation is split in two bf16 terms.
MAX_ERROR_SPLIT = 3e-5

NUM_NEW_TOKENS = 200
PROMPTS = [
    "def main():\n    ",
    "import os\nimport sys\n\n\ndef read_file(path):\n",
    "class Node:\n    def __init__(self, value",
    "#include <stdio.h>\n\nint main(",
    "/* Return the number of bytes written, or -1 on error. */\n",
    "static inline int\n",
    "struct list_head {\n",
    "#define MAX_",
    "function onLoad(event) {\n  const ",
    "module.exports = {\n",
    "NAME\n       ls - list directory contents\n\nSYNOPSIS\n",
    ".TH GREP 1\n.SH NAME\ngrep \\- print lines that match patterns\n.SH SYNOPSIS\n",
    "DESCRIPTION\n       The command reads standard input and ",
    "SEE ALSO\n       ",
    "The following options are supported:\n\n",
    "Copyright (C) ",
    "Dieses Programm gibt ",
    "BEZEICHNUNG\n       cat - Dateien verketten und auf der Standardausgabe ausgeben\n",
    "NOM\n       chmod - Modifier les permissions d'accès à un fichier\n",
    "0",
]


@pytest.fixture(scope="session")
def reference_of(tmp_path_factory):
    """Makes the model of a case once a session, whoever asks first."""
    made = {}

    def get(name, dtype):
        if (name, dtype) not in made:
            directory = tmp_path_factory.mktemp(f"{name}-{dtype}") / "model"
            made[name, dtype] = reference.make_reference(CASE_OF[name], dtype, directory)
        return made[name, dtype]

    return get


def forward(directory, token_ids, **options):
    with moerun.Model.load(directory, device="cpu", **options) as model:
        return model.forward(token_ids)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(reference_of, name, dtype):
    expected = reference_of(name, dtype)
    logits = forward(expected.directory, expected.token_ids)
    assert reference.relative_error(logits, expected.logits) <= MAX_ERROR


@pytest.mark.parametrize("name", ["olmoe", "granitemoe_bias_llama3_tied"])
def test_logits_of_half_precision_weights_are_those_of_transformers(reference_of, name):
    expected = reference_of(name, "f16")
    logits = forward(expected.directory, expected.token_ids)
    assert reference.relative_error(logits, expected.logits) <= MAX_ERROR


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kernels", moerun.build_info()["cpu_kernels"]["supported"])
def test_every_kernel_set_gives_the_logits_of_transformers(reference_of, kernels, dtype):
    expected = reference_of("qwen2_moe", dtype)
    logits = forward(expected.directory, expected.token_ids, cpu_kernels=kernels)
    splits = kernels == "avx512_bf16" and dtype == "bf16"
    bound = MAX_ERROR_SPLIT if splits else MAX_ERROR
    assert reference.relative_error(logits, expected.logits) <= bound


def test_the_sharded_cases_have_several_files(reference_of):
    directory = reference_of("mixtral", "f32").directory
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert (directory / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "olmoe_linear",
        "mixtral_llama3_tied",
        "qwen3_moe_yarn_mscale",
        "phimoe_longrope",
    ],
)
def test_an_old_config_of_the_same_model_gives_the_same_logits(tmp_path, name):
    expected = reference.make_reference(CASE_OF[name], "f32", tmp_path / "model")
    new = forward(expected.directory, expected.token_ids)
    reference.to_old_config(expected.directory)
    old = forward(expected.directory, expected.token_ids)
    assert np.array_equal(old, new)


def test_logits_of_a_longer_phimoe_prompt_use_the_long_factors(tmp_path):
    """Transformers keeps the short factors there (it never passes the length on); we do not."""
    case = CASE_OF["phimoe_longrope"]
    expected = reference.make_reference(case, "f32", tmp_path / "model")
    rope = case.config["rope_parameters"]
    ids = (expected.token_ids * 2)[: rope["original_max_position_embeddings"] + 5]
    long_logits = forward(expected.directory, ids)

    # The same model with the long factors as its only ones.
    path = expected.directory / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["short_factor"] = rope["long_factor"]
    config["rope_parameters"]["short_mscale"] = rope["long_mscale"]
    config["rope_parameters"]["original_max_position_embeddings"] = 200
    config["original_max_position_embeddings"] = 200
    path.write_text(json.dumps(config))
    only_long = AutoModelForCausalLM.from_pretrained(
        expected.directory, attn_implementation="eager", dtype=torch.float32
    ).eval()
    theirs, _ = reference.run_transformers(only_long, ids)
    assert reference.relative_error(long_logits, theirs) <= MAX_ERROR


@pytest.mark.parametrize("name", ["olmoe_clip_bias_tied", "mixtral_sliding_head_dim"])
def test_logits_are_bit_identical_for_threads_and_prefill_chunks(reference_of, name):
    expected = reference_of(name, "bf16")
    models = {}

    @hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        threads=st.integers(1, 4),
        prefill_chunk=st.sampled_from([1, 2, 3, 5, 8, 16, 31, 32, 64, 512]),
        num_tokens=st.integers(1, CASE_OF[name].num_tokens),
    )
    def holds(threads, prefill_chunk, num_tokens):
        if (threads, prefill_chunk) not in models:
            models[threads, prefill_chunk] = moerun.Model.load(
                expected.directory, device="cpu", threads=threads, prefill_chunk=prefill_chunk
            )
        logits = models[threads, prefill_chunk].forward(expected.token_ids[:num_tokens])
        assert np.array_equal(logits, whole[:num_tokens])

    try:
        whole = forward(expected.directory, expected.token_ids, threads=1)
        holds()
    finally:
        for model in models.values():
            model.close()


@pytest.fixture(scope="module")
def greedy_reference(default_path, tokenizer):
    """The prompts' ids, and transformers' greedy continuations of all of them in one batch."""
    model = AutoModelForCausalLM.from_pretrained(
        default_path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    width = max(map(len, prompts))
    pad = model.config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
            use_cache=True,
        )
    eos = model.config.eos_token_id
    texts = []
    for row in out[:, width:].tolist():
        texts.append(row[: row.index(eos) + 1] if eos in row else row)
    return list(zip(prompts, texts, strict=True)), model


@pytest.mark.parametrize("idx", range(len(PROMPTS)))
def test_greedy_text_of_the_shipped_model_is_that_of_transformers(model, greedy_reference, idx):
    pairs, peer = greedy_reference
    prompt, expected = pairs[idx]
    ours = list(model.generate(prompt, max_new_tokens=NUM_NEW_TOKENS, temperature=0.0))
    if ours != expected:
        at = next(i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b)
        with torch.no_grad():
            logits = peer(torch.tensor([prompt + expected[:at]])).logits[0, -1]
        gap = float(logits[expected[at]] - logits[ours[at]])
        pytest.fail(f"token {at}: {ours[at]} for {expected[at]}, {gap:.1e} below it in logits")
    assert len(ours) == NUM_NEW_TOKENS or ours[-1] == peer.config.eos_token_id
