"""Files that a user names: regular ones only, within limits, and no surprise in a name."""

import os
import socket

import pytest

from moerun.errors import FileError, FormatError, InvalidArgumentError, MissingFileError
from moerun.user_files import open_regular, read_at, read_bounded, read_text_bounded, user_path


def test_bounded_reads_take_a_file_that_is_exactly_as_large_as_the_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bounded(tmp_path / "a", 5) == b"12345"
    with pytest.raises(FormatError, match="at most 4 bytes, found 5"):
        read_bounded(tmp_path / "a", 4)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "directory"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    name = kind
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(name)
    elif kind == "device":
        name = "/dev/zero"
    else:
        os.mkdir(name)
    with pytest.raises(FileError, match=f"is a {kind}, expected a regular file"):
        open_regular(name)
    with pytest.raises(FileError, match=f"is a {kind}, expected a regular file"):
        read_bounded(name, 10)


@pytest.mark.parametrize(
    "name",
    [None, 5, b"bytes", "", "a\0b", "~nouser-at-all/x", "a\ud800b", ["a"], 1.5],
)
def test_names_that_no_file_can_have_are_invalid_arguments(name):
    with pytest.raises(InvalidArgumentError, match="the trace"):
        user_path(name, "the trace")
    with pytest.raises(InvalidArgumentError):
        open_regular(name)


@pytest.mark.parametrize("name", ["missing", "a/b", "x" * 300, "/" + "y" * 5000])
def test_names_of_missing_files_are_file_errors(tmp_path, name):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(FileError):
        open_regular(tmp_path / name)
    with pytest.raises(MissingFileError):
        open_regular(tmp_path / "missing")


def test_text_loses_its_byte_order_mark_and_utf16_is_named(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"\xef\xbb\xbfhi")
    assert read_text_bounded(file, 100) == "hi"
    for encoding in ("utf-16", "utf-16-be", "utf-32"):
        file.write_bytes("\ufeffhi".encode(encoding))
        with pytest.raises(FormatError, match="is UTF-16 or UTF-32 text"):
            read_text_bounded(file, 100)
    file.write_bytes(b"\xef\xbb\xbfa\xff")
    with pytest.raises(FormatError, match="byte 0xff at offset 4"):
        read_text_bounded(file, 100)


def test_a_file_that_became_shorter_is_an_error_not_zeros(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"0123456789")
    buffer = bytearray(4)
    with open_regular(file) as opened:
        read_at(opened, 2, buffer, "a")
        assert buffer == b"2345"
        os.truncate(file, 4)
        with pytest.raises(FileError, match="became shorter while it was read"):
            read_at(opened, 2, buffer, "a")
