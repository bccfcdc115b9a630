"""Every figure of SRP and hit rate against stored ones: of the study's own functions where its
golden traces are at hand, and of our brute-force loops (tests/data, made by make_goldens.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

from moerun import Trace, metrics

STUDY = Path(__file__).parents[3] / "shared" / "golden"
OWN = Path(__file__).parents[1] / "data"
TOLERANCE = 1e-6  # the study's references are sums in float32
SEGMENT_LENGTHS = (4, 16, 64, 256)


@pytest.fixture(params=[STUDY / "a", STUDY / "b", OWN / "routing"], ids=lambda path: path.name)
def golden(request):
    file = request.param.with_suffix(".json")
    if not file.is_file():
        pytest.skip("the study's golden traces are not here")
    return Trace.open(request.param.with_suffix(".safetensors")), json.loads(file.read_text())


@pytest.mark.filterwarnings("ignore::moerun.errors.MoerunWarning")
@pytest.mark.parametrize("level", ["model", "layer", "expert"])
def test_srp(golden, level):
    trace, expected = golden
    frame = metrics.srp(trace, SEGMENT_LENGTHS, level)
    lengths = sorted(map(int, expected["srp"]))
    assert frame["segment_length"].unique().sort().to_list() == lengths
    for m in lengths:
        found = frame.filter(segment_length=m)
        wanted = {name: np.ravel(value) for name, value in expected["srp"][str(m)][level].items()}
        assert found["threshold"].to_list() == wanted["alpha"].tolist()
        np.testing.assert_allclose(found["srp"], wanted["srp"], atol=TOLERANCE)
        np.testing.assert_allclose(found["cache_ratio"], wanted["rho_hat"], rtol=TOLERANCE)
        if "act_rate" in wanted:
            np.testing.assert_allclose(found["activation_rate"], wanted["act_rate"], atol=TOLERANCE)


def test_hit_rates_of_layers(golden):
    trace, expected = golden
    for policy in ("lru", "lfu", "belady"):
        found = metrics.hit_rate(trace, policy)
        for layer in trace.moe_layers:
            np.testing.assert_allclose(
                found.filter(layer=layer)["hit_rate"],
                expected["chr_layer"][str(layer)][policy],
                atol=TOLERANCE,
            )
    for m in SEGMENT_LENGTHS:
        found = metrics.hit_rate(trace, "sch", m)
        for layer in trace.moe_layers:
            rates = expected["sch_layer"][str(layer)].get(str(m))
            if rates is not None:
                np.testing.assert_allclose(
                    found.filter(layer=layer)["hit_rate"], rates, atol=TOLERANCE
                )


def test_hit_rates_of_one_pool_over_all_layers(golden):
    trace, expected = golden
    for policy, rates in expected["chr_model"].items():
        found = metrics.hit_rate(trace, policy, level="model")
        np.testing.assert_allclose(found["hit_rate"], rates, atol=TOLERANCE)
    for m, rates in expected["sch_model"].items():
        found = metrics.hit_rate(trace, "sch", int(m), "model")
        np.testing.assert_allclose(found["hit_rate"], rates, atol=TOLERANCE)
