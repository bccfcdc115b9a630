"""Data of a recording: files of every kind, packed into sequences; and what is wrong with some."""

import json
import os
import sysconfig

import numpy as np
import polars
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerun.errors import FileError, FormatError, InvalidArgumentError, MissingFileError
from moerun.recording import (
    FileData,
    RandomTokens,
    TextData,
    array_reader,
    default_data,
    piece,
    table_readers,
)
from moerun.recording.sequences import sequences_of

VOCAB_SIZE = 300


def encode(text):
    """A token a byte."""
    return list(text.encode())


def packed(source, length=4, samples=1000, separator=0, vocab_size=VOCAB_SIZE):
    return [
        sequence.tolist()
        for sequence in sequences_of(
            source,
            encode,
            vocab_size=vocab_size,
            separator=separator,
            length=length,
            samples=samples,
        )
    ]


def text_of(source, separator="|"):
    """All documents, with a sign at the end of each."""
    text = ""
    for each in source.pieces(VOCAB_SIZE):
        text += each.content + (separator if each.ends_document else "")
    return text


def open_file(path, **options):
    return FileData.open("d", path, **options)


def test_documents_stand_one_after_the_other_with_the_separator_between_them():
    source = TextData("d", ["abc", "", "de"])
    # a b c 0 d e 0: a document without tokens leaves no end of text
    assert packed(source, length=2) == [[97, 98], [99, 0], [100, 101]]
    assert packed(source, length=2, separator=None) == [[97, 98], [99, 100]]


@given(
    texts=st.lists(st.text(alphabet="ab\n", max_size=20), min_size=1, max_size=8),
    length=st.integers(1, 7),
    samples=st.integers(1, 5),
)
def test_sequences_are_the_tokens_cut_at_the_length_and_the_rest_is_dropped(texts, length, samples):
    tokens = [t for text in texts if text for t in [*encode(text), 0]]
    expected = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    source = TextData("d", texts)
    if expected:
        assert packed(source, length, samples) == expected[:samples]
    else:
        with pytest.raises(InvalidArgumentError, match=f"only {len(tokens)} tokens"):
            packed(source, length, samples)


def test_a_domain_that_is_too_short_is_named_with_its_number_of_tokens():
    with pytest.raises(InvalidArgumentError) as caught:
        packed(TextData("poems", ["abc"]), length=9)
    for text in ("'poems'", "only 4 tokens", "sequence of 9", "give more text or lower --length"):
        assert text in str(caught.value)


def test_reading_stops_when_there_are_enough_sequences(tmp_path):
    good = tmp_path / "a.txt"
    good.write_text("x" * 100)
    bad = tmp_path / "b.txt"
    bad.write_bytes(b"\xff")
    source = FileData("d", [good, bad], tmp_path)
    assert len(packed(source, length=10, samples=10)) == 10
    with pytest.raises(FormatError, match=r"b\.txt"):
        packed(source, length=10, samples=11)


def test_a_text_file_is_read_in_pieces_that_end_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(piece, "TEXT_BYTES", 16)
    path = tmp_path / "a.md"
    text = "first line\nä second, longer line €\r\n\nlast without an end" * 3
    path.write_bytes(text.encode())
    pieces = list(open_file(path).pieces(VOCAB_SIZE))
    assert "".join(piece.content for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    cut = [piece.content for piece in pieces if piece.content]
    assert len(cut) > 5
    assert sum(piece.endswith("\n") for piece in cut) >= 5


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert text_of(open_file(tmp_path / "a.txt")) == "abc|"
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}\n')
    assert text_of(open_file(tmp_path / "a.jsonl")) == "abc|"


def test_jsonl_has_a_document_a_line_in_the_field_that_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "body": "1"}\n\n{"body": "2", "text": "two"}')
    assert text_of(open_file(path)) == "one|two|"
    assert text_of(open_file(path, text_field="body")) == "1|2|"


def test_a_long_document_is_cut_at_line_ends_too(tmp_path, monkeypatch):
    monkeypatch.setattr(piece, "TEXT_BYTES", 8)
    text = "one\ntwo three four five\n" * 3
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    pieces = list(open_file(tmp_path / "a.jsonl").pieces(VOCAB_SIZE))
    assert "".join(piece.content for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece.content) for piece in pieces) <= 8
    assert pieces[0].content == "one\n"


def test_parquet_has_a_document_a_row_however_many_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(table_readers, "_PARQUET_ROWS", 3)
    path = tmp_path / "a.parquet"
    texts = [f"t{i}" for i in range(10)]
    polars.DataFrame({"text": [*texts, None], "n": range(11)}).write_parquet(path)
    assert text_of(open_file(path)) == "".join(f"{text}|" for text in texts)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16])
def test_npy_is_a_stream_or_a_document_a_row(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.arange(6, dtype=dtype))
    assert packed(open_file(tmp_path / "a.npy"), 3) == [[0, 1, 2], [3, 4, 5]]
    np.save(tmp_path / "b.npy", np.arange(6, dtype=dtype).reshape(2, 3))
    assert packed(open_file(tmp_path / "b.npy"), 4, separator=9) == [[0, 1, 2, 9], [3, 4, 5, 9]]


def test_rows_of_token_ids_that_have_the_length_of_a_sequence_are_sequences(tmp_path):
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "rows.npy", np.arange(6).reshape(2, 3))
    rows = [[0, 1, 2], [3, 4, 5]]
    assert packed(open_file(tmp_path / "a"), 3, separator=9) == rows
    np.save(tmp_path / "a" / "stream.npy", np.arange(10, 14))  # 3 of a sequence and the rest
    found = packed(open_file(tmp_path / "a"), 3, separator=9)
    assert sorted(found) == [*rows, [10, 11, 12]]
    np.save(tmp_path / "stream.npy", np.arange(3))
    assert packed(open_file(tmp_path / "stream.npy"), 2, separator=9) == [[0, 1], [2, 9]]


def test_the_end_of_a_row_that_comes_in_pieces_is_no_sequence(tmp_path, monkeypatch):
    monkeypatch.setattr(array_reader, "_PIECE_TOKENS", 4)
    np.save(tmp_path / "a.npy", np.arange(12).reshape(2, 6))
    found = packed(open_file(tmp_path / "a.npy"), 2, separator=19)
    assert found == [[0, 1], [2, 3], [4, 5], [19, 6], [7, 8], [9, 10], [11, 19]]


BAD = {
    "empty.txt": (b"", "is empty"),
    "latin.txt": ("käse".encode("latin-1"), "not valid UTF-8: byte 0xe4 at offset 1"),
    "cut.txt": ("aaä".encode()[:-1], "not valid UTF-8: byte 0xc3 at offset 2"),
    "blank.jsonl": (b"\n\n", "is empty"),
    "broken.jsonl": (b'{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
    "list.jsonl": (b"[1]\n", "line 1: expected an object"),
    "field.jsonl": (b'{"txt": "a"}\n', "line 1 has no field 'text', only 'txt'"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: the field 'text' must be text, not int"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "lone surrogate"),
    "deep.jsonl": (b"[" * 100000 + b"\n", "line 1 is not JSON"),
    "bytes.jsonl": (b'{"text": "\xff"}\n', "line 1 is not valid UTF-8"),
    "noise.parquet": (b"PAR1" + b"\x00\xff" * 40 + b"PAR1", "not a parquet file"),
    "text.parquet": (b"hello", "not a parquet file"),
    "noise.npy": (b"\x93NUMPY\x01\x00\xff\xff{'descr'", "not a .npy file"),
    "text.npy": (b"1 2 3", "not a .npy file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_the_place_and_what_is_wrong(tmp_path, name):
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises((FileError, FormatError)) as caught:
        list(open_file(tmp_path / name).pieces(VOCAB_SIZE))
    assert str(tmp_path / name) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1, 2, 300]), r"token id 300 at \[2\] is outside the vocabulary: .* 0 to 299"),
        (np.array([[1, 2], [-1, 0]]), r"token id -1 at \[1, 0\]"),
        (np.array([2**40]), "token id 1099511627776"),
        (np.array([1.5]), "integer token ids .* found float64"),
        (np.zeros((1, 1, 1), int), r"shape \(1, 1, 1\)"),
        (np.zeros(0, int), "empty|cannot be read"),
        (np.array([True]), "found bool"),
        (np.array([{}], dtype=object), "not a .npy file"),
    ],
)
def test_wrong_token_ids_are_named_with_their_index(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(FormatError, match=message) as caught:
        list(open_file(tmp_path / "a.npy").pieces(VOCAB_SIZE))
    assert "a.npy" in str(caught.value)


def test_parquet_without_the_field_names_those_that_are_there(tmp_path):
    polars.DataFrame({"body": ["a"], "text": [1]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(FormatError, match="no column 'title', only 'body', 'text'"):
        list(open_file(tmp_path / "a.parquet", text_field="title").pieces(VOCAB_SIZE))
    with pytest.raises(FormatError, match="'text' must be text, not Int64"):
        list(open_file(tmp_path / "a.parquet").pieces(VOCAB_SIZE))


def test_a_truncated_parquet_or_npy_is_an_error_at_every_length(tmp_path):
    polars.DataFrame({"text": ["some text"] * 50}).write_parquet(tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", np.arange(50))
    for name in ("a.parquet", "a.npy"):
        data = (tmp_path / name).read_bytes()
        for size in range(0, len(data), 23):
            cut = tmp_path / f"cut.{name}"
            cut.write_bytes(data[:size])
            with pytest.raises((FileError, FormatError), match="cut"):
                list(open_file(cut).pieces(VOCAB_SIZE))


def test_bad_files_are_skipped_only_when_that_is_wanted_and_each_is_told(tmp_path):
    for name, (data, _) in BAD.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises((FileError, FormatError)):
        open_file(tmp_path)
    told = []
    source = open_file(tmp_path, skip_bad=True, warn=told.append)
    text = text_of(source)
    assert "good|" in text
    assert "a|" in text  # the line before the broken one
    for name in BAD:
        assert sum(name in message for message in told) == 1, (name, told)


def test_a_directory_gives_its_files_but_not_hidden_ones_in_an_order_by_seed(tmp_path):
    for name in ("b/x.txt", "a.txt", "c/d/e.txt", ".hidden", ".git/config", "f.txt", "g.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name + "\n")
    orders = [[file.name for file in open_file(tmp_path, seed=seed).files] for seed in (0, 0, 1)]
    assert sorted(orders[0]) == ["a.txt", "e.txt", "f.txt", "g.txt", "x.txt"]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    with pytest.raises(FileError, match=r"secret\.txt cannot be read"):
        open_file(tmp_path)


def test_what_is_not_there_or_no_file_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere"):
        open_file(tmp_path / "nowhere")
    with pytest.raises(FileError, match="holds no files"):
        open_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="is a pipe, expected a regular file"):
        open_file(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(MissingFileError, match="link"):
        open_file(tmp_path)


def test_a_token_outside_the_models_vocabulary_is_an_error():
    with pytest.raises(InvalidArgumentError, match=r"token id 98 .* only 98 tokens"):
        packed(TextData("d", ["ab"]), length=1, vocab_size=98)


def test_the_fingerprint_changes_with_names_and_contents_and_with_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = open_file(path).fingerprint()
    os.utime(path, ns=(0, 0))
    assert open_file(path).fingerprint() == first
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "a.txt").write_text("one")
    assert open_file(tmp_path / "copy" / "a.txt").fingerprint() == first
    path.write_text("two")
    second = open_file(path).fingerprint()
    path.rename(tmp_path / "b.txt")
    third = open_file(tmp_path / "b.txt").fingerprint()
    assert len({first, second, third}) == 3


@pytest.mark.parametrize("size", [2**20, 20 * 2**20])
def test_the_fingerprint_of_a_large_file_has_samples_of_all_of_it(tmp_path, size):
    file = tmp_path / "large.txt"
    data = bytearray(b"a") * size
    hashes = set()
    for place in (None, 0, size // 3, size // 2, size - 1):
        if place is not None:
            data[place : place + 70_000] = b"b" * len(data[place : place + 70_000])
        file.write_bytes(data)
        hashes.add(open_file(file).fingerprint())
    assert len(hashes) == 5
    assert TextData("d", ["ab"]).fingerprint() != TextData("d", ["a", "b"]).fingerprint()
    assert RandomTokens(1).fingerprint() != RandomTokens(2).fingerprint()


def test_random_tokens_follow_the_seed_and_use_the_whole_vocabulary():
    one, again, other = (packed(RandomTokens(s), 500, 4, vocab_size=10) for s in (1, 1, 2))
    assert one == again != other
    counts = np.bincount(np.concatenate(one), minlength=10)
    assert (counts > 100).all()


def test_the_default_data_are_library_sources_and_the_manual():
    python, english = default_data()
    assert (python.domain, english.domain) == ("python", "english")
    names = {str(file) for file in python.files}
    assert any(name.endswith("json/decoder.py") for name in names)
    assert not any("/test/" in name or "site-packages" in name for name in names)
    assert "statement" in text_of(english)
    assert len(packed(python, 512, 4)) == 4


def test_the_default_data_are_what_is_there_and_an_error_without_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [source.domain for source in default_data()] == ["english"]
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(MissingFileError, match="--data"):
        default_data()
    (tmp_path / "a.py").write_text("x = 1\n")
    assert [source.domain for source in default_data()] == ["python"]


def test_json_escapes_of_valid_pairs_are_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "😀"}) + "\n")
    assert text_of(open_file(path)) == "😀|"
