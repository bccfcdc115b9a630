"""The files of moe-run --batch: full disks, damaged partial results, lines of any kind."""

import errno
import json
import os
import random
import resource
import subprocess
import sys

import pytest
from conftest import assert_failed, offline_environment
from hostile import VALUES, mutations, seconds_of_mutations

from moerun.errors import FileError, FormatError, MoerunError
from moerun_tools import batch_output
from moerun_tools.batch_file import GENERATION_FIELDS, BadLine, BatchInput
from moerun_tools.batch_output import BatchOutput, line_bytes, write_at
from moerun_tools.command import write_out

RUN = {"prompts": "a", "weights": "b", "options of generation": "c"}


@pytest.fixture
def output(tmp_path):
    def make(**changes):
        values = {"path": tmp_path / "r.jsonl", "run": RUN, "seed": 1, **changes}
        return BatchOutput(**values, numbers=frozenset({1, 2, 3}))

    return make


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text('"import os"\n"def f("\n')
    return path


def result(number):
    return {"line": number, "text": f"text {number}", "generated_tokens": 1}


# What is written


@pytest.mark.parametrize("limit", [0, 1, 60, 400, 600, 800])
def test_a_disk_that_is_full_at_any_byte_leaves_what_resume_and_overwrite_take(
    run_cli, tmp_path, prompts, limit
):
    out = tmp_path / "r.jsonl"
    partial = tmp_path / "r.jsonl.partial"

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = ("--batch", str(prompts), "-n", "2", "-q", "-o", str(out), "--device", "cpu")
    for option in ("--resume", "--overwrite"):
        done = run_cli(*arguments, "--seed", "1", "--overwrite", preexec_fn=full)
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"moe-run: error: cannot write {out}"), last
        assert os.strerror(errno.EFBIG) in last
        assert not out.exists()
        data = partial.read_bytes()
        assert data == b"" or data.endswith(b"\n")
        done = run_cli(*arguments, "--seed", "1", option)
        assert done.returncode == 0, done.stderr
        assert len(out.read_text().splitlines()) == 2
        assert not partial.exists()
        out.unlink()


@pytest.mark.parametrize("size", [0, 1, 10, 40, 41, 60, 100])
def test_a_first_line_that_was_cut_off_is_no_run(output, tmp_path, size):
    with output() as first:
        first.open(resume=False)
    partial = first.partial_path
    begun = partial.read_bytes()[:size]
    for padding in (b"", bytes(100)):  # after a power cut there may be zeros
        cut = begun + padding
        for resume, overwrite in ((True, False), (False, True), (False, False)):
            partial.write_bytes(cut)
            again = output()
            again.check([], resume, overwrite)
            with again:
                again.open(resume)
                again.add(result(1))
                again.finish()
            assert json.loads((tmp_path / "r.jsonl").read_text()) == result(1)
            (tmp_path / "r.jsonl").unlink()


def test_what_is_no_partial_result_is_left_alone(output):
    mine = output()
    for data in (b"mine", b"mine\n", b'{"format": "mine"}', b"[]\n{}\n"):
        mine.partial_path.write_bytes(data)
        for resume in (True, False):
            with pytest.raises(FormatError, match=r"r\.jsonl\.partial is not what .*remove it"):
                output().check([], resume, not resume)
        assert mine.partial_path.read_bytes() == data


def test_a_partial_result_says_what_differs(output):
    with output() as first:
        first.open(resume=False)
        first.add(result(2))
    changed = {**RUN, "weights": "x", "prompts": "y"}
    with pytest.raises(FormatError, match="with other prompts, weights; give the same"):
        output(run=changed).check([], True, False)
    output(run=changed).check([], False, True)
    first.partial_path.write_text('{"format": "moerun-batch", "version": 1, "run": "abc"}\n')
    with pytest.raises(FormatError, match="another version"):
        output().check([], True, False)
    output().check([], False, True)


def test_a_short_write_is_gone_on_with_and_one_of_nothing_is_an_error(output, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    with output() as kept:
        kept.open(resume=False)
        for number in (1, 2):
            kept.add(result(number))
        before = kept.partial_path.read_bytes()
        assert [json.loads(line) for line in before.splitlines()][1:] == [result(1), result(2)]
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
        with pytest.raises(FileError, match=r"cannot write .*r\.jsonl\.partial: No space left"):
            kept.add(result(3))
    assert kept.partial_path.read_bytes() == before
    with pytest.raises(OSError, match="No space left"):
        write_at(-1, b"x", 0)


def test_half_a_line_is_taken_back(output, monkeypatch):
    real = os.pwrite
    calls = []

    def fails(fd, data, at):
        calls.append(at)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:5], at)

    with output() as kept:
        kept.open(resume=False)
        before = kept.partial_path.read_bytes()
        monkeypatch.setattr(os, "pwrite", fails)
        with pytest.raises(FileError, match="No space left"):
            kept.add(result(1))
        assert kept.partial_path.read_bytes() == before
        monkeypatch.setattr(os, "pwrite", real)
        kept.add(result(1))
    again = output()
    with again:
        again.open(resume=True)
    assert again.done == {1: result(1)}


@pytest.mark.parametrize("length", [240, 247, 248, 255, 256, 300])
def test_names_near_the_limit_of_the_file_system_work_or_are_refused_before_the_work(
    run_cli, tmp_path, prompts, length
):
    out = tmp_path / ("r" * length)
    done = run_cli("--batch", str(prompts), "-n", "1", "-q", "-o", str(out), "--device", "cpu")
    if length <= 247:
        assert done.returncode == 0, done.stderr
        assert len(out.read_text().splitlines()) == 2
    else:
        assert_failed(done, "cannot write", "File name too long")
    assert not list(tmp_path.glob("*.partial"))


def test_a_partial_file_that_is_a_pipe_or_a_device_is_refused(run_cli, tmp_path, prompts):
    out = tmp_path / "r.jsonl"
    os.mkfifo(tmp_path / "r.jsonl.partial")
    for option in ("--resume", "--overwrite"):
        done = run_cli("--batch", str(prompts), "-o", str(out), "-q", option)
        assert_failed(done, "r.jsonl.partial", "not a plain file")


def test_damaged_partial_results_are_refused_or_computed_again(output, tmp_path):
    with output() as first:
        first.open(resume=False)
        for number in (3, 1, 2):
            first.add({**result(number), "id": {"a": [1, "ü"]}})
    whole = first.partial_path.read_bytes()
    rng = random.Random(0)
    with seconds_of_mutations(1.0) as more:
        while more():
            first.partial_path.write_bytes(mutations(rng, whole))
            again = output()
            try:
                again.check([], True, False)
                with again:
                    again.open(resume=True)
                    for number in {1, 2, 3} - again.done.keys():
                        again.add(result(number))
                    again.finish()
            except MoerunError as error:
                assert "r.jsonl.partial" in str(error)
                continue
            lines = (tmp_path / "r.jsonl").read_bytes().splitlines()
            assert [json.loads(line)["line"] for line in lines] == [1, 2, 3]
            (tmp_path / "r.jsonl").unlink()


def test_results_that_utf_8_cannot_say_are_escaped():
    value = {"line": 1, "text": "a\ud800b ü"}
    assert json.loads(line_bytes(value)) == value
    assert "ü".encode() in line_bytes(value)


# What is read


def parsed(tmp_path, data):
    path = tmp_path / "b.jsonl"
    path.write_bytes(data)
    return BatchInput.read(path)


BAD_LINES = [
    (b'{"prompt": "a", "id": NaN}', "NaN is no JSON number"),
    (b'{"prompt": "a", "temperature": Infinity}', "Infinity is no JSON number"),
    (b'{"prompt": "a", "id": ' + b"[" * 900 + b"]" * 900 + b"}", "nested"),
    (b'{"prompt": "a", "x": ' + b'{"y":' * 900 + b"1" + b"}" * 900 + b"}", "nested"),
    (b"[" * 100_000, "nested too deep"),
    (b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"prompt": "a", "id": 1e999}', "`id`: it cannot be written"),
    (b'{"prompt": "a", "id": "\\ud800"}', "`id`: it cannot be written"),
    (b'{"prompt": "\\udfff"}', "lone surrogate"),
    (b"\xff\xfe", "not UTF-8: byte 0xff"),
    (b"null", "found null"),
    (b"17", "found int"),
    (b"{}", "`prompt`"),
    (b'{"prompt": ["a"]}', "`prompt`"),
    (b"\x00", "not JSON"),
]


@pytest.mark.parametrize(("line", "error"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_of_any_kind_is_bad_by_itself(tmp_path, line, error):
    found = parsed(tmp_path, b'"first"\n' + line + b'\n{"prompt": "last"}\n')
    first, bad, last = found.lines
    assert (first.prompt, last.prompt) == ("first", "last")
    assert isinstance(bad, BadLine)
    assert error in bad.error
    line_bytes({"line": bad.number, "error": bad.error})


def test_names_of_fields_that_mean_nothing_are_shown_as_a_terminal_can(tmp_path):
    fields = {"\ud800": 1, "\x1b[31m": 2, "n" * 10_000: 3, "plain": 4}
    found = parsed(tmp_path, json.dumps({"prompt": "a", **fields}).encode())
    text = ", ".join(found.ignored)
    text.encode()
    assert text.isprintable()
    assert "plain" in text
    assert len(text) < 200
    many = {f"field {number}": 0 for number in range(5000)}
    found = parsed(tmp_path, json.dumps({"prompt": "a", **many}).encode())
    assert found.ignored[-1] == "and 4990 more"
    assert len(found.ignored) == 11


def test_one_line_of_any_kind_does_not_end_the_batch(run_cli, tmp_path):
    fields = (*GENERATION_FIELDS, "id")
    lines = [json.dumps("import os"), *(line.decode("latin-1") for line, _ in BAD_LINES[:8])]
    lines += [json.dumps({"prompt": "a", name: value}) for name in fields for value in VALUES]
    lines += [json.dumps("x " * 100_000), json.dumps({"prompt": "\x00\x01"}), json.dumps("def f(")]
    prompts = tmp_path / "b.jsonl"
    prompts.write_bytes("\n".join(lines).encode("latin-1"))
    out = tmp_path / "r.jsonl"
    options = ("-n", "2", "-q", "--seed", "1", "--context-length", "64")
    done = run_cli("--batch", str(prompts), "-o", str(out), *options)
    assert done.returncode == 1
    assert "internal error" not in done.stderr
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each["line"] for each in results] == list(range(1, len(lines) + 1))
    assert "text" in results[0]
    assert "text" in results[-1]
    for each in results:
        assert ("text" in each) != ("error" in each)
        assert "internal error" not in each.get("error", "")


def test_mutated_prompts_are_texts_or_bad_lines(tmp_path):
    whole = b"\n".join(
        json.dumps(line).encode()
        for line in ("import os", {"prompt": "a", "id": [1, {"x": "ü"}], "seed": 3, "stop": ["b"]})
    )
    rng = random.Random(1)
    with seconds_of_mutations(1.0) as more:
        while more():
            try:
                found = parsed(tmp_path, mutations(rng, whole))
            except MoerunError:
                continue  # no line is left
            for line in found.lines:
                if isinstance(line, BadLine):
                    line_bytes({"error": line.error})
                else:
                    line_bytes({"id": line.id, "prompt": line.prompt})


def test_prompts_from_a_pipe_come_by_standard_input(run_cli, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert_failed(run_cli("--batch", str(pipe), "-q"), "a pipe", f"--batch - < {pipe}")
    assert_failed(run_cli("--batch", "/dev/zero", "-q"), "a device", "--batch -")
    assert_failed(run_cli("--batch", str(tmp_path), "-q"), "a directory")
    done = run_cli("--batch", "-", "-n", "1", "-q", stdin=b'"import os"\n')
    assert done.returncode == 0, done.stderr


def test_prompts_that_are_no_file_of_prompts_are_refused_at_once(run_cli, tmp_path):
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.truncate(10 << 30)
    assert_failed(run_cli("--batch", str(large), "-q"), "too large", "large.jsonl")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30,) * 2)\n"
        "import moerun_tools.run as run; run.main(['--batch', '-', '-q'], prog_name='moe-run')"
    )
    with open("/dev/zero", "rb") as endless:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdin=endless,
            capture_output=True,
            text=True,
            env=offline_environment(),
            timeout=100,
        )
    assert done.returncode == 1
    assert "too large" in done.stderr


def test_the_beginning_of_a_partial_file_is_what_is_written(output):
    with output() as first:
        first.open(resume=False)
    assert first.partial_path.read_bytes().startswith(batch_output._BEGINNING)


@pytest.mark.parametrize("taken", [0, None])
def test_a_standard_output_that_takes_nothing_is_an_error_and_no_endless_loop(monkeypatch, taken):
    class Stuck:
        buffer = property(lambda self: self)

        def write(self, data):
            return taken

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Stuck())
    with pytest.raises(FileError, match="takes no more bytes"):
        write_out("text")


@pytest.mark.parametrize("has_finished", [False, True])
def test_results_of_a_run_that_began_and_ended_meanwhile_are_not_replaced(output, has_finished):
    late = output()
    late.check([], False, False)
    with output() as early:
        early.open(resume=False)
        early.add(result(1))
        if has_finished:
            early.finish()
    kept = early.path if has_finished else early.partial_path
    before = kept.read_bytes()
    with late, pytest.raises(FileError, match="--overwrite"):
        late.open(resume=False)
    assert kept.read_bytes() == before
