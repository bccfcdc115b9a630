"""Folders with the files of a tokenizer, drawn at random: every file may state every fact."""

import json
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<x>"]
NAMES = ["bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token"]
OTHER_NAMES = ["eot_token", "image_token", "im_start_token"]
TEXTS = [
    "the cat",
    " the  cat<|im_start|>the cat <|im_end|> cat",
    "<s>the</s> the<unk><pad>\n<|endoftext|> <x> e\u0301 10",
]
MODEL_TYPES = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "phimoe"]
CLASSES = [
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "GPTNeoXTokenizerFast",
    "GPT2Tokenizer",
    "MadeUpTokenizer",
]
MERGES = ["t h", "th e", "c a", "ca t"]


def byte_level(rng, tokens):
    """A byte-level tokenizer as Qwen and OLMoE have it, with a vocabulary of few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*tokens, *alphabet, "th", "the", "ca", "cat", "Ġthe", "Ġcat"]
    merges = [*MERGES, "Ġ the", "Ġ cat"]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    own = Tokenizer(models.BPE(vocab, [tuple(merge.split()) for merge in merges]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=rng.random() < 0.2)
    own.decoder = decoders.ByteLevel()
    if rng.random() < 0.5:
        own.normalizer = normalizers.NFC()
    return own


def sentencepiece(rng, tokens):
    """A tokenizer as Mixtral has it: U+2581 for spaces, bytes as <0xXX>."""
    letters = [*"thecat<>/sunkpadimo_|r", "▁", "\n"]
    words = [*tokens, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "th", "the", "ca"]
    words += ["cat", "▁the", "▁cat"]
    merges = [*MERGES, "▁ the", "▁ cat"]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    unknown = "<unk>" if "<unk>" in vocab else None
    pairs = [tuple(merge.split()) for merge in merges]
    own = Tokenizer(models.BPE(vocab, pairs, byte_fallback=True, unk_token=unknown, fuse_unk=True))
    if rng.random() < 0.5:
        own.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        own.pre_tokenizer = pre_tokenizers.Metaspace("▁", rng.choice(["first", "always"]), False)
    own.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return own


def token(rng, text, typed=True):
    """A token as files write it: its text, or an object with flags."""
    if rng.random() < 0.6:
        return text
    flags = {name: rng.random() < 0.3 for name in ("lstrip", "rstrip", "single_word", "normalized")}
    return {**({"__type": "AddedToken"} if typed else {}), "content": text, **flags}


def some(rng, items, share):
    """A random choice of items, in their order."""
    return [item for item in items if rng.random() < share]


def added(rng, texts, first):
    """`added_tokens_decoder`: ids from `first` on."""
    return {
        str(first + number): {
            "content": text,
            **{name: rng.random() < 0.2 for name in ("lstrip", "rstrip", "single_word")},
            "normalized": rng.random() < 0.3,
            "special": rng.random() < 0.7,
        }
        for number, text in enumerate(texts)
    }


def write_folder(rng, folder):
    """Write the files of a random tokenizer into an empty folder."""
    in_vocabulary = some(rng, SPECIAL, 0.4)
    own = rng.choice([byte_level, sentencepiece])(rng, in_vocabulary)
    known = some(rng, in_vocabulary, 0.7)
    own.add_special_tokens(known)
    if rng.random() < 0.4:
        own.add_tokens(some(rng, SPECIAL, 0.2))
    if known and rng.random() < 0.5:
        bos = rng.choice(known)
        own.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, own.token_to_id(bos))]
        )
    state = json.loads(own.to_str())
    if rng.random() < 0.3:
        state["truncation"] = {
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip
    if rng.random() < 0.3:
        state["padding"] = {
            "strategy": {"Fixed": 30}, "direction": "Left", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": rng.choice(SPECIAL),
        }  # fmt: skip
    write(folder / "tokenizer.json", state)
    size, there = own.get_vocab_size(), own.get_vocab()
    missing = [text for text in SPECIAL if text not in there]
    if rng.random() < 0.9:
        config = {"model_type": rng.choice(MODEL_TYPES)}
        if rng.random() < 0.1:
            config["tokenizer_class"] = rng.choice(CLASSES[:-1])
        write(folder / "config.json", config)
    if rng.random() < 0.9:
        write(folder / "tokenizer_config.json", tokenizer_config(rng, missing, size))
    if rng.random() < 0.3:
        tokens = {
            name: token(rng, rng.choice(SPECIAL), typed=False) for name in some(rng, NAMES, 0.3)
        }
        if rng.random() < 0.4:
            tokens["additional_special_tokens"] = some(rng, SPECIAL, 0.3)
        if rng.random() < 0.2:
            tokens["eot_token"] = rng.choice(SPECIAL)
        write(folder / "special_tokens_map.json", tokens)
    if rng.random() < 0.3:
        shift = 3 if rng.random() < 0.1 else 0
        numbers = {
            text: size + shift + number for number, text in enumerate(some(rng, missing, 0.6))
        }
        write(folder / "added_tokens.json", numbers)


def tokenizer_config(rng, missing, size):
    """A tokenizer_config.json for a vocabulary of `size` tokens that lacks the texts `missing`."""
    config = {}
    if rng.random() < 0.7:
        config["tokenizer_class"] = rng.choice(CLASSES)
    for name in some(rng, NAMES, 0.35):
        config[name] = None if rng.random() < 0.15 else token(rng, rng.choice(SPECIAL))
    for name in some(rng, OTHER_NAMES, 0.15):
        config[name] = token(rng, rng.choice(SPECIAL))
    if rng.random() < 0.3:
        config["additional_special_tokens"] = some(rng, SPECIAL, 0.3)
    if rng.random() < 0.2:
        texts = some(rng, SPECIAL, 0.3)
        names = {f"name_{number}_token": text for number, text in enumerate(texts)}
        config["extra_special_tokens"] = rng.choice([texts, names])
    if rng.random() < 0.3:
        shift = 3 if rng.random() < 0.1 else 0
        config["added_tokens_decoder"] = added(rng, some(rng, missing, 0.7), size + shift)
    for name, values in {
        "add_prefix_space": [True, False],
        "legacy": [True, False],
        "split_special_tokens": [True, False],
        "add_bos_token": [True, False],
        "add_eos_token": [True, False],
        "clean_up_tokenization_spaces": [True, False],
    }.items():
        if rng.random() < 0.15:
            config[name] = rng.choice(values)
    return config


def write(path, value):
    """Write a file of JSON."""
    path.write_text(json.dumps(value), encoding="utf-8")


def random_folder(seed, folder):
    """Write the folder of a seed."""
    folder.mkdir()
    write_folder(random.Random(seed), folder)
    return folder
