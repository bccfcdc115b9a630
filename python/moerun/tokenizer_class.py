"""The tokenizer class that transformers takes for a model; it may replace parts of tokenizer.json.

Some classes of transformers 5 take vocabulary and merges of tokenizer.json, and make normalizer,
pre-tokenizer and decoder by rules of their own. The rules of the classes that models with experts
use are here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from moerun.errors import FormatError, UnsupportedModelError

PLAIN = "TokenizersBackend"  # the class that takes tokenizer.json as it is

_CLASS_OF_MODEL_TYPE = {
    "olmoe": "GPTNeoXTokenizer",
    "mixtral": PLAIN,
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "granitemoe": PLAIN,
    "phimoe": PLAIN,
}
# Transformers does not trust the tokenizer_class of these.
_WRONG_CLASS_IN_FILES = ("phimoe",)
_NOT_PORTED = (
    "AlbertTokenizer",
    "BertTokenizer",
    "CodeLlamaTokenizer",
    "CohereTokenizer",
    "DebertaV2Tokenizer",
    "GemmaTokenizer",
    "MBartTokenizer",
    "NllbTokenizer",
    "Qwen3_5Tokenizer",
    "RobertaTokenizer",
    "T5Tokenizer",
    "WhisperTokenizer",
    "XGLMTokenizer",
    "XLMRobertaTokenizer",
)

_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TokenizerClass:
    """Facts that a class of transformers adds to the files of a tokenizer.

    Attributes:
        name: of the class.
        special_tokens: by name, those that it has where the files name none; None: none, whatever
            the padding of tokenizer.json says.
        build: makes a tokenizer of vocabulary, merges and tokenizer_config.json; None: the class
            takes tokenizer.json as it is.
        has_post_processor: keeps the post-processor of tokenizer.json.
        adds_again: adds its special tokens once more after all others, with plain flags.
    """

    name: str
    special_tokens: dict[str, str | None]
    build: Callable[[Any, Any, dict[str, Any]], tokenizers.Tokenizer] | None = None
    has_post_processor: bool = True
    adds_again: bool = False


def _prefix_space(config: dict[str, Any], default: bool, none: bool) -> bool:
    value = config.get("add_prefix_space", default)
    return none if value is None else bool(value)


def _byte_level(vocab: Any, merges: Any, add_prefix_space: bool) -> tokenizers.Tokenizer:
    model = models.BPE(
        vocab=vocab,
        merges=merges,
        dropout=None,
        continuing_subword_prefix="",
        end_of_word_suffix="",
        fuse_unk=False,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2(vocab: Any, merges: Any, config: dict[str, Any]) -> tokenizers.Tokenizer:
    return _byte_level(vocab, merges, _prefix_space(config, False, False))


def _gpt_neox(vocab: Any, merges: Any, config: dict[str, Any]) -> tokenizers.Tokenizer:
    tokenizer = _gpt2(vocab, merges, config)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _qwen2(vocab: Any, merges: Any, config: dict[str, Any]) -> tokenizers.Tokenizer:
    tokenizer = _byte_level(vocab, merges, False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_QWEN2_PATTERN), "isolated", invert=False),
            pre_tokenizers.ByteLevel(
                add_prefix_space=_prefix_space(config, False, False), use_regex=False
            ),
        ]
    )
    return tokenizer


def _llama(vocab: Any, merges: Any, config: dict[str, Any]) -> tokenizers.Tokenizer:
    add_prefix_space = _prefix_space(config, True, True)
    scheme = "never"
    if add_prefix_space:
        is_legacy = config.get("legacy", False)
        scheme = "always" if is_legacy else "first"
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, dropout=None)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_prefix_space:
        steps.append(decoders.Strip(" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


_END = "<|endoftext|>"
_CLASSES = {
    each.name: each
    for each in (
        TokenizerClass(PLAIN, {}),
        TokenizerClass(
            "GPT2Tokenizer",
            {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": None},
            _gpt2,
        ),
        TokenizerClass(
            "GPTNeoXTokenizer",
            {"unk_token": _END, "bos_token": _END, "eos_token": _END, "pad_token": "<|padding|>"},
            _gpt_neox,
            has_post_processor=False,
        ),
        TokenizerClass(
            "Qwen2Tokenizer",
            {"unk_token": _END, "bos_token": None, "eos_token": _END, "pad_token": _END},
            _qwen2,
            adds_again=True,
        ),
        TokenizerClass(
            "LlamaTokenizer",
            {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
            _llama,
        ),
    )
}


def choose_class(
    model_config: dict[str, Any], tokenizer_config: dict[str, Any], is_byte_level: bool, where: str
) -> TokenizerClass:
    """Return the class that transformers takes.

    Args:
        model_config: config.json; empty: there is none.
        tokenizer_config: tokenizer_config.json; empty: there is none.
        is_byte_level: tokenizer.json has a component of the type ByteLevel.
        where: the file tokenizer_config.json, for messages.

    Raises:
        UnsupportedModelError: it is one whose rules are not known here.
        FormatError: a class is no text.
    """
    model_type = model_config.get("model_type")
    registered = _CLASS_OF_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    own, of_model = (
        _base_name(config.get("tokenizer_class"), where)
        for config in (tokenizer_config, model_config)
    )
    named = own or of_model
    has_code = _names_code(tokenizer_config.get("auto_map"))
    name = named or registered or PLAIN
    if has_code:
        name = own or of_model or registered or PLAIN
    elif named == "LlamaTokenizer" and is_byte_level and model_type not in _WRONG_CLASS_IN_FILES:
        name = PLAIN
    elif named is not None and registered is not None and registered != named:
        # The files' class counts only where the model type has a class with rules of its own.
        name = PLAIN if registered == PLAIN else named
    if name in _NOT_PORTED:
        raise UnsupportedModelError(
            f"{where} asks for the tokenizer_class {name}, which reads tokenizer.json by rules "
            f"that moerun does not know; {PLAIN} takes tokenizer.json as it is"
        )
    return _CLASSES.get(name, _CLASSES[PLAIN])


def _base_name(name: Any, where: str) -> str | None:
    if name is None or name == "":
        return None
    if not isinstance(name, str):
        raise FormatError(f"{where}: tokenizer_class must be a text, not {type(name).__name__}")
    return name.removesuffix("Fast")


def _names_code(auto_map: Any) -> bool:
    if isinstance(auto_map, dict):
        return auto_map.get("AutoTokenizer") is not None
    return isinstance(auto_map, list)


def rebuilt(
    kind: TokenizerClass, state: dict[str, Any], config: dict[str, Any], where: str
) -> tokenizers.Tokenizer:
    """Return the tokenizer that a class makes of vocabulary and merges of tokenizer.json.

    Args:
        kind: a class with `build`.
        state: tokenizer.json.
        config: tokenizer_config.json.
        where: the file tokenizer.json, for messages.

    Raises:
        FormatError: tokenizer.json is not of the kind that the class takes.
    """
    assert kind.build is not None
    model = state.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise FormatError(f"{where} has no vocabulary of the kind that {kind.name} takes (BPE)")
    merges = model.get("merges", [])
    if not isinstance(merges, list):
        raise FormatError(f"{where}: `merges` must be a list, not {type(merges).__name__}")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in merges]
    if not all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(_is_text, pair))
        for pair in pairs
    ):
        raise FormatError(f"{where}: `merges` has an entry that is no pair of texts")
    tokenizer = kind.build(model["vocab"], [tuple(pair) for pair in pairs], config)
    if kind.has_post_processor and state.get("post_processor") is not None:
        shell = {
            **state,
            "model": {"type": "BPE", "vocab": {}, "merges": []},
            "added_tokens": [],
            "truncation": None,
            "padding": None,
        }
        tokenizer.post_processor = tokenizers.Tokenizer.from_str(json.dumps(shell)).post_processor
    elif not kind.has_post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
    return tokenizer


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
