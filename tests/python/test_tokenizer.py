import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from moerun import Tokenizer, errors

TEXTS = [
    "",
    "plain text",
    "Größe, Übung, naïve café",
    "混合专家模型は速い、한국어",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 done 🙃",
    "a\u0301\u0327 \u200d \ufeff \U0010ffff",
    "\ufffd is a character, too \ufffd",
    "tabs\tand\nlines\r\n\x00\x7f",
]


def streamed(stream, token_ids):
    return [stream.push(token_id) for token_id in token_ids] + [stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_encoded_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text())
def test_streamed_text_is_the_whole_text_and_never_half_a_character(tokenizer, text):
    pieces = streamed(tokenizer.stream(), tokenizer.encode(text))
    assert "".join(pieces) == text
    assert all(piece in text for piece in pieces)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(data=st.data(), skip=st.booleans())
def test_streamed_random_tokens_give_what_decode_gives(tokenizer, data, skip):
    token_id = st.integers(0, tokenizer.vocab_size + 9) | st.integers(0, 260)
    token_ids = data.draw(st.lists(token_id, max_size=60))
    pieces = streamed(tokenizer.stream(skip_special_tokens=skip), token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=skip)


def test_a_character_of_several_tokens_comes_out_whole(tokenizer):
    token_ids = tokenizer.encode("🙃")
    assert len(token_ids) > 1
    stream = tokenizer.stream()
    assert [stream.push(token_id) for token_id in token_ids] == [""] * (len(token_ids) - 1) + ["🙃"]


def test_a_broken_byte_is_shown_with_the_next_token(tokenizer):
    first_byte = tokenizer.encode("🙃")[0]
    stream = tokenizer.stream()
    assert stream.push(first_byte) == ""
    assert stream.push(tokenizer.encode("a")[0]) == "\ufffda"
    assert stream.push(first_byte) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_the_cost_of_a_token_does_not_grow_with_the_text(tokenizer):
    stream = tokenizer.stream()
    token_ids = tokenizer.encode("🙃 ein Stück Text ")
    start = time.perf_counter()
    for _ in range(2000):
        for token_id in token_ids:
            stream.push(token_id)
    # Decoding the whole text for every token would take minutes.
    assert time.perf_counter() - start < 5


def test_special_tokens_are_left_out_unless_asked_for(tokenizer):
    token_ids = [*tokenizer.encode("end"), 0]
    assert tokenizer.decode(token_ids) == "end"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "end<|endoftext|>"
    stream = tokenizer.stream(skip_special_tokens=False)
    assert "".join(streamed(stream, token_ids)) == "end<|endoftext|>"


WORDS = ["<s>", "▁", "▁the", "▁a", "the", "é", "▁▁"]


def sentencepiece_like():
    """A tokenizer as Llama and Mixtral have it: words that begin with U+2581, bytes as <0xXX>."""
    words = [
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁the",
        "▁a",
        "the",
        "é",
        "▁▁",
    ]
    vocab = {word: idx for idx, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


SENTENCEPIECE = sentencepiece_like()
WORD_IDS = [
    SENTENCEPIECE.token_to_id(word) for word in ("▁", "▁the", "▁a", "the", "é", "▁▁", "<s>")
]


def byte_ids(data):
    return [SENTENCEPIECE.token_to_id(f"<0x{byte:02X}>") for byte in data]


def of_library(library, folder):
    library.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory):
    return of_library(SENTENCEPIECE, tmp_path_factory.mktemp("sentencepiece"))


@given(
    parts=st.lists(st.integers(0, len(WORDS) - 1) | st.characters(exclude_categories=["Cs"])),
    skip=st.booleans(),
)
def test_byte_fallback_tokens_stream_as_they_decode(sentencepiece, parts, skip):
    token_ids = []
    for part in parts:
        token_ids += byte_ids(part.encode()) if isinstance(part, str) else [part]
    pieces = streamed(sentencepiece.stream(skip), token_ids)
    assert "".join(pieces) == SENTENCEPIECE.decode(token_ids, skip_special_tokens=skip)


def test_valid_characters_of_a_broken_run_of_bytes_stay(sentencepiece):
    stream = sentencepiece.stream()
    the = SENTENCEPIECE.token_to_id("▁the")
    pieces = streamed(stream, [*byte_ids("é".encode() + b"\xf0"), the])
    assert pieces == ["", "é", "", "\ufffd the", ""]


KINDS = [None, decoders.Metaspace(), decoders.WordPiece(), decoders.Fuse()]


@pytest.fixture(scope="session")
def of_other_decoders(tmp_path_factory):
    found = []
    for decoder in KINDS:
        words = ["▁the", "▁a", "the", "é", "▁"]
        library = tokenizers.Tokenizer(
            models.WordLevel({word: idx for idx, word in enumerate(words)})
        )
        if decoder is not None:
            library.decoder = decoder
        found.append(of_library(library, tmp_path_factory.mktemp("decoder")))
    return found


@given(token_ids=st.lists(st.integers(0, len(WORDS) - 1)))
def test_other_decoders_stream_as_they_decode(of_other_decoders, token_ids):
    for each in of_other_decoders:
        assert "".join(streamed(each.stream(), token_ids)) == each.decode(token_ids)


@given(
    before=st.lists(st.integers(0, len(WORDS) - 1), max_size=6),
    token_ids=st.lists(st.integers(0, len(WORDS) - 1), max_size=6),
    skip=st.booleans(),
)
def test_text_after_a_prompt_is_what_the_whole_text_has_after_it(
    sentencepiece, of_other_decoders, before, token_ids, skip
):
    words = [SENTENCEPIECE.token_to_id(WORDS[number]) for number in before]
    more = [SENTENCEPIECE.token_to_id(WORDS[number]) for number in token_ids]
    cases = [(sentencepiece, words, more)]
    cases += [(each, before, token_ids) for each in of_other_decoders]
    for own, prompt, answer in cases:
        whole = own.decode(prompt + answer, skip)
        text = own.decode(answer, skip, after=prompt)
        assert own.decode(prompt, skip) + text == whole
        assert "".join(streamed(own.stream(skip, after=prompt), answer)) == text


def test_the_first_space_of_an_answer_stays(sentencepiece):
    the, a = (SENTENCEPIECE.token_to_id(word) for word in ("▁the", "▁a"))
    bos = SENTENCEPIECE.token_to_id("<s>")
    assert sentencepiece.decode([a]) == "a"
    assert sentencepiece.decode([a], after=[the]) == " a"
    assert sentencepiece.decode([a], after=[the, bos]) == " a"
    assert sentencepiece.decode([a], after=[bos]) == "a"  # the text begins here
    assert sentencepiece.stream(after=[the]).push(a) == " a"


def test_a_character_that_begins_in_the_prompt_comes_out_whole(tokenizer):
    token_ids = tokenizer.encode("x🙃")
    for number in range(2, len(token_ids)):
        assert tokenizer.decode(token_ids[number:], after=token_ids[:number]) == "🙃"


def test_tokens_around_every_text_are_added_as_the_tokenizer_says(tmp_path):
    own = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="a"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    own.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a") == [0, 1]
    assert tokenizer.encode("a", add_special_tokens=False) == [1]


def test_a_missing_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(errors.MissingFileError, match=r"tokenizer\.json") as caught:
        Tokenizer(tmp_path)
    assert isinstance(caught.value, FileNotFoundError)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"{", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[" * 100000]
)
def test_a_corrupt_tokenizer_is_a_format_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(errors.FormatError) as caught:
        Tokenizer(tmp_path)
    assert str(path) in str(caught.value)


def test_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(errors.InvalidArgumentError, match="surrogate"):
        tokenizer.encode("a\ud800")
    with pytest.raises(errors.InvalidArgumentError, match="str"):
        tokenizer.encode(b"bytes")


@pytest.mark.parametrize(
    "token_id",
    [-1, 2**32, 2**64, None, "1", 1.5, [1], np.float32(1), pytest.param(10**5000, id="long")],
)
def test_what_is_no_token_id_is_refused(tokenizer, token_id):
    for use in (
        lambda: tokenizer.decode([1, token_id]),
        lambda: tokenizer.decode([1], after=[token_id]),
        lambda: tokenizer.stream(after=[token_id]),
    ):
        with pytest.raises(errors.InvalidArgumentError):
            use()
    assert tokenizer.stream().push(2**32) == ""


def test_ids_outside_the_vocabulary_have_no_text(tokenizer):
    assert tokenizer.decode([2**32 - 1, *tokenizer.encode("a"), 10**6]) == "a"
    assert tokenizer.decode(np.array(tokenizer.encode("a"), dtype=np.int64)) == "a"
