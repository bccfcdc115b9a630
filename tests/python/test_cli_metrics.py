"""moe-metrics as a user runs it: its output, its files, its exit codes."""

import html.parser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from conftest import offline_environment
from safetensors import safe_open
from safetensors.numpy import save_file
from traces import chance_trace, local_trace, random_trace

import moerun
from moerun import Trace, TraceWriter, metrics
from moerun_tools.metrics import main

TABLES = {
    "srp",
    "hit_rate",
    "chance_hit_rate",
    "activation_rates",
    "specialization",
    "load_balance",
    "predictability",
}
FIGURES = {
    "standing",
    "srp_by_segment_length",
    "hit_rate",
    "srp_by_layer",
    "srp_by_domain",
    "activation_rates",
    "srp_by_expert",
    "specialization",
    "load_balance",
    "predictability",
}
PLAIN = {"metrics.json", "report.html", *(f"{name}.parquet" for name in TABLES)}
QUICK = ("--bootstrap", "20")


def command():
    """The installed console script, or the module where the package is not installed."""
    script = Path(sys.executable).with_name("moe-metrics")
    return [str(script)] if script.exists() else [sys.executable, "-m", "moerun_tools.metrics"]


def run(*args, start=None, **environment):
    done = subprocess.run(
        [*(start or command()), *map(str, args)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        env=offline_environment(**environment),
    )
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in done.stderr
    return done


def run_here(*args):
    """In this process, which is faster: nothing but the output is different."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def succeed(*args):
    done = run_here(*args)
    assert done.exit_code == 0, done.stderr
    return done


def assert_failed(done, *expected):
    """One readable line on standard error, nothing on standard output."""
    code = done.exit_code if hasattr(done, "exit_code") else done.returncode
    assert code == 1, done.stderr
    assert not done.stdout
    assert ": error: " in done.stderr
    assert done.stderr.count("\n") == 1
    for text in expected:
        assert text in done.stderr


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return random_trace(
        tmp_path_factory.mktemp("trace") / "first.safetensors",
        domains=["prose", "code", "prose", "code"],
        lengths=(40, 30, 35, 40),
        metadata={"expert_bytes": str(2**20), "engine": "native", "recording": '{"length": 40}'},
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "second.safetensors"
    return random_trace(path, seed=5, lengths=(64, 64), layers=3, experts=12, top_k=3)


@pytest.fixture(scope="module")
def results(trace, tmp_path_factory):
    """The folder of one full run, and the run."""
    folder = tmp_path_factory.mktemp("results") / "out"
    return folder, run(trace, "-o", folder, *QUICK)


def test_one_trace_prints_a_table_and_a_verdict(trace):
    done = succeed(trace, *QUICK)
    opened = Trace.open(trace)
    srp = metrics.srp(opened, (4, 16))
    lines = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
    assert lines["SRP"][1:] == [f"{value:.3f}" for value in srp["srp"]]
    hits = metrics.hit_rate(opened, "lru", level="mean")["hit_rate"]
    assert lines["LRU hit rate (%)"][4:] == [f"{100 * hits[c - 1]:.1f}" for c in (2, 4, 6)]
    verdict = metrics.verdict(opened)
    rows = {line[:25].strip(): line[25:].split() for line in done.stdout.splitlines()}
    assert rows["by chance, same use"] == [f"{value:.3f}" for value in srp["srp_chance"]]
    assert rows["random set (%)"] == ["33.3", "66.7", "100.0"]
    fixed = metrics.hit_rate(opened, "lru", level="mean")["static_hit_rate"]
    assert rows["most used experts (%)"] == [f"{100 * fixed[c - 1]:.1f}" for c in (2, 4, 6)]
    by_chance = metrics.chance_hit_rate(opened).filter(use="same", policy="belady")["hit_rate"]
    assert rows["by chance"] == [f"{100 * by_chance[c - 1]:.1f}" for c in (2, 4, 6)]
    assert done.stdout.count("cache ratio") == 1
    assert f"verdict: {verdict.summary()}" in done.stdout


def test_every_row_of_a_policy_has_chance_below_it(trace):
    lines = succeed(trace, *QUICK).stdout.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(("SCH", "LRU", "LFU", "Belady", "load,")):
            assert lines[number + 1].startswith("  by chance"), line


def test_the_verdict_of_one_trace_says_what_to_cache(tmp_path):
    path = local_trace(tmp_path / "t.safetensors", metadata={"expert_bytes": str(2**20)})
    text = succeed(path, *QUICK).stdout
    verdict = metrics.verdict(Trace.open(path))
    assert f"verdict: {verdict.summary()}" in text
    assert "MiB of " in text and "% by chance; at best " in text


def test_intervals_are_left_out_without_a_bootstrap(trace):
    assert "95% interval" in succeed(trace, *QUICK).stdout
    assert "95% interval" not in succeed(trace, "--bootstrap", "0").stdout


def test_all_files_are_written(results):
    folder, done = results
    assert done.returncode == 0, done.stderr
    pictures = {f"figures/{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    assert names_in(folder) == PLAIN | pictures
    assert f"wrote {len(PLAIN | pictures)} files" in done.stderr
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_tables_hold_what_the_library_computes(results, trace):
    folder, _ = results
    opened = Trace.open(trace)
    srp = pl.read_parquet(folder / "srp.parquet")
    assert srp.columns[0] == "trace" and srp["trace"].unique().to_list() == ["first"]
    assert set(srp["level"]) == {"model", "layer", "expert"}
    assert set(srp["domain"]) == {None, "prose", "code"}
    expected = metrics.srp(opened, (4, 16), "layer", bootstrap=20, by_domain=True)
    assert srp.filter(pl.col("level") == "layer").drop("trace").equals(expected)
    rates = pl.read_parquet(folder / "hit_rate.parquet")
    assert set(rates.select("level", "policy").unique().rows()) == {
        (level, policy)
        for level in ("layer", "mean", "model")
        for policy in ("sch", "lru", "lfu", "belady")
    }
    pool = rates.filter((pl.col("level") == "model") & (pl.col("policy") == "belady"))
    assert pool.drop("trace").equals(metrics.hit_rate(opened, "belady", level="model"))
    for name, options in {
        "specialization": {},
        "load_balance": {"segment_lengths": (4, 16), "by_domain": True},
        "predictability": {"by_domain": True},
    }.items():
        table = pl.read_parquet(folder / f"{name}.parquet").drop("trace")
        assert table.equals(getattr(metrics, name)(opened, **options))


def test_the_summary_holds_the_verdict_the_settings_and_what_was_left_out(results, trace):
    folder, done = results
    value = json.loads((folder / "metrics.json").read_text())
    verdict = metrics.verdict(Trace.open(trace), bootstrap=20).as_dict()
    assert value["traces"][0]["verdict"] == verdict
    assert value["settings"]["segment_lengths"] == [4, 16, 64, 256]
    assert value["settings"]["bootstrap"] == 20
    assert value["versions"]["moerun"] == moerun.__version__
    assert len(value["warnings"]) == 2
    for text, length in zip(value["warnings"], (64, 256), strict=True):
        assert f"windows of {length} tokens are left out" in text
        assert f"moe-metrics: warning: {text}" in done.stderr
        assert text in (folder / "report.html").read_text()


def test_json_is_the_summary_and_nothing_else(results, trace):
    done = succeed(trace, "--json", *QUICK)
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == json.loads((results[0] / "metrics.json").read_text())


def test_the_same_run_writes_the_same_files(results, trace, tmp_path):
    succeed(trace, "-o", tmp_path / "again", "--threads", "1", *QUICK)
    for name in names_in(results[0]):
        assert (tmp_path / "again" / name).read_bytes() == (results[0] / name).read_bytes(), name


def test_several_traces_are_compared_best_first(tmp_path):
    folder = tmp_path / "out"
    # By SRP alone, four experts of which each token uses two would be the better ones.
    paths = [
        chance_trace(tmp_path / "chance.safetensors", 4, 2),
        local_trace(tmp_path / "local.safetensors"),
    ]
    done = succeed(*paths, "-o", folder, "--no-figures", *QUICK)
    verdicts = [metrics.verdict(Trace.open(path)) for path in paths]
    assert verdicts[0].srp > verdicts[1].srp
    verdicts.sort(key=lambda verdict: verdict.srp_gain, reverse=True)
    order = ["local" if verdict.has_locality else "chance" for verdict in verdicts]
    rows = done.stdout.splitlines()
    assert [rows[1].split()[0], rows[2].split()[0]] == order
    table = pl.read_parquet(folder / "predictability.parquet")
    assert table["trace"].unique(maintain_order=True).to_list() == order
    summary = json.loads((folder / "metrics.json").read_text())
    assert [entry["trace"] for entry in summary["traces"]] == order
    report = (folder / "report.html").read_text()
    assert "Of 2 traces, random (local) is the farthest above chance" in report
    assert [rows[index].split()[5:8] for index in (1, 2)] == [
        [f"{verdict.srp_chance:.3f}", verdict.group, verdict.study_group] for verdict in verdicts
    ]
    assert "No cache is recommended." in report
    assert "chance: random suits expert offloading poorly: its routing has no locality" in (
        done.stdout
    )


def test_traces_of_one_name_get_labels_of_their_own(trace, tmp_path):
    (tmp_path / "there").mkdir()
    copy = random_trace(tmp_path / "there" / "first.safetensors", seed=3)
    found = json.loads(succeed(trace, copy, copy, "--json", *QUICK).stdout)["traces"]
    labels = {entry["trace"] for entry in found}
    assert labels == {f"{trace.parent.name}/first", "there/first", "there/first (2)"}


def test_a_set_of_shards_is_one_trace(tmp_path):
    path = tmp_path / "long.safetensors"
    random_trace(path, lengths=(40,) * 6, shard_bytes=400)
    shards = sorted(tmp_path.iterdir())
    assert len(shards) > 1
    results = [succeed(given, "--json", *QUICK) for given in (path, shards[1], tmp_path)]
    for done in results:
        (entry,) = json.loads(done.stdout)["traces"]
        assert entry["trace"] == "long"
        assert entry["num_sequences"] == 6


def test_sequences_below_16_tokens_get_no_verdict_but_all_else(tmp_path):
    path = random_trace(tmp_path / "short.safetensors", lengths=(8, 9, 8))
    done = succeed(path, "-o", tmp_path / "out", *QUICK)
    assert "verdict: none" in done.stdout
    assert "no verdict on short" in done.stderr
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert summary["traces"][0]["verdict"] is None
    assert {row["segment_length"] for row in summary["traces"][0]["srp"]} == {4}
    assert "figures/hit_rate.svg" in names_in(tmp_path / "out")
    assert "figures/standing.svg" not in names_in(tmp_path / "out")


def test_sequences_shorter_than_every_window_leave_the_caches(tmp_path):
    path = random_trace(tmp_path / "tiny.safetensors", lengths=(2, 3))
    done = succeed(path, "-o", tmp_path / "out", *QUICK)
    assert "SRP" not in done.stdout
    assert "LRU hit rate" in done.stdout
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Consistency by segment length: No sequence is as long as a window." in report


def spoiled(path, change):
    """Rewrite a trace after `change(tensors, metadata)`."""
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        values = dict(file.metadata())
    change(tensors, values)
    save_file(tensors, path, values)
    return path


def _out_of_range(tensors, _):
    tensors["expert_ids"][1, 0, 3, 1] = 200


def _twice(tensors, _):
    tensors["expert_ids"][2, 1, 5] = 3


def _too_long(tensors, _):
    tensors["lengths"][1] = 1000


def _other_type(tensors, _):
    tensors["expert_ids"] = tensors["expert_ids"].astype(np.float32)


def _other_format(_, values):
    values["format"] = "something"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_out_of_range, ["expert_ids[1, 0, 3, 1]", "200"]),
        (_twice, ["expert_ids[2, 1, 5"]),
        (_too_long, ["lengths[1]", "1000"]),
        (_other_type, ["expert_ids", "F32"]),
        (_other_format, ["something"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_trace_is_named_and_nothing_is_written(tmp_path, trace, change, expected):
    path = spoiled(random_trace(tmp_path / "bad.safetensors"), change)
    done = run_here(trace, path, "-o", tmp_path / "out", *QUICK)
    assert_failed(done, "bad.safetensors", *expected)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.safetensors"]


def test_what_is_no_trace_is_an_error(tmp_path):
    assert_failed(run(tmp_path / "absent.safetensors"), "absent.safetensors")
    assert_failed(run_here(tmp_path), str(tmp_path))
    (tmp_path / "text.safetensors").write_text("not a safetensors file")
    assert_failed(run_here(tmp_path / "text.safetensors"), "text.safetensors")


def test_a_folder_with_other_files_is_left_alone(tmp_path, trace):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    done = run_here(trace, "-o", folder, "--no-figures", *QUICK)
    assert_failed(done, "notes.txt", "--overwrite")
    assert names_in(folder) == {"notes.txt"}
    succeed(trace, "-o", folder, "--no-figures", "--overwrite", *QUICK)
    assert names_in(folder) == PLAIN | {"notes.txt"}
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_report_that_is_not_ours_is_not_replaced(tmp_path, trace):
    (tmp_path / "report.html").write_text("of another program")
    assert_failed(run_here(trace, "-o", tmp_path, *QUICK), "report.html")
    assert (tmp_path / "report.html").read_text() == "of another program"


def test_earlier_results_are_replaced(tmp_path, trace, other):
    folder = tmp_path / "out"
    succeed(trace, "-o", folder, "--format", "png", *QUICK)
    assert "figures/hit_rate.png" in names_in(folder)
    succeed(other, "-o", folder, "--format", "svg", *QUICK)
    kinds = {Path(name).suffix for name in names_in(folder) if name.startswith("figures/")}
    assert kinds == {".svg"}
    assert "second" in (folder / "report.html").read_text()
    succeed(other, "-o", folder, "--no-figures", *QUICK)
    assert {path.name for path in folder.iterdir()} == PLAIN


def test_an_empty_folder_is_filled_and_missing_ones_are_made(tmp_path, trace):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "not" / "yet" / "there"):
        succeed(trace, "-o", folder, "--no-figures", *QUICK)
        assert names_in(folder) == PLAIN


def test_an_output_that_can_be_no_folder_is_refused_before_the_work(tmp_path, trace):
    (tmp_path / "file").write_text("")
    assert_failed(run_here(trace, "-o", tmp_path / "file"), "file")
    assert_failed(run_here(trace, "-o", tmp_path / "file" / "out"), "file")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    assert_failed(run_here(trace, "-o", tmp_path / "link"), "link to nothing")


def started_with(code):
    """A command line that runs some code first, then moe-metrics."""
    return [
        sys.executable,
        "-c",
        f"{code}\nfrom moerun_tools.metrics import main\nmain(prog_name='moe-metrics')",
    ]


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (
            "import moerun_tools.report_html as r\n"
            "def stop(*a): raise KeyboardInterrupt\n"
            "r.report = stop",
            130,
        ),
        (
            "from pathlib import Path\n"
            "def full(self, data): raise OSError(28, 'No space left on device')\n"
            "Path.write_bytes = full",
            1,
        ),
    ],
    ids=["Ctrl-C", "full disk"],
)
def test_nothing_half_written_stays(tmp_path, trace, code, exit_code):
    done = run(trace, "-o", tmp_path / "out", *QUICK, "--no-figures", start=started_with(code))
    assert done.returncode == exit_code, done.stderr
    assert not done.stdout
    assert list(tmp_path.iterdir()) == []
    if exit_code == 1:
        assert "No space left on device" in done.stderr


def test_without_figures_matplotlib_is_not_needed(tmp_path, trace):
    (tmp_path / "path" / "matplotlib").mkdir(parents=True)
    (tmp_path / "path" / "matplotlib" / "__init__.py").write_text("raise ImportError('broken')")
    there = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join([str(tmp_path / "path"), *filter(None, [there])])
    done = run(trace, "-o", tmp_path / "out", "--no-figures", *QUICK, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" not in report
    assert "switched off by --no-figures" in report


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["t", "--segment-lengths", "4,x"],
        ["t", "--segment-lengths", "0"],
        ["t", "--segment-lengths", ""],
        ["t", "--segment-lengths", "2000000"],
        ["t", "--bootstrap", "-1"],
        ["t", "--threads", "0"],
        ["t", "-o", ""],
        ["t", "-o", "out", "--format", "gif"],
        ["t", "--format", "png"],
        ["t", "--no-figures"],
        ["t", "--overwrite"],
        ["t", "-o", "out", "--no-figures", "--format", "png"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(args):
    done = run_here(*args)
    assert done.exit_code == 2
    assert not done.stdout
    assert "Usage: " in done.stderr


def test_help_names_every_option_and_gives_examples():
    text = succeed("--help").stdout
    for param in main.params:
        for name in getattr(param, "opts", []):
            assert name in text or param.param_type_name == "argument"
    assert "Examples:" in text and "-o results" in text
    assert succeed("--version").stdout == f"moe-metrics {moerun.__version__}\n"


def test_quiet_says_only_what_matters(trace, tmp_path):
    done = succeed(trace, "-q", "-o", tmp_path / "out", "--no-figures", *QUICK)
    assert "verdict" in done.stdout
    assert all(line.startswith("moe-metrics: warning: ") for line in done.stderr.splitlines())


class Page(html.parser.HTMLParser):
    """Collects what a browser would load, and checks that elements are closed."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.open, self.tags = [], [], [], set()
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                self.links.append((tag, value))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_file_that_loads_nothing(results):
    text = (results[0] / "report.html").read_text()
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    for tag, target in page.links:
        assert target.startswith(("#", "data:image/png;base64,")) or tag == "a"
    for address in re.findall(r"url\(([^)]*)\)", text):
        assert address.startswith("#")
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert len(text) < 2_000_000


def test_the_pictures_in_the_report_have_ids_of_their_own(results):
    page = Page((results[0] / "report.html").read_text())
    assert len(page.ids) == len(set(page.ids))
    for _, target in page.links:
        assert not target.startswith("#") or target[1:] in page.ids


def test_the_report_says_what_the_numbers_say(results, trace):
    page = Page((results[0] / "report.html").read_text())
    verdict = metrics.verdict(Trace.open(trace), bootstrap=20)
    text = " ".join(page.text.split())
    assert f"SRP at 16 tokens is {verdict.srp:.3f}" in text
    assert f"as often would have {verdict.srp_chance:.3f}" in text
    assert "arXiv 2505.16056" in text
    assert "recording: length" in text  # how the trace was recorded
    assert "64 tokens are left out" in text
    assert f"by chance {verdict.srp_chance:.3f}, with even use" in text


def test_the_report_says_what_a_cache_brings(tmp_path):
    path = local_trace(tmp_path / "t.safetensors", metadata={"expert_bytes": str(2**20)})
    succeed(path, "-o", tmp_path / "out", "--no-figures", *QUICK)
    text = " ".join(Page((tmp_path / "out" / "report.html").read_text()).text.split())
    verdict = metrics.verdict(Trace.open(path))
    assert f"A cache for {verdict.capacity} of the 12 experts in each layer" in text
    assert f"{verdict.capacity * 2} MiB instead of 24 MiB" in text
    assert f"by chance it would be {verdict.chance_hit_rate:.0%}" in text


@pytest.mark.parametrize("count", [1, 2], ids="{} traces".format)
def test_an_objection_stands_in_place_of_the_verdict_everywhere(trace, tmp_path, count):
    def rename(_, values):
        values["model"] = "tiny (random weights)"

    path = tmp_path / "r.safetensors"
    path.write_bytes(trace.read_bytes())
    spoiled(path, rename)
    objections = metrics.verdict(Trace.open(path)).objections
    assert len(objections) == 2
    paths = [path, local_trace(tmp_path / "local.safetensors")][:count]
    done = succeed(*paths, "-o", tmp_path / "out", "--no-figures", *QUICK)
    name = "verdict" if count == 1 else "r"
    expected = f"{name}: no verdict on tiny (random weights). {' '.join(objections)}\n"
    assert done.stdout.endswith(expected)
    assert ("no verdict" in done.stdout.split("\n\n")[0]) == (count == 2)
    text = " ".join(Page((tmp_path / "out" / "report.html").read_text()).text.split())
    assert " ".join(objections) in text
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())
    found = summary["traces"][-1]["verdict"]
    assert (found["group"], found["objections"]) == (None, list(objections))


def test_no_written_file_names_a_folder_of_the_machine(tmp_path):
    secret = tmp_path / "home" / "alice smith"
    secret.mkdir(parents=True)
    settings = {"cache": {"plan": f"{secret}/plan.json"}, "model_files": "0f0f"}
    path = random_trace(
        secret / "t.safetensors",
        lengths=(40, 40),
        model=f"{secret}/models/tiny",
        metadata={
            "source": f"{secret}/dump",
            "note": f"from '{tmp_path}/home/x', see https://example.org/a/b",
            "recording": json.dumps(settings),
        },
    )
    copy = secret / "other" / "t.safetensors"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    done = succeed(path, copy, "-o", tmp_path / "out", *QUICK)
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(written) > 20
    for file in written:
        data = file.read_bytes()
        assert str(tmp_path).encode() not in data, file.name
        assert b"/home/" not in data, file.name
    assert str(tmp_path) not in done.stdout
    report = (tmp_path / "out" / "report.html").read_text()
    assert "plan plan.json" in report and "<td>dump</td>" in report
    assert "https://example.org/a/b" in report
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {name for entry in summary["traces"] for name in entry["files"]} == {"t.safetensors"}
    assert {entry["model"] for entry in summary["traces"]} == {"tiny"}


def test_the_pictures_of_the_report_fit_a_narrow_page(results):
    style = (results[0] / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    (rule,) = re.findall(r"^figure svg {([^}]*)}", style, re.MULTILINE)
    assert "max-width: 100%" in rule and "min-width" not in rule


def test_a_report_on_one_trace_calls_it_by_its_model(results):
    text = Page((results[0] / "report.html").read_text()).text
    assert "There is no verdict on random." in text
    svg = (results[0] / "figures" / "standing.svg").read_text()
    assert "random  0." in svg and "first" not in svg


def test_one_sequence_of_one_layer_is_written_in_the_singular(tmp_path):
    path = random_trace(tmp_path / "t.safetensors", lengths=(20,), layers=1)
    heading = succeed(path, "-o", tmp_path / "out", "--no-figures", "--bootstrap", "0").stdout
    assert "1 layer of 6 experts" in heading
    assert "1 sequence of 20 tokens, 20 tokens in all" in heading
    report = (tmp_path / "out" / "report.html").read_text()
    assert "(1 row)" in report and "(1 rows)" not in report


HOSTILE = ["<script>alert(1)</script>", "$x_{1$", "\x1b[31mred\x00", "日本語", "{{ 7 * 7 }}", ""]


def test_names_from_a_trace_cannot_do_anything(tmp_path):
    path = tmp_path / "odd.safetensors"
    random_trace(
        path,
        lengths=(20,) * 6,
        domains=HOSTILE,
        metadata={"recording": '{"</table>": ["<img src=x>"]}', "engine": "</style><b>"},
    )

    def rename(_, values):
        values["model"] = "<i>\x1b[2J\u202emodel</i>\n" + "x" * 5000

    done = succeed(spoiled(path, rename), "-o", tmp_path / "out", *QUICK)
    for text in (done.stdout, done.stderr, (tmp_path / "out" / "report.html").read_text()):
        assert "\x1b" not in text and "\x00" not in text and "\u202e" not in text
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert not page.tags & {"script", "img", "i", "b"}
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    table = pl.read_parquet(tmp_path / "out" / "srp.parquet")
    assert set(table["domain"].drop_nulls()) == set(HOSTILE)


def test_the_shipped_model_at_paper_settings_runs_end_to_end(model, tokenizer, tmp_path):
    """Sequences of 512 tokens of two domains, all four segment lengths."""
    source = Path(subprocess.__file__).read_text() + Path(html.parser.__file__).read_text()
    prose = " ".join(re.findall(r"[A-Za-z]{2,}", source)) * 2
    path = tmp_path / "shipped.safetensors"
    config = model.config
    with TraceWriter(
        path,
        model="tiny-olmoe",
        num_experts=config["num_experts"],
        top_k=config["top_k"],
        moe_layers=model.moe_layers,
    ) as writer:
        for domain, text in (("code", source), ("words", prose)):
            ids = tokenizer.encode(text)
            for first in range(0, 3 * 512, 512):
                part = ids[first : first + 512]
                writer.append(model.trace(part, with_predictions=True), domain)
    done = succeed(path, "-o", tmp_path / "out", "--bootstrap", "100")
    assert not done.stderr.count("warning")
    assert {f"figures/{name}.png" for name in FIGURES} <= names_in(tmp_path / "out")
    srp = pl.read_parquet(tmp_path / "out" / "srp.parquet").filter(pl.col("level") == "model")
    whole = srp.filter(pl.col("domain").is_null()).sort("segment_length")
    assert whole["segment_length"].to_list() == [4, 16, 64, 256]
    assert (whole["ci_low"] < whole["srp"]).all() and (whole["srp"] < whole["ci_high"]).all()
    assert whole["srp"].is_between(0.25, 0.75).all()
