"""Options of the expert cache on the command line, and what moe-run says about it."""

import json
import os

import pytest
from conftest import as_json, assert_failed

import moerun
from moerun.sizes import size_text

PROMPT = "import os\n"


@pytest.fixture(scope="module")
def sizes(default_path):
    return moerun.dry_run(default_path)


@pytest.fixture(scope="module")
def plain(run_cli):
    return as_json(run_cli("--json", "-n", "24", PROMPT))


def test_the_dry_run_prints_a_table_and_needs_no_prompt(run_cli, sizes):
    reader, writer = os.pipe()  # never written to and never closed: reading it would hang
    try:
        done = run_cli("--dry-run", "--expert-budget", "25%", "--split", "0.5", stdin=reader)
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for text in ("8 layers of 32 experts", "resident weights", "KV cache", "experts in all"):
        assert text in done.stdout
    assert "25.0 % of the experts" in done.stdout
    assert "staging ring" in done.stdout
    *_, header, row = done.stdout.splitlines()
    assert header.split() == ["layers", "with", "experts", "slots", "split"]
    assert row.split()[-1] == "0.50"


def test_the_dry_run_of_a_model_that_fits_says_so(run_cli):
    assert "every expert fits in the budget" in run_cli("--dry-run").stdout


def test_the_dry_run_as_json_is_what_python_returns(run_cli, default_path):
    options = ["--expert-budget", "6MB", "--policy", "lru", "--split", "0.5", "--prefetch", "off"]
    value = as_json(run_cli("--dry-run", "--json", *options, "--context-length", "100"))
    expected = moerun.dry_run(
        default_path,
        context_length=100,
        expert_budget="6MB",
        policy="lru",
        split=0.5,
        prefetch=False,
    )
    for both in (value, expected):
        for name in ("available_bytes", "device_free_bytes", "left_for_experts_bytes"):
            assert both.pop(name) > 0  # not the same twice
    assert value == expected
    assert value["prefetch"] == "off"


def test_the_dry_run_of_what_does_not_work_is_an_error(run_cli, tmp_path, sizes):
    smallest = size_text(sizes["smallest_budget_bytes"], "up")
    assert_failed(run_cli("--dry-run", "--expert-budget", "10kB"), "9.76 KiB", smallest)
    assert_failed(run_cli("--dry-run", "-m", str(tmp_path)), "config.json")


@pytest.mark.parametrize(
    "options",
    [
        ["--expert-budget", "25%"],
        ["--expert-budget", "6MB", "--policy", "lru", "--split", "0.5", "--prefetch", "on"],
        ["--expert-budget", "3000000", "--split", "0,0.5,1,0.5,0,0.5,1,0.5", "--threads", "1"],
        ["--expert-budget", "40%", "--policy", "off"],
    ],
    ids=" ".join,
)
def test_the_options_reach_the_cache_and_the_text_stays_the_same(run_cli, plain, options):
    value = as_json(run_cli("--json", "-n", "24", *options, PROMPT))
    assert value["token_ids"] == plain["token_ids"]
    assert value["stats"]["logits_hash"] == plain["stats"]["logits_hash"]
    assert plain["stats"]["cache"]["state"] == "resident"
    cache = value["stats"]["cache"]
    assert cache["state"] == "cached"
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert cache["policy"] == given.get("--policy", "lcp")
    if "--prefetch" in given:
        assert cache["prefetch"] == given["--prefetch"]
    if "," in given.get("--split", ""):
        wanted = [float(text) for text in given["--split"].split(",")]
        assert [layer["split"] for layer in cache["layers"]] == wanted


def test_a_plan_reaches_the_cache(run_cli, plain, tmp_path, sizes):
    layers = [{"layer": layer, "slots": 4 + layer, "split": 0.5} for layer in range(8)]
    plan = {
        "version": 1,
        "model": "tiny-olmoe",
        "policy": "lru",
        "budget_bytes": sizes["total_expert_bytes"] // 2,
        "prefetch": "on",
        "layers": layers,
    }
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    value = as_json(run_cli("--json", "-n", "24", "--plan", str(file), PROMPT))
    assert value["token_ids"] == plain["token_ids"]
    cache = value["stats"]["cache"]
    assert (cache["policy"], cache["prefetch"]) == ("lru", "on")
    assert [
        {name: layer[name] for name in ("layer", "slots", "split")} for layer in cache["layers"]
    ] == layers
    overruled = as_json(run_cli("--dry-run", "--json", "--plan", str(file), "--prefetch", "off"))
    assert overruled["prefetch"] == "off"


def test_a_budget_that_is_too_small_names_the_smallest_one(run_cli, sizes):
    done = run_cli("--expert-budget", "10kB", PROMPT)
    assert_failed(done, "9.76 KiB", size_text(sizes["smallest_budget_bytes"], "up"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--expert-budget", "lots"], ["expert_budget", "lots", "25%"]),
        (["--expert-budget", "101%"], ["expert_budget", "101%"]),
        (["--expert-budget", "25%", "--split", "0.5,0.5"], ["split", "8", "2"]),
        (["--policy", "static"], ["static", "plan"]),
        (["--policy", "off", "--split", "0.5"], ["split", "off"]),
        (["--plan", "no/such/plan.json"], ["no/such/plan.json"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_the_model_does_not_allow_is_one_paragraph(run_cli, options, expected):
    assert_failed(run_cli(*options, PROMPT), *expected)
    assert_failed(run_cli("--dry-run", *options), *expected)


@pytest.mark.parametrize(
    "args",
    [
        ["--policy", "mru", "x"],
        ["--prefetch", "maybe", "x"],
        ["--split", "", "x"],
        ["--split", "0.4,", "x"],
        ["--split", "0.4;0.5", "x"],
        ["--split", "1.5", "x"],
        ["--split", "nan", "x"],
        ["--plan", "plan.json", "--expert-budget", "25%", "x"],
        ["--plan", "plan.json", "--policy", "lru", "x"],
        ["--plan", "plan.json", "--split", "0.4", "x"],
        ["--stats", "--json", "x"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(run_cli, args):
    done = run_cli(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: moe-run" in done.stderr
    assert "Error: " in done.stderr


def test_the_help_shows_how_to_give_a_budget(run_cli):
    text = run_cli("--help").stdout
    assert "Expert cache:" in text
    assert "--expert-budget 6GiB" in text.split("Models that do not fit")[1]


# moe-run --stats


def test_the_statistics_follow_the_closing_lines(run_cli, plain):
    done = run_cli("-n", "24", "--expert-budget", "25%", "--stats", PROMPT)
    assert done.returncode == 0
    assert done.stdout == PROMPT + plain["text"] + "\n"
    lines = done.stderr.splitlines()
    assert lines[0].startswith("24 tokens, ")
    assert lines[1].startswith("load ")
    assert " of 18 MiB, resident" in lines[2]
    assert any(line.startswith("experts   policy lcp, prefetch auto") for line in lines)
    assert "% hits" in done.stderr
    assert "disk and memory allow" in done.stderr
    assert max(map(len, lines)) <= 80
    assert "layer" not in done.stderr


def test_the_table_of_the_layers_comes_on_request(run_cli):
    done = run_cli("-q", "-n", "24", "--expert-budget", "25%", "--layer-stats", PROMPT)
    lines = done.stderr.splitlines()
    rows = [line.split()[0] for line in lines[-10:]]
    assert rows == ["layer", *map(str, range(8)), "total"]
    assert lines[-11] == ""
    assert max(map(len, lines)) <= 80


def test_quiet_statistics_have_no_closing_line(run_cli):
    done = run_cli("-q", "-n", "4", "--expert-budget", "25%", "--stats", PROMPT)
    assert done.stderr.startswith("load ")
    assert "experts   policy lcp" in done.stderr
    assert "first token" not in done.stderr


def test_the_statistics_of_a_model_that_fits_say_so(run_cli):
    done = run_cli("-q", "-n", "4", "--stats", PROMPT)
    assert done.stderr.endswith("experts   all in memory.\n")


def test_interactive_answers_are_each_followed_by_statistics(run_cli):
    options = ["-i", "-q", "-n", "4", "--expert-budget", "25%", "--stats"]
    done = run_cli(*options, stdin="import os\nimport sys\n")
    assert done.returncode == 0
    assert done.stderr.count("experts   policy lcp") == 2
    assert done.stderr.count("load ") == 1
