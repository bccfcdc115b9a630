"""Where the host keeps experts for a device: options, warnings and what is printed; no device."""

import numpy as np
import pytest
from conftest import assert_failed
from test_cache_report import cached, planned, stats

import moerun
import moerun.model
from moerun import Model, errors
from moerun.cache_options import cache_options
from moerun_tools.cache_report import statistics_text
from moerun_tools.dry_run_report import dry_run_table
from moerun_tools.loading import load_model

NOTHING = dict.fromkeys(("expert_budget", "policy", "split", "prefetch", "plan"))
HOST = {
    "tier": "auto",
    "pin_limit_bytes": 9_000_000,
    "page_locked_bytes": 9_000_000,
    "pageable_bytes": 6_000_000,
    "disk_bytes": 5_000_000,
    "ring_bytes": 2_000_000,
    "notes": [],
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"pin_limit": "8GiB"}, {"pin_limit": "8GiB"}),
        ({"pin_limit": "40%"}, {"pin_limit": "40%"}),
        ({"pin_limit": 0}, {"pin_limit": "0"}),
        ({"pin_limit": np.int64(7)}, {"pin_limit": "7"}),
        ({"pin_limit": None, "host_tier": "disk"}, {"host_tier": "disk"}),
    ],
)
def test_what_was_given_is_put_as_the_native_module_wants_it(given, expected):
    assert cache_options(**(NOTHING | given)) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {"pin_limit": -1},
        {"pin_limit": 1.5},
        {"pin_limit": True},
        {"pin_limit": b"40%"},
        {"pin_limit": ""},
        {"host_tier": 3},
        {"host_tier": ""},
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_and_named(default_path, arguments):
    for call in (Model.load, moerun.dry_run):
        with pytest.raises(errors.InvalidArgumentError, match=next(iter(arguments))):
            call(default_path, **arguments)


@pytest.mark.parametrize(
    "arguments", [{"pin_limit": 0}, {"pin_limit": "40%"}, {"host_tier": "disk"}], ids=str
)
def test_the_cpu_has_no_use_for_them(default_path, arguments):
    for call in (Model.load, moerun.dry_run):
        with pytest.raises(ValueError, match=rf"{next(iter(arguments))}: .*needs device cuda"):
            call(default_path, device="cpu", **arguments)


def test_on_the_command_line_too(run_cli):
    for options in (["--pin-limit", "8GiB"], ["--host-tier", "disk"]):
        name = options[0][2:].replace("-", "_")
        assert_failed(run_cli("--device", "cpu", *options, "x"), name, "needs device cuda")
        assert_failed(run_cli("--device", "cpu", "--dry-run", *options), name)
    done = run_cli("--host-tier", "tape", "x")
    assert done.returncode == 2
    assert "--host-tier" in done.stderr


def test_on_the_cpu_nothing_is_kept_for_a_device(default_path):
    assert moerun.dry_run(default_path, device="cpu", expert_budget="25%")["host"] is None
    with Model.load(default_path, device="cpu", expert_budget="25%") as model:
        assert model.stats()["cache"]["host"] is None
        assert model.stats()["load"]["notes"] == []


class WithNotes:
    """Stands in for the native model: page-locked memory was refused."""

    def __init__(self, path, **options):
        self.options = options

    def stats(self):
        return {"load": {"notes": ["page-locked memory was refused"]}}

    def close(self):
        pass


def test_a_note_of_loading_is_a_warning(default_path, monkeypatch):
    monkeypatch.setattr(moerun.model._moerun, "Model", WithNotes)
    with pytest.warns(errors.MoerunWarning, match="was refused") as caught:
        model = Model.load(default_path, pin_limit="1GiB", host_tier="memory")
    assert caught[0].filename == __file__
    options = model._native.options
    assert (options["pin_limit"], options["host_tier"]) == ("1GiB", "memory")


@pytest.mark.filterwarnings("error")
def test_the_tools_print_it_as_one_line(default_path, monkeypatch, capsys):
    monkeypatch.setattr(moerun.model._moerun, "Model", WithNotes)
    load_model(default_path, quiet=True)
    assert capsys.readouterr().err == "warning: page-locked memory was refused\n"


def test_the_lines_of_a_run_say_what_is_page_locked_and_what_is_not():
    text = statistics_text(stats(cached(host=HOST)))
    expected = "host      8.58 MiB page-locked, 5.72 MiB pageable, 4.77 MiB on disk, ring"
    assert expected in text.splitlines()
    assert "slower than link and device allow" in text
    all_locked = HOST | {"pageable_bytes": 0, "disk_bytes": 0, "ring_bytes": 0}
    assert "\nhost      8.58 MiB page-locked\n" in statistics_text(stats(cached(host=all_locked)))


def test_the_dry_run_says_it_too():
    lines = dry_run_table(planned(host=HOST | {"notes": ["memory is short"]})).splitlines()
    rows = [line.split(None, 2) for line in lines if line.startswith("host: ")]
    assert [row[1] for row in rows] == ["page-locked", "pageable", "on", "ring"]
    assert "8.58 MiB" in rows[0][2]
    assert "45.0 % of the experts" in rows[0][2]
    assert "note: memory is short" in lines
    assert not [line for line in dry_run_table(planned()).splitlines() if "host" in line]
