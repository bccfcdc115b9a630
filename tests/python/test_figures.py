"""Figures of moe-metrics: they show the numbers of the tables, in any trace and on any page."""

import io
import itertools
import math
import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from traces import chance_trace, local_trace, random_trace

from moerun import Trace
from moerun.metrics import independent_variation
from moerun_tools.figures import FIGURES, inline_svg, render
from moerun_tools.figures.srp import MOST_DOMAINS
from moerun_tools.figures.style import MOST_PANELS, POLICY_COLOURS, figure_style, spread
from moerun_tools.metrics_compute import Progress, Settings, compute
from moerun_tools.metrics_published import GROUPS, PUBLISHED, neighbours
from moerun_tools.metrics_results import (
    POLICIES,
    best_first,
    clean_text,
)
from moerun_tools.palette import DARK, LIGHT
from moerun_tools.units import as_binary


def measured(path, label="trace", lengths=(4, 16)):
    with Progress(0, quiet=True) as progress:
        settings = Settings(segment_lengths=lengths, bootstrap=20)
        return compute(label, Trace.open(path), settings, progress, with_details=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "one.safetensors"
    random_trace(
        path,
        lengths=(40,) * 4,
        layers=3,
        experts=12,
        top_k=3,
        domains=["prose", "code"] * 2,
        metadata={"expert_bytes": str(2**27)},
    )
    return measured(path, "one")


@pytest.fixture(scope="module")
def many(tmp_path_factory, one):
    """More traces than fit in the panels of a picture, of different sizes."""
    folder = tmp_path_factory.mktemp("many")
    results = [one]
    for number in range(MOST_PANELS + 1):
        path = folder / f"{number}.safetensors"
        random_trace(
            path,
            seed=number,
            lengths=(30, 30),
            layers=1 + number % 3,
            experts=6 + number,
            domains=["prose", "code"],
        )
        results.append(measured(path, f"number {number}"))
    return best_first(results)


def drawn(name, results):
    with figure_style():
        figure = FIGURES[name](results)
        figure.draw_without_rendering()
    return figure


def texts(figure):
    return {text.get_text() for text in figure.findobj(matplotlib.text.Text)}


def lines_of(axes, colour):
    return [line for line in axes.get_lines() if line.get_color() == colour]


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("count", [1, MOST_PANELS + 2], ids="{} traces".format)
def test_every_figure_is_drawn_as_png_and_svg_and_says_what_it_shows(name, count, one, many):
    results = [one] if count == 1 else many[:count]
    if name == "srp_by_domain":
        results = [one, *(result for result in results if result is not one)]
    files = render(name, results, ("png", "svg"))
    image = Image.open(io.BytesIO(files["png"]))
    assert image.width >= 1000
    root = ET.fromstring(files["svg"])
    assert root.tag.endswith("svg")
    figure = drawn(name, results)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert figure.get_suptitle() or any(titles)
    for axes in figure.axes:
        if axes.get_visible() and axes.get_label() != "<colorbar>":
            assert axes.get_xlabel() or name == "srp_by_domain"


def test_the_line_by_segment_length_is_the_table(one):
    axes = drawn("srp_by_segment_length", [one]).axes[0]
    frame = one.srp("model")
    line, chance = lines_of(axes, LIGHT["blue"])
    for drawn_line, column in ((line, "srp"), (chance, "srp_chance")):
        assert drawn_line.get_xdata().tolist() == frame["segment_length"].to_list()
        assert drawn_line.get_ydata().tolist() == frame[column].to_list()
    assert not line.is_dashed() and chance.is_dashed()
    low, high = axes.get_ylim()
    assert low < min(frame["ci_low"]) and max(frame["ci_high"]) < high


def test_the_hit_rates_are_the_table_and_the_knee_is_the_verdict(tmp_path):
    path = tmp_path / "t.safetensors"
    local_trace(path, layers=3, metadata={"expert_bytes": str(2**27)})
    result = measured(path)
    figure = drawn("hit_rate", [result])
    axes = figure.axes[0]
    for policy in POLICIES:
        (line,) = [line for line in axes.get_lines() if line.get_gid() == policy]
        assert line.get_color() == POLICY_COLOURS[policy]
        assert line.get_ydata().tolist() == result.hit_rates(policy)["hit_rate"].to_list()
    for column in ("random_hit_rate", "static_hit_rate"):
        (line,) = [line for line in axes.get_lines() if line.get_gid() == column]
        assert list(line.get_ydata()[1:]) == result.hit_rates("lru")[column].to_list()
    verdict = result.verdict
    assert verdict.advice == "cache"
    (dot,) = [line for line in lines_of(axes, LIGHT["blue"]) if line.get_marker() == "o"]
    assert dot.get_xdata() == [verdict.capacity / 3]
    assert dot.get_ydata() == [verdict.sch_hit_rate]
    assert any(f"knee of SCH: {verdict.capacity} expert" in text for text in texts(figure))
    assert any("4.5 GiB" in text for text in texts(figure))  # 3 layers, 12 experts, 128 MiB each


def test_the_map_of_use_goes_from_most_to_least_used(one):
    (image, *_) = drawn("activation_rates", [one]).axes[0].get_images()
    grid = np.ma.filled(image.get_array(), np.nan)
    assert grid.shape == (12, 3)
    assert (np.diff(grid, axis=0) <= 0).all()
    rates = one.activation_rates().filter(pl.col("layer") == 1)["activation_rate"]
    expected = np.log2(np.sort(rates.to_numpy())[::-1] / 0.25)
    np.testing.assert_allclose(grid[:, 1], np.maximum(expected, -3))


def test_the_map_of_srp_has_the_same_order(one):
    (image, *_) = drawn("srp_by_expert", [one]).axes[0].get_images()
    grid = np.ma.filled(image.get_array(), np.nan)
    rates = one.activation_rates().filter(pl.col("layer") == 2)
    order = rates.sort("activation_rate", descending=True, maintain_order=True)["expert"]
    srp = one.srp("expert", 16).filter(pl.col("layer") == 2)["srp"].to_numpy()
    assert grid[:, 2].tolist() == srp[order.to_numpy()].tolist()


def test_the_lines_of_token_specialisation_are_medians_like_the_table(tmp_path):
    path = tmp_path / "t.safetensors"
    random_trace(path, lengths=(200, 200), layers=3, domains=["a", "b"])  # ids come often enough
    result = measured(path)
    axes = drawn("specialization", [result]).axes[1]
    frame = result.specialization("input_vocabulary")
    middle = frame.group_by("layer").agg(pl.col("input_vocabulary").median()).sort("layer")
    line, chance = lines_of(axes, LIGHT["blue"])
    assert line.get_ydata().tolist() == middle["input_vocabulary"].to_list()
    assert chance.is_dashed()


def test_domains_stand_from_the_highest_to_the_lowest(one):
    axes = drawn("srp_by_domain", [one]).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == one.srp_by_domain(16)["domain"].to_list()
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is at the top


def test_of_many_domains_the_highest_and_lowest_are_shown(tmp_path):
    names = [f"domain {number}" for number in range(MOST_DOMAINS + 5)]
    path = random_trace(tmp_path / "t.safetensors", lengths=(20,) * len(names), domains=names)
    figure = drawn("srp_by_domain", [measured(path)])
    assert len(figure.axes[0].get_yticks()) == MOST_DOMAINS
    assert "highest and lowest" in figure.get_suptitle()


def test_more_traces_than_panels_show_the_best(many):
    for name in ("srp_by_layer", "activation_rates", "predictability", "specialization"):
        found = texts(drawn(name, many))
        shown = [result.label for result in many if result.label in found]
        assert shown == [result.label for result in many[:MOST_PANELS]]


def test_all_traces_share_the_pictures_that_compare(many):
    for name in ("standing", "srp_by_segment_length", "hit_rate", "load_balance"):
        found = " ".join(texts(drawn(name, many)))
        assert all(result.label in found for result in many)


def test_what_was_not_measured_is_not_drawn(tmp_path):
    path = random_trace(tmp_path / "short.safetensors", lengths=(3, 3))
    result = measured(path)
    absent = {name for name in FIGURES if render(name, [result], ("svg",)) is None}
    assert absent == {
        "standing",
        "srp_by_segment_length",
        "srp_by_layer",
        "srp_by_domain",
        "srp_by_expert",
        "load_balance",
        "specialization",  # no token id comes often enough, and there is one domain
    }


def test_the_groups_are_shaded_only_where_they_are_defined(one, tmp_path):
    assert "suits offloading" in texts(drawn("srp_by_segment_length", [one]))
    path = random_trace(tmp_path / "t.safetensors")
    elsewhere = measured(path, lengths=(4, 8))
    assert "suits offloading" not in texts(drawn("srp_by_segment_length", [elsewhere]))
    assert elsewhere.reference_length == 8


def test_no_knee_is_drawn_where_no_cache_is_recommended(tmp_path):
    path = chance_trace(tmp_path / "t.safetensors", 8, 2)
    axes = drawn("hit_rate", [measured(path)]).axes[0]
    assert not [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert not [text for text in texts(axes.figure) if "knee" in text]


def test_the_traces_stand_where_srp_is_and_dotted_lines_come_from_chance(one, many):
    for results in ([one], many):
        axes = drawn("standing", results).axes[0]
        ends = [
            tuple(line.get_xdata())
            for line in axes.get_lines()
            if line.get_linestyle() not in ("-", "None") and len(line.get_xdata()) == 2
        ]
        verdicts = [result.verdict for result in results]
        assert ends == [(verdict.srp_chance, verdict.srp) for verdict in verdicts]
        low, high = axes.get_xlim()
        assert all(low < value < high for pair in ends for value in pair)


def test_the_names_of_many_traces_stay_inside_the_picture(many):
    figure = drawn("standing", many)
    width = figure.bbox.width
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= width, text.get_text()


def test_the_dotted_line_of_chance_is_near_random_routing():
    random = np.random.default_rng(0)
    share, length = 3 / 12, 16
    counts = np.zeros((2000, 12))
    for window in counts:
        for _ in range(length):
            window[random.permutation(12)[:3]] += 1
    variation = (counts.std(axis=1) / counts.mean()).mean()
    assert variation == pytest.approx(independent_variation(share, length), rel=0.03)


def test_inline_pictures_have_no_fixed_colour_of_the_theme(one):
    for name in FIGURES:
        svg = render(name, [one], ("svg",))["svg"]
        text = inline_svg(name, svg)
        assert text.startswith("<svg")
        for value in LIGHT.values():
            assert value not in re.sub(r"<image.*?/>", "", text, flags=re.DOTALL)
        assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(LIGHT)
        ids = re.findall(r'\bid="([^"]*)"', text)
        assert len(ids) == len(set(ids))
        assert all(identifier.startswith(f"{name}-") for identifier in ids)
        for target in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', text):
            assert "".join(target) in ids


def test_a_picture_does_not_depend_on_the_settings_of_the_user(one):
    expected = render("hit_rate", [one], ("png",))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        assert render("hit_rate", [one], ("png",)) == expected
        assert dict(matplotlib.rcParams) == before


def test_any_name_can_be_drawn(one, recwarn):
    names = ["$x_{1$", "<b>&amp;", "日本語", "\\frac", "%s {0}", "a" * 500]
    results = [type(one)(clean_text(name), one.facts, one.verdict, one.tables) for name in names]
    for figure in FIGURES:
        root = ET.fromstring(render(figure, results, ("svg",))["svg"])
        shown = "".join(root.itertext())
        assert all(name[:20] in shown for name in names)
    assert not [str(each.message) for each in recwarn if "Glyph" in str(each.message)]


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.01, 0.3))
def test_labels_are_spread_apart_in_their_order(values, gap):
    places = spread(values, gap)
    order = sorted(range(len(values)), key=lambda index: (values[index], index))
    for before, after in itertools.pairwise(order):
        assert places[after] - places[before] >= gap - 1e-9
    if values:
        assert sum(places) == pytest.approx(sum(values), abs=1e-6)


def test_labels_that_are_apart_stay_where_they_are():
    assert spread([0.9, 0.1, 0.5], 0.2) == pytest.approx([0.9, 0.1, 0.5])
    assert spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])


def contrast(first, second):
    """The contrast ratio of two colours, as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_lines_can_be_read_in_both_themes(theme):
    assert set(theme) == set(LIGHT)
    for name in ("ink", "muted"):
        for behind in ("surface", "zone-1", "zone-2", "zone-3", "zone-4"):
            assert contrast(theme[name], theme[behind]) >= 4.0, (name, behind)
    for name in ("blue", "orange", "green", "purple", "ochre", "sky"):
        assert contrast(theme[name], theme["surface"]) >= 3.0, name


def test_groups_and_neighbours_are_those_of_the_study():
    assert [group.lowest for group in GROUPS] == [0.5, 0.45, 0.35, 0]
    assert [model.srp for model in PUBLISHED] == sorted(
        (model.srp for model in PUBLISHED), reverse=True
    )
    above, below = neighbours(0.44)
    assert (above.name, below.name) == ("Mixtral-8x7B", "DeepSeek-V2-Lite")
    assert neighbours(0.9) == (None, PUBLISHED[0])
    assert neighbours(0.1) == (PUBLISHED[-1], None)


def test_sizes_are_given_in_binary_units():
    assert [as_binary(size) for size in (None, 0, 1023, 1536, 2**20, 3 * 2**29)] == [
        "-",
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1 MiB",
        "1.5 GiB",
    ]
    assert as_binary(math.pow(2, 41)) == "2.0 TiB"
    assert as_binary(1000 * 2**20) == "1000 MiB"


@given(st.text(max_size=80))
def test_a_cleaned_name_is_one_printable_line(text):
    cleaned = clean_text(text, 30)
    assert cleaned and len(cleaned) <= 30
    assert cleaned.isprintable()
    assert clean_text(cleaned, 30) == cleaned
