"""Mutations of files, from a random generator with a seed: the same seed, the same mutants."""

import json
import os
import random
import time
from collections.abc import Iterator
from typing import Any

# Values that readers of files have failed on.
_NUMBERS = [0, -1, 1, 2, 127, 2**31, 2**32, 2**63, 10**30, -(10**18), 0.5, -0.0, 1e308, 1e-320]
_TEXTS = [
    "",
    " ",
    "\x00",
    "\ud800",
    "é",
    "🙃",
    "a" * 300,
    "{{",
    "%}",
    "../x",
    "true",
    "(a+)+$",
    "▁",
]
_OTHERS = [None, True, False, [], {}, [[]], float("nan"), float("inf")]
_MOST_LEVELS = 30
_TAGS = [
    "{{", "}}", "{%", "%}", "{#", "#}", "{% if x %}", "{% endif %}", "{% for m in messages %}",
    "{% endfor %}", "{% set x = [x, x] %}", "{% macro f(a) %}", "{% endmacro %}", "{{ f(f) }}",
    "{{ messages }}", "{{ 'a' * 10**9 }}", "|tojson", "|join", "|list", "|length", ".append(1)",
    "{% break %}", "{% continue %}", "{% generation %}", "{% endgeneration %}", "(", ")", "[", "]",
    "range(99999)", " is defined", " not ", " ~ ", "9" * 30, "loop.index", "namespace(a=1)", "-%}",
]  # fmt: skip


def mutations(rng: random.Random, data: bytes) -> bytes:
    """Return `data` with a few bytes or runs of bytes changed, left out, doubled or moved."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        begin = rng.randrange(len(changed) + 1)
        end = min(len(changed), begin + rng.choice([1, 1, 2, 8, 64, 1000]))
        piece = bytes(changed[begin:end])
        kind = rng.randrange(6)
        if kind == 0:
            changed[begin:end] = bytes(rng.randrange(256) for _ in piece)
        elif kind == 1:
            del changed[begin:end]
        elif kind == 2:
            changed[begin:begin] = piece * rng.choice([1, 2, 50])
        elif kind == 3 and piece:
            changed[begin] ^= 1 << rng.randrange(8)
        elif kind == 4:
            there = rng.randrange(len(changed) + 1)
            changed[there:there] = piece
        elif rng.random() < 0.2:
            del changed[begin:]
    return bytes(changed)


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Return a JSON value with one to three of its parts changed, left out, doubled or moved."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = _changed(rng, value)
    return value


def _changed(rng: random.Random, value: Any) -> Any:
    outer, key = _place(rng, value)
    if outer is None:
        return random_value(rng)
    kind = rng.randrange(6)
    if kind == 0:
        del outer[key]
    elif kind == 1 and isinstance(outer, list):
        outer.insert(key, outer[key])
    elif kind == 1 and isinstance(outer, dict):
        outer[rng.choice(_TEXTS)] = outer[key]
    elif kind == 2:
        other, other_key = _place(rng, value)
        outer[key] = json.loads(json.dumps(other[other_key]))
    elif kind == 3:
        outer[key] = _nudged(rng, outer[key])
    elif kind == 4:
        outer[key] = [outer[key]] if rng.random() < 0.5 else {"type": outer[key]}
    else:
        outer[key] = random_value(rng)
    return value


def _place(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """Return a container and a key in it, drawn by walking down; None where there is none."""
    found = None, None
    for _ in range(_MOST_LEVELS):
        if isinstance(value, dict) and value:
            found = value, rng.choice(list(value))
        elif isinstance(value, list) and value:
            found = value, rng.randrange(len(value))
        else:
            break
        value = found[0][found[1]]
        if rng.random() < 0.25:
            break
    return found


def _nudged(rng: random.Random, value: Any) -> Any:
    """Return a value of the same type that is a little different."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice([-1, 1, 2**31, -(2**31)])
    if isinstance(value, str):
        return mutations(rng, value.encode(errors="replace")).decode(errors="replace")
    return random_value(rng)


def random_value(rng: random.Random) -> Any:
    """Return a JSON value that readers of files have failed on."""
    return rng.choice([rng.choice(_NUMBERS), rng.choice(_TEXTS), rng.choice(_OTHERS)])


def mutate_template(rng: random.Random, source: str) -> str:
    """Return a template with tags and operators put in, left out, doubled or nested."""
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        begin = rng.randrange(len(source) + 1)
        end = min(len(source), begin + rng.choice([0, 1, 3, 10, 60]))
        kind = rng.randrange(5)
        if kind == 0:
            source = source[:begin] + rng.choice(_TAGS) + source[end:]
        elif kind == 1:
            source = source[:begin] + source[end:]
        elif kind == 2:
            source = source[:begin] + source[begin:end] * rng.choice([2, 3, 100]) + source[end:]
        elif kind == 3:
            there = rng.randrange(len(source) + 1)
            source = source[:there] + source[begin:end] + source[there:]
        else:
            begin_tag, end_tag = rng.choice(
                [("{% for a in messages %}", "{% endfor %}"), ("{{ (", ") }}"), ("{% if a %}", "")]
            )
            source = source[:begin] + begin_tag + source[begin:end] + end_tag + source[end:]
    return source


def seeds(target: str, count: int) -> Iterator[random.Random]:
    """Yield generators for the mutants of a target.

    Args:
        target: name that the seeds belong to.
        count: how many there are, unless MOERUN_MUTATION_SECONDS says for how long.
    """
    seconds = os.environ.get("MOERUN_MUTATION_SECONDS")
    end = None if seconds is None else time.monotonic() + float(seconds)
    number = 0
    while number < count if end is None else time.monotonic() < end:
        yield random.Random(f"{target} {number}")
        number += 1
