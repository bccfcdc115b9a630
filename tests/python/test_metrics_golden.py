"""SRP and hit rates against what the study's own functions give (shared/golden)."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import moerun

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
TOLERANCE = 1e-6  # the references are sums in float32
native = moerun._moerun


@pytest.fixture(params=["a", "b"], scope="module")
def golden(request):
    if not GOLDEN.is_dir():
        pytest.skip("the golden traces are not here")
    with safe_open(GOLDEN / f"{request.param}.safetensors", "np") as file:
        ids = file.get_tensor("expert_ids").astype(np.uint16)
        num_experts = int(file.metadata()["num_experts"])
    return ids, num_experts, json.loads((GOLDEN / f"{request.param}.json").read_text())


def counts_of(ids, num_experts, length):
    """Window counts of shape (L, E, length + 1), summed over sequences."""
    return sum(
        np.stack([native.activation_counts(layer, num_experts, length) for layer in sequence])
        for sequence in ids
    )


def assert_srp(histogram, expected, index=...):
    found = native.srp(histogram)
    pick = {name: np.asarray(value)[index].item() for name, value in expected.items()}
    assert found["threshold"] == pick["alpha"]
    assert found["srp"] == pytest.approx(pick["srp"], abs=TOLERANCE)
    assert found["cache_ratio"] == pytest.approx(pick["rho_hat"], rel=TOLERANCE)
    if "act_rate" in pick:
        assert found["activation_rate"] == pytest.approx(pick["act_rate"], abs=TOLERANCE)


@pytest.mark.parametrize("length", [4, 16, 64, 256])
def test_srp_of_model_layers_and_experts(golden, length):
    ids, num_experts, expected = golden
    counts = counts_of(ids, num_experts, length)
    results = expected["srp"][str(length)]
    assert_srp(counts.sum(axis=(0, 1)), results["model"])
    for layer, of_layer in enumerate(counts):
        assert_srp(of_layer.sum(axis=0), results["layer"], layer)
        for expert, of_expert in enumerate(of_layer):
            assert_srp(of_expert, results["expert"], (layer, expert))


def mean_hit_rates(sequences, num_experts, policy, length=16):
    """Mean over sequences of the hit rate at capacity 1, 2, ..."""
    return np.mean(
        [
            native.hits_by_capacity(ids, num_experts, policy, length)[1:] / ids.size
            for ids in sequences
        ],
        axis=0,
    )


def test_hit_rates_of_layers(golden):
    ids, num_experts, expected = golden
    for layer in range(ids.shape[1]):
        sequences = [np.ascontiguousarray(sequence[layer]) for sequence in ids]
        for policy, rates in expected["chr_layer"][str(layer)].items():
            found = mean_hit_rates(sequences, num_experts, policy)
            np.testing.assert_allclose(found, rates, atol=TOLERANCE)
        for length, rates in expected["sch_layer"][str(layer)].items():
            found = mean_hit_rates(sequences, num_experts, "sch", int(length))
            np.testing.assert_allclose(found, rates, atol=TOLERANCE)


def test_hit_rates_of_one_pool_over_all_layers(golden):
    ids, num_experts, expected = golden
    num_layers = ids.shape[1]
    offsets = (np.arange(num_layers, dtype=np.uint16) * num_experts)[:, None, None]
    pools = [
        np.ascontiguousarray((sequence + offsets).transpose(1, 0, 2).reshape(ids.shape[2], -1))
        for sequence in ids
    ]
    size = num_layers * num_experts
    for policy, rates in expected["chr_model"].items():
        found = mean_hit_rates(pools, size, policy)
        np.testing.assert_allclose(found, rates, atol=TOLERANCE)
    for length, rates in expected["sch_model"].items():
        found = mean_hit_rates(pools, size, "sch", int(length))
        np.testing.assert_allclose(found, rates, atol=TOLERANCE)
