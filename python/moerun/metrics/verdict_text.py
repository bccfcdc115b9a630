"""The verdict in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moerun.metrics.suitability import Verdict

_SENTENCES = {
    "suits": "suits expert offloading",
    "usable": "can be offloaded, with some loss",
    "poor": "suits expert offloading poorly",
    "unsuitable": "does not suit expert offloading",
}


def summary_of(verdict: Verdict) -> str:
    """Return the verdict in a few sentences, or why there is none."""
    if verdict.group is None:
        return f"no verdict on {verdict.model}. {' '.join(verdict.objections)}"
    return f"{verdict.model} {_group_sentence(verdict)} {_advice_sentence(verdict)}"


def over_chance(verdict: Verdict) -> str:
    """Return how far SRP is from chance: "5.7 points over chance"."""
    gain = round(100 * verdict.srp_gain, 1)
    return f"{abs(gain):.1f} points {'under' if gain < 0 else 'over'} chance"


def hits_sentence(verdict: Verdict) -> str:
    """Return what the cache finds, beside chance and the best: "60% hits with LRU (...)"."""
    hits = [f"{verdict.lru_hit_rate:.0%} hits with LRU"]
    if round(verdict.lfu_hit_rate, 2) > round(verdict.lru_hit_rate, 2):
        hits.append(f"{verdict.lfu_hit_rate:.0%} with LFU")
    return (
        f"{', '.join(hits)} ({verdict.chance_hit_rate:.0%} by chance; at best "
        f"{verdict.best_hit_rate:.0%})"
    )


def _group_sentence(verdict: Verdict) -> str:
    assert verdict.group is not None
    srp = f"SRP {verdict.srp:.1%} at {verdict.segment_length} tokens, {over_chance(verdict)}"
    sentence = _SENTENCES[verdict.group]
    if verdict.has_locality:
        return f"{sentence}: {srp}."
    study = (
        ""
        if verdict.study_group == verdict.group
        else f" (the study's group: {verdict.study_group})"
    )
    if verdict.advice == "static":
        return f"has uneven routing, but no locality: {srp}{study}."
    return f"{sentence}: its routing has no locality. {srp}{study}."


def _advice_sentence(verdict: Verdict) -> str:
    if verdict.advice == "cache":
        return (
            f"Cache {_experts(verdict)} a layer, {verdict.cache_ratio:.3g} times what a token uses "
            f"and {verdict.cache_fraction:.0%} of all{_bytes(verdict)}: {hits_sentence(verdict)}."
        )
    if verdict.advice == "static":
        return (
            f"Keep the {_experts(verdict, 'most used ')} of each layer, "
            f"{verdict.cache_fraction:.0%} of all{_bytes(verdict)}: "
            f"{verdict.static_hit_rate:.0%} hits ({verdict.chance_hit_rate:.0%} by chance). "
            f"LRU finds {verdict.lru_hit_rate:.0%}."
        )
    return (
        f"A cache of any size only helps by its size: with {verdict.cache_fraction:.0%} of the "
        f"experts, {hits_sentence(verdict)}."
    )


def _experts(verdict: Verdict, kind: str = "") -> str:
    return f"{verdict.capacity} {kind}expert{'' if verdict.capacity == 1 else 's'}"


def _bytes(verdict: Verdict) -> str:
    if verdict.cache_bytes is None or verdict.total_bytes is None:
        return ""
    return f" ({_binary(verdict.cache_bytes)} of {_binary(verdict.total_bytes)})"


def _binary(num_bytes: int) -> str:
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB"
