"""Damaged traces, dumps and journals: a typed error or arrays that fit, whatever was changed.

MOERUN_MUTATION_SECONDS says how long all tests of this file may take together.
"""

import json
import os
import random
import time

import numpy as np
import pytest
from safetensors.numpy import save_file
from traces import random_sequence

from moerun import Trace, TraceWriter
from moerun.errors import MoerunError
from moerun.recording import import_study

SECONDS = float(os.environ.get("MOERUN_MUTATION_SECONDS", "4")) / 4
NUMBERS = [0, 1, -1, 2, 255, 256, 65535, 65536, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1.5]
VALUES = [*NUMBERS, None, True, "", "\ud800", "9" * 5000, [], {}, [[]], {"a": 1}, float("nan")]


def mutated_bytes(rng, data):
    """Flip, cut, repeat, remove or overwrite a few bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 4:
            data[at : at + 8] = rng.choice(NUMBERS[:12]).to_bytes(16, "little", signed=True)[:8]
        else:
            data[at:at] = data[at : at + rng.randrange(1, 200)]
    return bytes(data)


def mutated_json(rng, value):
    """Change one value somewhere in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = dict(value)
        kind = rng.randrange(8)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[rng.choice(["", "x", "expert_ids", "__metadata__", "\ud800"])] = value[key]
        else:
            changed[key] = mutated_json(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return [*value[:index], mutated_json(rng, value[index]), *value[index + 1 :]]
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(["", "0", "9", "[", "\0", "é"]) + value[at + 1 :]
    return rng.choice(VALUES)


def mutated(rng, data):
    """Change a safetensors file: its bytes, or one value of its header."""
    if rng.random() < 0.4:
        return mutated_bytes(rng, data)
    size = int.from_bytes(data[:8], "little")
    header = mutated_json(rng, json.loads(data[8 : 8 + size]))
    text = json.dumps(header).encode(errors="surrogatepass")
    length = len(text) if rng.random() < 0.9 else rng.choice([0, 2**20, 2**40, 2**64 - 1])
    return length.to_bytes(8, "little") + text + data[8 + size :]


def rounds():
    """Yield generators of random numbers, always the same, while there is time."""
    end = time.monotonic() + SECONDS
    seed = 0
    while time.monotonic() < end or seed < 20:
        yield random.Random(seed)
        seed += 1


def write_shards(path):
    generator = np.random.default_rng(0)
    with TraceWriter(
        path,
        model="m",
        num_experts=8,
        top_k=2,
        moe_layers=[0, 2],
        shard_bytes=100,
        metadata={"recording": '{"samples": 3}'},
    ) as writer:
        for tokens in (9, 14, 11):
            writer.append(random_sequence(generator, 2, tokens, 8, 2), "dömain")
    return sorted(path.parent.iterdir())


def read_all(path):
    """Read a trace as its readers do; what comes out must fit together."""
    trace = Trace.open(path)
    assert len(trace.domains) == trace.num_sequences == len(trace.lengths)
    assert trace.num_tokens > 0
    repr(trace), trace.expert_bytes
    for shard in trace.shards():
        ids = shard.expert_ids
        layers, longest = len(trace.moe_layers), int(shard.lengths.max())
        assert ids.shape[:2] == (len(shard.lengths), layers)
        assert ids.shape[2] >= longest
        assert ids.shape[3] == trace.top_k
        for name in trace.tensors:
            shard.tensor(name)


def test_a_mutated_trace_is_an_error_or_fits_together(tmp_path):
    files = write_shards(tmp_path / "t.safetensors")
    assert len(files) == 3
    data = [file.read_bytes() for file in files]
    num_errors = num_rounds = 0
    for rng in rounds():
        index = rng.randrange(len(files))
        files[index].write_bytes(mutated(rng, data[index]))
        num_rounds += 1
        try:
            read_all(tmp_path / "t.safetensors")
        except MoerunError as error:
            num_errors += 1
            assert "t-0000" in str(error)
        files[index].write_bytes(data[index])
    assert num_errors > num_rounds / 2


def test_a_trace_that_changes_after_it_was_opened_is_an_error_or_fits(tmp_path):
    file = write_shards(tmp_path / "t.safetensors")[0]
    data = file.read_bytes()
    for rng in rounds():
        file.write_bytes(data)
        shard = next(Trace.open(tmp_path / "t.safetensors").shards())
        shape = shard.tensor("expert_ids").shape
        if rng.random() < 0.5:
            os.truncate(file, rng.randrange(len(data)))
        else:
            file.write_bytes(mutated(rng, data))
        try:
            assert shard.tensor("expert_ids").shape == shape
            shard.expert_ids  # noqa: B018
        except MoerunError as error:
            assert file.name in str(error)


def test_mutated_dumps_are_an_error_or_become_a_trace(tmp_path):
    generator = np.random.default_rng(0)
    files = [tmp_path / f"m_0{layer}.safetensors" for layer in range(2)]
    for file in files:
        save_file({"a": generator.normal(size=(2, 5, 4)).astype(np.float32)}, file)
    data = [file.read_bytes() for file in files]
    output = tmp_path / "o" / "t.safetensors"
    for rng in rounds():
        index = rng.randrange(2)
        files[index].write_bytes(mutated(rng, data[index]))
        try:
            import_study(files, output, top_k=2, overwrite=True)
            read_all(output)
        except MoerunError:
            pass
        files[index].write_bytes(data[index])


def test_a_mutated_unfinished_recording_is_an_error_or_goes_on(tmp_path):
    path = tmp_path / "t.safetensors"
    options = {"model": "m", "num_experts": 8, "top_k": 2, "moe_layers": [0, 2]}
    options |= {"shard_bytes": 200, "journal_seconds": 0}
    generator = np.random.default_rng(0)
    sequences = [random_sequence(generator, 2, tokens, 8, 2) for tokens in (9, 14, 5, 4)]
    pid = os.fork()
    if pid == 0:  # a process that ends without closing
        writer = TraceWriter(path, **options)
        for sequence in sequences:
            writer.append(sequence, "a")
        os._exit(0)
    os.waitpid(pid, 0)
    folder = tmp_path / "t.safetensors.partial"
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert kept.keys() >= {"00001.safetensors", "journal"}
    for rng in rounds():
        folder.mkdir(exist_ok=True)
        for name, data in kept.items():
            (folder / name).write_bytes(data)
        name = rng.choice(sorted(kept))
        change = mutated if name.endswith(".safetensors") else mutated_bytes
        (folder / name).write_bytes(change(rng, kept[name]))
        try:
            with TraceWriter(path, **options, resume=True) as writer:
                writer.append(sequences[0], "a")
            read_all(path)
        except MoerunError:
            pass
        for file in [*folder.glob("*"), *tmp_path.glob("t*.safetensors")]:
            file.unlink()


def test_every_truncation_of_a_trace_is_an_error(tmp_path):
    path = tmp_path / "t.safetensors"
    generator = np.random.default_rng(0)
    with TraceWriter(path, model="m", num_experts=8, top_k=2, moe_layers=[0]) as writer:
        writer.append(random_sequence(generator, 1, 5, 8, 2), "a")
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(MoerunError, match=r"t\.safetensors"):
            read_all(path)
