"""Checks of a tokenizer.json before the library runs it: its costs, and what may panic."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from moerun.errors import FormatError

# Bytes that one byte of text may become. SentencePiece needs 3; NFKC tables of its kind about 20.
_MOST_GROWTH = 256
_GROWTH = {
    "BertNormalizer": 3,
    "ByteLevel": 2,
    "Lowercase": 2,
    "Metaspace": 3,
    "NFC": 3,
    "NFD": 3,
    "NFKC": 6,
    "NFKD": 6,
    "Nmt": 2,
}
_STEPS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
_STEADY = {
    "normalizer": {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace", "StripAccents"},
    "pre_tokenizer": {
        "ByteLevel",
        "Digits",
        "Metaspace",
        "Punctuation",
        "Split",
        "Whitespace",
        "WhitespaceSplit",
    },
    "post_processor": {"ByteLevel", "TemplateProcessing"},
    "decoder": {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"},
}


def check_costs(state: dict[str, Any], where: str) -> None:
    """Refuse a tokenizer.json that makes too much of a text, or another thing every time.

    Args:
        state: the object in tokenizer.json.
        where: the file, for messages.

    Raises:
        FormatError: it does.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1
        for step in steps_of(state, part):
            growth *= _growth(step)
            if growth > _MOST_GROWTH:
                raise FormatError(
                    f"{where}: the {part} makes more than {_MOST_GROWTH} bytes of one byte of text"
                )
    model = state.get("model")
    if isinstance(model, dict):
        _check_model(model, where)


def _check_model(model: dict[str, Any], where: str) -> None:
    dropout = model.get("dropout")
    if dropout:
        raise FormatError(
            f"{where}: model.dropout is {dropout!r:.40}, with which a text has other tokens every "
            "time; it is for training, null otherwise"
        )
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or prefix == "" or not isinstance(merges, list):
        return
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(part, str) for part in pair)
            or not pair[1].startswith(prefix)
        ):
            # The library cuts the prefix off without a look, and ends the process.
            raise FormatError(
                f"{where}: the second part of each merge must begin with the "
                f"continuing_subword_prefix {prefix!r:.40}, unlike {merge!r:.80}"
            )


def is_steady(state: dict[str, Any]) -> bool:
    """Tell whether a tokenizer.json has only parts that are known to end soon and not to panic."""
    for part, known in _STEADY.items():
        for step in steps_of(state, part):
            kind = step.get("type")
            if not isinstance(kind, str) or kind not in known:
                return False
            if kind in ("Replace", "Split") and not _is_steady_pattern(step.get("pattern")):
                return False
            if kind == "Strip" and step.get("stop", 0) != 0:
                return False
            if kind == "TemplateProcessing" and not _is_steady_template(step):
                return False
    return True


def steps_of(state: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """Return the steps of a part of tokenizer.json, those in sequences of sequences too."""
    found, waiting = [], [state.get(part)]
    while waiting:
        step = waiting.pop()
        if not isinstance(step, dict):
            continue  # null, or what the library refuses
        if step.get("type") == "Sequence":
            inner = step.get(_STEPS[part])
            waiting += reversed(inner) if isinstance(inner, list) else []
        else:
            found.append(step)
    return found


def _growth(step: dict[str, Any]) -> int:
    """Return the most bytes that a step makes of one byte."""
    kind, content = step.get("type"), step.get("content")
    if kind == "Replace" and isinstance(content, str):
        pattern = step.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        most = len(content.encode())
        if isinstance(replaced, str) and replaced:
            return max(1, -(-most // len(replaced.encode())))
        return most + 1  # an empty pattern or a regular expression is found before any character
    if kind == "Precompiled":
        try:
            table = base64.b64decode(step.get("precompiled_charsmap") or "")
        except (binascii.Error, TypeError, ValueError):
            return 1
        size = int.from_bytes(table[:4], "little")
        return max(map(len, table[4 + size :].split(b"\0"))) + 1
    return _GROWTH.get(kind, 1) if isinstance(kind, str) else 1


def _is_steady_template(step: dict[str, Any]) -> bool:
    pieces, tokens = step.get("single"), step.get("special_tokens")
    if not isinstance(pieces, list) or not isinstance(tokens, dict):
        return False
    for piece in pieces:
        if not isinstance(piece, dict):
            return False
        sequence, special = piece.get("Sequence"), piece.get("SpecialToken")
        if isinstance(sequence, dict) and sequence.get("id") == "A":
            continue
        name = special.get("id") if isinstance(special, dict) else None
        if not isinstance(name, str) or name not in tokens:
            return False
    return True


def _is_steady_pattern(pattern: Any) -> bool:
    if not isinstance(pattern, dict):
        return False
    if isinstance(text := pattern.get("String"), str):
        return text != ""
    regex = pattern.get("Regex")
    return isinstance(regex, str) and is_steady_regex(regex)


def is_steady_regex(regex: str) -> bool:
    r"""Tell whether a regular expression takes few steps at each place of a text.

    One that repeats a group which itself has a repetition or a choice, as `(a+)+` does, can take
    as many steps as there are ways to cut the text. So can many repetitions in a row.
    """
    repeats = [0]  # of each open group: repetitions without an upper limit so far
    branches = [False]
    closed = (0, False)  # of the group that the next character may repeat
    position = 0
    while position < len(regex):
        character = regex[position]
        is_group_end = False
        if character == "\\":
            if regex[position + 1 : position + 2] in "123456789kg":
                return False  # a backreference
            position += 1
        elif character == "[":
            position = _end_of_class(regex, position)
        elif character == "(":
            if regex[position + 1 : position + 3] == "?<" or len(repeats) > 20:
                return False  # a name, or a look behind
            repeats.append(0)
            branches.append(False)
            closed = (0, False)
            position += 1
            continue
        elif character == ")":
            if len(repeats) == 1:
                return False
            closed = (repeats.pop(), branches.pop())
            repeats[-1] += closed[0]
            is_group_end = True
        elif character == "|":
            branches[-1] = True
        elif character in "*+" or (character == "{" and _is_open_ended(regex, position)):
            if closed[0] or closed[1]:
                return False
            repeats[-1] += 1
        if not is_group_end and character not in "?{}0123456789,":
            closed = (0, False)
        position += 1
    return len(repeats) == 1 and sum(repeats) <= 40


def _end_of_class(regex: str, position: int) -> int:
    """Return the position of the bracket that ends a class of characters."""
    depth = 0
    while position < len(regex):
        if regex[position] == "\\":
            position += 1
        elif regex[position] == "[":
            depth += 1
        elif regex[position] == "]":
            depth -= 1
            if depth == 0:
                break
        position += 1
    return position


def _is_open_ended(regex: str, position: int) -> bool:
    end = regex.find("}", position)
    inner = regex[position + 1 : end]
    # Large counts are as bad as no limit.
    return "," in inner and (inner.endswith(",") or len(inner) > 6)
