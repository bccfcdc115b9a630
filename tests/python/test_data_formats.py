"""Data files are known by what they hold, then by their names; only regular files are read."""

import csv
import gzip
import io
import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import polars
import pytest

from moerun.errors import FileError, FormatError, InvalidArgumentError, MissingFileError
from moerun.recording import FileData, import_study, table_readers, text_readers

TEXTS = ["import os\n", 'zwei, Zeilen\nmit "Zeichen"', "drei € 😀"]
BOM = b"\xef\xbb\xbf"


def documents(path, **options):
    """The texts of a domain, one a document."""
    found = [""]
    for piece in FileData.open("d", path, **options).pieces(4096):
        found[-1] += piece.content
        if piece.ends_document:
            found.append("")
    return found[:-1]


def json_lines(field="text"):
    return "\n".join(json.dumps({field: text, "n": 1}) for text in TEXTS) + "\n"


def table(delimiter, field="text"):
    text = io.StringIO()
    rows = csv.writer(text, delimiter=delimiter)
    rows.writerow(["id", field])
    rows.writerows(enumerate(TEXTS))
    return text.getvalue()


FILES = {
    "a.jsonl": json_lines(),
    "a.ndjson": json_lines(),
    "A.JSONL": json_lines(),
    "a.jsonlines": json_lines(),
    "no ending": json_lines(),
    "lines.json": json_lines(),
    "objects.json": json.dumps([{"text": text} for text in TEXTS]),
    "texts.JSON": json.dumps(TEXTS, indent=2),
    "pretty.json": json.dumps([{"n": [1, {}], "text": t} for t in TEXTS], indent=4),
    "row.json": "".join(json.dumps({"text": text}, indent=1) for text in TEXTS),
    "a.csv": table(","),
    "A.CSV": table(","),
    "a.tsv": table("\t"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("start", [b"", BOM])
@pytest.mark.parametrize("name", FILES)
def test_texts_are_found_in_every_format_with_a_byte_order_mark_and_packed(
    tmp_path, name, start, packed
):
    data = start + FILES[name].encode()
    path = tmp_path / name
    if packed:
        path = tmp_path / f"{name}.GZ" if name.isupper() else tmp_path / f"{name}.gz"
        data = gzip.compress(data)
    path.write_bytes(data)
    assert documents(path) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.log"])
@pytest.mark.parametrize("text", ['{"text": "x"}\n', "[1]", "{", "a,text\n1,2\n", "PAR1 and so on"])
def test_what_looks_like_json_stays_text_where_the_name_says_so(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert documents(tmp_path / name) == [text]
    (tmp_path / "Makefile").write_text("{}\n" + text)
    assert documents(tmp_path / "Makefile") == ["{}\n" + text]


def test_packed_text_is_text_and_packed_data_need_no_ending(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello"))
    (tmp_path / "b").write_bytes(gzip.compress(json_lines().encode()))
    assert documents(tmp_path / "a.txt.gz") == ["hello"]
    assert documents(tmp_path / "b") == TEXTS


def test_contents_decide_over_a_wrong_name(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(5))
    (tmp_path / "ids.npy").rename(tmp_path / "ids.txt")
    (piece,) = FileData.open("d", tmp_path / "ids.txt").pieces(100)
    assert piece.content.tolist() == [0, 1, 2, 3, 4]
    polars.DataFrame({"text": TEXTS}).write_parquet(tmp_path / "table.txt")
    assert documents(tmp_path / "table.txt") == TEXTS


def test_a_folder_may_hold_all_formats_together(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    polars.DataFrame({"text": TEXTS}).write_parquet(tmp_path / "a.parquet")
    assert sorted(documents(tmp_path)) == sorted(TEXTS * (len(FILES) + 1))


REFUSED = {
    "zip": (b"PK\x03\x04" + bytes(20), "is a zip archive, which is not read. Data are text"),
    "b.txt": (b"PK\x03\x04" + bytes(20), "is a zip archive"),
    "a.pdf": (b"%PDF-1.7\n", "is a PDF document"),
    "a.zst": (b"\x28\xb5\x2f\xfd" + bytes(9), "is packed by zstd"),
    "a.xz": (b"\xfd7zXZ\x00" + bytes(9), "is packed by xz"),
    "a.bz2": (b"BZh91AY&SY" + bytes(9), "is packed by bzip2"),
    "a.arrow": (b"ARROW1\x00\x00", "is an Arrow file"),
    "a.pkl": (b"\x80\x04K\x01.", "is a Python pickle"),
    "a.h5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "a.png": (b"\x89PNG\r\n\x1a\n", "is a picture"),
    "nul.txt": (b"abc\0def", "is not text: the byte at offset 3 is 0"),
    "nul.jsonl": (b'{"text": "a\0"}', "is not text: the byte at offset 11 is 0"),
    "utf16.txt": ("\ufeffabc".encode("utf-16-le"), "is UTF-16 or UTF-32 text"),
    "utf16.jsonl": ("\ufeff{}".encode("utf-16-be"), "is UTF-16 or UTF-32 text"),
    "utf16.csv": ("\ufeffa,text".encode("utf-16-le"), "is UTF-16 or UTF-32 text"),
    "utf32.txt": ("\ufeffabc".encode("utf-32-le"), "is UTF-16 or UTF-32 text"),
    "text.npy": (b"1 2 3", "is not a .npy file"),
    "text.PARQUET": (b"hello", "is not a parquet file"),
    "text.jsonl": (b'{"text": "a"}\nhello\n', "line 2 is not JSON"),
    "array.jsonl": (b'[{"text": "a"}]\n', "line 1: expected an object"),
    "text.json": (b"hello", "line 1 is not JSON"),
    "end.json": (b'[{"text": "a"},\n{"text": "b"}\n', "line 3 is not JSON: the array has no end"),
    "comma.json": (b'[{"text": "a"}\n{"text": "b"}]', "line 2 is not JSON: expected a comma"),
    "last.json": (b'[{"text": "a"},]', "line 1 is not JSON"),
    "more.json": (b'["a"]\n["b"]', "line 2 is not JSON: expected the end of the file"),
    "value.json": (b'["a", 3]', "line 1: expected an object with the field 'text', found a int"),
    "field.json": (b'{"data": []}', "line 1 has no field 'text', only 'data'; --text-field"),
    "none.json": (b"[]", "is empty: it holds no text"),
    "deep.json": (b"[" * 100000, "is not JSON"),
    "digits.json": (b'{"text": ' + b"9" * 10000 + b"}", "is not JSON"),
    "surrogate.json": (b'["\\ud800"]', "lone surrogate"),
    "column.csv": (b"id,txt\n1,a\n", "the first row has no column 'text', only 'id', 'txt'"),
    "short.csv": (b"id,text\n1\n", "line 2: the row has 1 fields, expected 2"),
    "quote.csv": (b'text\n"a"b"\n', "is not a row of a table"),
    "open.csv": (b'text\n"a\n', "is not a row of a table"),
    "bytes.csv": (b"text\n\xff\n", "line 2 is not valid UTF-8"),
    "head.csv": (b"text\n", "is empty: it holds no text"),
    "cut.txt.gz": (gzip.compress(b"hello" * 100)[:-9], "is not a gzip file that can be read"),
    "noise.gz": (b"\x1f\x8b" + b"\xff" * 50, "is not a gzip file that can be read"),
    "flip.gz": (gzip.compress(b"hello")[:-6] + b"\0" * 6, "is not a gzip file that can be read"),
    "a.npy.gz": (gzip.compress(b"\x93NUMPY\x01\x00"), "npy file packed by gzip, which is not read"),
    "a.gz.gz": (gzip.compress(gzip.compress(b"hello")), "is not text|not valid UTF-8"),
    "bom.txt": (BOM + b"ab\xff", "byte 0xff at offset 5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_name_and_what_it_is(tmp_path, name):
    data, message = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        documents(tmp_path / name)
    assert name in str(caught.value)


def test_the_field_may_have_another_name_in_every_format(tmp_path):
    for name, text in (
        ("a.jsonl", json_lines("body")),
        ("a.json", json_lines("body")),
        ("a.csv", table(",", "body")),
        ("no ending", json_lines("body")),
    ):
        (tmp_path / name).write_text(text)
        assert documents(tmp_path / name, text_field="body") == TEXTS


def test_values_and_rows_without_an_end_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text_readers, "VALUE_BYTES", 2**20)
    monkeypatch.setattr(table_readers, "VALUE_BYTES", 2**20)
    endless = {
        "a.jsonl": b'{"text": "' + b"a" * 2**22,
        "a.json": b'[{"text": "' + b"a" * 2**22,
        "line.csv": b"text\n" + b"a" * 2**22,
        "row.csv": b"text\n" + b'"a\n",' * 2**19,
        "field.csv": b'text\n"' + b"a\n" * 2**20,
    }
    for name, data in endless.items():
        for path, content in ((name, data), (f"{name}.gz", gzip.compress(data, 1))):
            (tmp_path / path).write_bytes(content)
            with pytest.raises(FormatError, match=r"longer than|not JSON|not a row|larger than"):
                documents(tmp_path / path)


def test_a_json_value_is_found_across_the_borders_of_what_is_read(tmp_path, monkeypatch):
    texts = ["x" * 1000 + "€\n" * 9, "", "y" * 10_000, "\\", '"', "z"] * 3
    (tmp_path / "a.json").write_text(json.dumps(texts, ensure_ascii=False, indent=1))
    for size in (1, 7, 4096):
        monkeypatch.setattr(text_readers, "_READ_BYTES", size)
        assert documents(tmp_path / "a.json") == texts


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_pipes_sockets_and_devices_are_refused_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    name = {"pipe": "m_00.safetensors", "socket": "m_01.safetensors", "device": "/dev/zero"}[kind]
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(name)
    with pytest.raises(FileError, match=f"is a {kind}, expected a regular file"):
        FileData.open("d", name)
    if kind != "device":
        with pytest.raises(FileError, match=f"is a {kind}, expected a regular file"):
            import_study([name], tmp_path / "o.safetensors", top_k=1)
        # Beside other files they are no data.
        (tmp_path / "a.txt").write_text("text")
        assert documents(tmp_path) == ["text"]


@pytest.mark.parametrize("path", [None, 3, "~nouser-at-all/x", "a\0b", "", "\ud800"])
def test_what_is_no_path_is_an_invalid_argument(tmp_path, path):
    with pytest.raises(InvalidArgumentError):
        FileData.open("d", path)
    with pytest.raises(InvalidArgumentError):
        import_study([path], tmp_path / "o.safetensors", top_k=1)


def test_names_that_are_too_long_are_missing_files():
    with pytest.raises((FileError, MissingFileError)):
        FileData.open("d", "x" * 300)


@pytest.mark.parametrize("name", ["a.npy", "a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path, name):
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, np.arange(4_000_000, dtype=np.int64) % 4000)
    elif name == "a.parquet":
        texts = [os.urandom(3000).hex() for _ in range(2000)]
        polars.DataFrame({"text": texts}).write_parquet(path, row_group_size=256)
    else:
        path.write_text('{"text": "abc"}\n' * 100_000)
    # In a process of its own: a signal must not end the tests.
    code = (
        "import os, pathlib, sys\n"
        "from moerun.recording.readers import read_pieces\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "pieces = read_pieces(path, 'text', 4096); next(pieces)\n"
        "os.truncate(path, path.stat().st_size // 4)\n"
        "list(pieces)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.returncode
    assert re.search(r"moerun\.errors\.(FileError|FormatError): ", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,)}", "describes int64"),
        ("{'descr': '<i8', 'fortran_order': False, 'shape': (10000000000000, 0)}", "is empty"),
        ("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, -8)}", "describes int64"),
        ("{'descr': '<i8', 'fortran_order': False, 'shape': (10**20,)}", "not a .npy file"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "Python objects"),
        ("{'descr': '<i8', 'shape': (1,)}", "not a .npy file"),
        ("[" * 2000, "not a .npy file"),
    ],
)
def test_headers_of_arrays_are_checked_before_anything_is_read(tmp_path, header, message):
    text = header.encode() + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        list(FileData.open("d", tmp_path / "a.npy").pieces(4096))


def test_columns_that_lie_together_give_the_same_rows(tmp_path):
    ids = np.arange(12).reshape(3, 4)
    np.save(tmp_path / "a.npy", np.asfortranarray(ids))
    pieces = list(FileData.open("d", tmp_path / "a.npy").pieces(100))
    assert [piece.content.tolist() for piece in pieces] == ids.tolist()
