"""Values and bytes from outside that a library below may not take; the same in every run."""

import contextlib
import json
import math
import os
import time

# Values of a JSON field. Python writes NaN and Infinity for such numbers.
VALUES = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, 10**18, -(10**18), 10**400, 0.5, -0.0,
    5e-324, 1e-300, 1e308, math.nan, math.inf, -math.inf, "", "x", "\ud800", "\x00", "ü" * 1000, [],
    [[]], ["x", 1], [None], {}, {"x": 1}, {"": {"y": []}}, [[["x"]]], "9" * 5000,
)  # fmt: skip

_PIECES = (
    b"", b"\x00", b"\n", b'"', b"{", b"}", b"[" * 900, b"\\ud800", b"\xff", b"NaN", b"Infinity",
    b"1e999", b"-1", b"18446744073709551616", b"9" * 400, b"null", b"true", b"5e-324", b",", b":",
    b" " * 5000,
)  # fmt: skip


def mutations(rng, data):
    """Return `data` after one to four changes: bits, cuts, repeats, pieces of other texts."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        begin = rng.randrange(len(changed) + 1)
        end = min(len(changed), begin + rng.choice((0, 1, 1, 4, 40)))
        kind = rng.randrange(5)
        if kind == 0 and changed:
            place = rng.randrange(len(changed))
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[begin:end]
        elif kind == 2:
            changed[begin:begin] = changed[begin:end]
        elif kind == 3:
            changed[begin:end] = rng.choice(_PIECES)
        else:
            del changed[begin:]
    return bytes(changed)


def mutate_json(rng, value):
    """Return a JSON value of which one entry, at any depth, is another one, gone or there twice."""
    copy = json.loads(json.dumps(value))
    spots = list(_spots(copy))
    if not spots:
        return rng.choice(VALUES)
    holder, key = rng.choice(spots)
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "\ud800", "version"))] = holder[key]
    elif kind == 1:
        holder.insert(key, holder[key])
    else:
        holder[key] = rng.choice(VALUES)
    return copy


def _spots(value):
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in list(entries):
        yield value, key
        if isinstance(entry, dict | list):
            yield from _spots(entry)


@contextlib.contextmanager
def seconds_of_mutations(seconds):
    """Give a function that is true until so much time has passed, and a few times in any case.

    The environment variable MOERUN_MUTATION_SECONDS gives every target that much.
    """
    end = time.monotonic() + float(os.environ.get("MOERUN_MUTATION_SECONDS") or seconds)
    count = 0

    def more():
        nonlocal count
        count += 1
        return count <= 20 or time.monotonic() < end

    yield more
