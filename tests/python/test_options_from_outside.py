"""Every option of every command with values that no library below can take.

The commands are found by introspection, so a new option is tested without anyone thinking of it.
"""

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import moerun
from moerun_tools import metrics, plan, predictor, run, trace

TOOLS = {
    "moe-run": run.main,
    "moe-trace": trace.main,
    "moe-metrics": metrics.main,
    "moe-plan": plan.main,
    "moe-predictor": predictor.main,
}

NUMBERS = ["9223372036854775808", "9" * 30, "1" + "0" * 400, "-9223372036854775809", "1e400", "nan"]
TEXTS = [
    "~nouser/x",
    "x" * 255,
    "x" * 300,
    "no/such/\udcff",
    "/dev/null/x",
    "",
    " ",
    "9" * 30,
    "-" + "9" * 400,
    "[" * 900,
    "{",
    "\x1b[31m",
]

# Values with which the rest of a command is in order, up to the files that it would read.
ARGUMENTS = {
    "moe-run": ["-n", "1", "--dry-run"],
    "moe-trace record": ["-o", "{new}", "--samples", "1", "--length", "8"],
    "moe-trace import": ["{new}", "-o", "{new}"],
    "moe-trace info": ["{new}"],
    "moe-metrics": ["{new}"],
    "moe-plan calibrate": ["-m", "{new}"],
    "moe-plan curve": ["--trace", "{new}"],
    "moe-plan make": ["--trace", "{new}", "--budget", "40%", "-o", "{new}"],
    "moe-plan simulate": ["--trace", "{new}", "--budget", "40%"],
    "moe-predictor train": ["{new}", "-o", "{new}"],
    "moe-predictor eval": ["{new}", "{new}"],
    "moe-predictor info": ["{new}"],
}


def commands():
    for tool, command in TOOLS.items():
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                yield f"{tool} {name}", inner
        else:
            yield tool, command


def values_of(param):
    if isinstance(param, click.Option) and param.is_flag:
        return []
    if isinstance(param.type, click.IntRange | click.FloatRange) or param.type in (
        click.INT,
        click.FLOAT,
    ):
        return NUMBERS
    return TEXTS


def check(result, what):
    text = result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), (
        what,
        result.exception,
    )
    assert "internal error" not in text, (what, text)
    assert "Traceback" not in text, (what, text)
    if result.exit_code:
        assert result.exit_code in (1, 2), (what, text)
        assert re.search(r"(?i)\berror: \S", text), (what, text)
        message = text[text.lower().rindex("error: ") :].rstrip("\n")
        assert message.count("\n") <= 1, (what, text)
        assert len(message) < 1500, (what, message)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Commands that would compute for long end where they begin to; files are in `tmp_path`."""

    def stop(*args, **options):
        raise moerun.errors.OutOfMemoryError("the test ends here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(moerun.Model, "load", stop)
    monkeypatch.setenv("MOERUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize(("name", "command"), commands(), ids=[name for name, _ in commands()])
def test_no_value_of_an_option_ends_as_an_internal_error(quick, name, command):
    runner = CliRunner()
    base = [text.format(new=quick / "new") for text in ARGUMENTS[name]]
    count = 0
    for param in command.params:
        if param.name == "version":
            continue
        for value in values_of(param):
            if isinstance(param, click.Option):
                arguments = [*base, f"{param.opts[-1]}={value}"]
            else:
                arguments = [value, *base[1:]] if not base[0].startswith("-") else [value, *base]
            result = runner.invoke(command, arguments, prog_name=name)
            check(result, (name, *arguments))
            count += 1
    assert count


def test_every_command_is_known_here():
    assert {name for name, _ in commands()} == set(ARGUMENTS)


@pytest.mark.parametrize("option", ["--length", "--generate", "--samples"])
def test_whole_numbers_beyond_64_bits_are_wrong_usage(option):
    result = CliRunner().invoke(trace.main, ["record", option, "9" * 21, "-o", "q.safetensors"])
    assert result.exit_code == 2
    assert "more than 64 bits" in result.output or "range" in result.output
    assert not Path("q.safetensors").exists()


@pytest.mark.parametrize("value", ["abc", "1e400", "nan"])
def test_what_is_no_number_is_called_so(value):
    result = CliRunner().invoke(run.main, ["--temperature", value, "x"])
    assert result.exit_code == 2
    assert "number" in result.output
    assert "float range" not in result.output
