"""What the report says about one trace: sentences made from its numbers."""

from __future__ import annotations

import polars as pl

from moerun_tools.metrics_published import GROUP_LENGTH, GROUPS, PUBLISHED, neighbours
from moerun_tools.metrics_results import (
    PREDICTORS,
    VOCABULARIES,
    TraceMetrics,
    clean_text,
)
from moerun_tools.units import as_binary, counted

_HEADLINES = {
    "suits": "{model} suits running with only a part of its experts in fast memory.",
    "usable": "{model} can run with a part of its experts in fast memory, at some loss.",
    "poor": "{model} is a poor candidate for keeping only a part of its experts in fast memory.",
    "unsuitable": "{model} should keep all of its experts in fast memory.",
}


_NO_LOCALITY = {
    "static": "{model} is served by a fixed set of its most used experts: its routing has no "
    "locality that a cache could follow.",
    "none": "{model} gains from a cache only what its size brings: its routing has no locality.",
}


def headline(result: TraceMetrics, count: int) -> str:
    """Return the verdict as one sentence for somebody in a hurry; `count` traces are reported."""
    verdict, name = result.verdict, result.name(count)
    if verdict is None:
        return f"There is no verdict on {name}: its sequences are too short."
    if verdict.group is None:
        return f"There is no verdict on {name}."
    if not verdict.has_locality:
        return _NO_LOCALITY[verdict.advice].format(model=name)
    return _HEADLINES[verdict.group].format(model=name)


def cost(result: TraceMetrics) -> str:
    """Return what a cache takes and brings, or why there is no verdict."""
    verdict, facts = result.verdict, result.facts
    if verdict is None:
        return f"A verdict needs sequences of at least {GROUP_LENGTH} tokens."
    if verdict.group is None:
        return " ".join(verdict.objections)
    size = f"{verdict.cache_fraction:.0%} of them"
    if verdict.cache_bytes is not None:
        size += f": {as_binary(verdict.cache_bytes)} instead of {as_binary(verdict.total_bytes)}"
    cache = f"{verdict.capacity} of the {facts.num_experts} experts in each layer ({size})"
    fixed = f"{verdict.static_hit_rate:.0%}"
    if verdict.advice == "static":
        return (
            f"The most used {cache} serve {fixed} of what tokens ask for, if they are kept and "
            f"never replaced; by chance it would be {verdict.chance_hit_rate:.0%}. "
            f"Replacing the least recently used expert finds {verdict.lru_hit_rate:.0%}."
        )
    found = (
        f"find {verdict.lru_hit_rate:.0%} of the experts that tokens ask for if it kept those used "
        f"last, {verdict.lfu_hit_rate:.0%} if it kept those used most so far, and "
        f"{verdict.best_hit_rate:.0%} if it knew what comes; by chance it would be "
        f"{verdict.chance_hit_rate:.0%}, and {fixed} with the most used experts, never replaced"
    )
    if verdict.advice == "none":
        return f"No cache is recommended. One for {cache} would {found}."
    return (
        f"A cache for {cache} would {found}. The rest has to be fetched while tokens wait, or "
        "prefetched in time."
    )


def standing(result: TraceMetrics) -> str:
    """Say where the trace stands: over chance, and between the groups and models of the study."""
    verdict = result.verdict
    if verdict is None:
        return "Its sequences are too short to compare."
    label = next(group.label for group in GROUPS if group.name == verdict.study_group)
    text = f"SRP at {GROUP_LENGTH} tokens is {verdict.srp:.3f}"
    low, high = verdict.srp_ci_low, verdict.srp_ci_high
    if low is not None and high is not None:
        text += f" (95% interval {low:.3f} to {high:.3f})"
    text += (
        f"; independent tokens that use every expert as often would have {verdict.srp_chance:.3f}, "
        f"and {verdict.srp_chance_even:.3f} if they used all equally often. By SRP alone the study "
        f"would say \N{LEFT DOUBLE QUOTATION MARK}{label}\N{RIGHT DOUBLE QUOTATION MARK}"
    )
    above, below = neighbours(verdict.srp)
    if above is not None and below is not None:
        text += f", between {above.name} ({above.srp:.3f}) and {below.name} ({below.srp:.3f})."
    elif above is None:
        text += f", above all {len(PUBLISHED)} models shown."
    else:
        text += f", below all {len(PUBLISHED)} models shown."
    if verdict.group is not None and not verdict.has_locality:
        text += " Without a margin over chance that says nothing."
    if low is not None and high is not None:
        borders = [group.lowest for group in GROUPS if low < group.lowest < high]
        if borders:
            text += f" The interval crosses the border at {borders[0]:.2f}: the group is uncertain."
    capacity = 2 * result.facts.top_k
    sch = result.hit_rate_at("sch", capacity)
    by_chance = result.chance_hit_rate_at("sch", capacity)
    if sch is None or by_chance is None:
        return text
    others = " and ".join(f"{model.sch:.0%} of {model.name}" for model in (above, below) if model)
    return text + (
        f" A cache of twice the experts of a token has an SCH of {sch:.0%} ({by_chance:.0%} by "
        f"chance), against {others}."
    )


def by_length(result: TraceMetrics) -> str:
    """Say how SRP changes with the segment length."""
    frame = result.srp("model")
    if len(frame) == 0:
        return "No sequence is as long as a window."
    first, last = frame.row(0, named=True), frame.row(-1, named=True)
    text = ""
    if len(frame) > 1:
        verb = "falls" if last["srp"] < first["srp"] else "rises"
        text = (
            f"From {first['segment_length']} to {last['segment_length']} tokens SRP {verb} from "
            f"{first['srp']:.3f} to {last['srp']:.3f}. "
        )
    middle = result.srp("model", result.reference_length).row(0, named=True)
    return text + (
        f"The sets that serve {middle['segment_length']} tokens best hold "
        f"{middle['cache_ratio']:.2f} times as many experts as one token uses; chance would give "
        f"an SRP of {middle['srp_chance']:.3f}."
    )


def by_layer(result: TraceMetrics) -> str:
    """Say which layers are the most and the least consistent."""
    frame = result.srp("layer", result.reference_length) if result.segment_lengths else None
    if frame is None or len(frame) < 2:
        return "There is one layer with experts." if frame is not None else "No windows."
    best = frame.sort("srp", descending=True).row(0, named=True)
    worst = frame.sort("srp").row(0, named=True)
    distance = best["srp"] - worst["srp"]
    text = (
        f"At {result.reference_length} tokens layer {best['layer']} is the most consistent "
        f"({best['srp']:.3f}, by chance {best['srp_chance']:.3f}) and layer {worst['layer']} the "
        f"least ({worst['srp']:.3f}, by chance {worst['srp_chance']:.3f}). "
    )
    if distance < 0.03:
        return text + "The layers hardly differ: caches of one size serve all of them."
    if distance > 0.08:
        return text + "They differ much: caches of different sizes for the layers may pay."
    return text + "The layers differ a little."


def by_domain(result: TraceMetrics) -> str:
    """Say for which domain routing is the most and the least consistent."""
    if len(result.facts.domains) < 2 or result.reference_length is None:
        return "The trace has one domain."
    frame = result.srp_by_domain(result.reference_length)
    if len(frame) < 2:
        return "Only one domain has sequences that are long enough."
    best, worst = frame.row(0, named=True), frame.row(-1, named=True)
    text = (
        f"At {result.reference_length} tokens SRP is highest for {clean_text(best['domain'])} "
        f"({best['srp']:.3f}, by chance {best['srp_chance']:.3f}) and lowest for "
        f"{clean_text(worst['domain'])} ({worst['srp']:.3f}, by chance {worst['srp_chance']:.3f})."
    )
    if best["ci_low"] is None or worst["ci_high"] is None:
        return text
    if best["ci_low"] > worst["ci_high"]:
        return text + " Their intervals do not overlap."
    return text + " Their intervals overlap: the difference may be chance."


def hit_rates(result: TraceMetrics) -> str:
    """Say what the policies reach at the knee, and what LRU needs to reach the same."""
    verdict, facts = result.verdict, result.facts
    if verdict is None:
        return "The sequences are too short for a knee."
    by_chance = verdict.hit_rates_by_chance["same"]
    text = (
        f"The knee of SCH is at {counted(verdict.capacity, 'expert')} a layer "
        f"(\N{GREEK SMALL LETTER RHO} = {verdict.cache_ratio:.3g}): {verdict.sch_hit_rate:.1%} of "
        f"look-ups are hits, with LRU {verdict.lru_hit_rate:.1%}, LFU {verdict.lfu_hit_rate:.1%}, "
        f"Belady {verdict.belady_hit_rate:.1%}, and {verdict.static_hit_rate:.1%} with the most "
        f"used experts, never replaced. A random set of as many finds "
        f"{verdict.cache_fraction:.1%}; "
        "where tokens draw their experts independently, each as often as here, SCH finds "
        f"{by_chance['sch']:.1%} and LRU {by_chance['lru']:.1%}."
    )
    lru = result.hit_rates("lru").filter(pl.col("hit_rate") >= verdict.sch_hit_rate)
    if len(lru) > 0 and lru["capacity"][0] > verdict.capacity:
        text += (
            f" LRU needs {counted(lru['capacity'][0], 'expert')} a layer "
            f"({lru['capacity'][0] / facts.num_experts:.0%}) for as many."
        )
    pool = result.hit_rates("lru", "model").filter(
        pl.col("capacity") == verdict.capacity * len(facts.moe_layers)
    )
    if len(pool) == 1 and len(facts.moe_layers) > 1:
        text += (
            f" One LRU pool of the same size for all layers would find "
            f"{pool['hit_rate'].item():.1%}."
        )
    return text


def activation(result: TraceMetrics) -> str:
    """Say how unevenly the experts are used over the whole trace."""
    frame = result.activation_rates()
    rate = pl.col("activation_rate")
    top = frame.sort(rate, descending=True).row(0, named=True)
    never = len(frame.filter(rate <= 0))
    quarter = max(1, result.facts.num_experts // 4)
    busiest = frame.sort(rate, descending=True).group_by("layer").head(quarter)
    share = sum(busiest["activation_rate"]) / sum(frame["activation_rate"])
    text = (
        f"The most used expert is number {top['expert']} of layer {top['layer']}: "
        f"{top['activation_rate']:.0%} of tokens use it, "
        f"{top['activation_rate'] / result.facts.even_share:.1f} times the even share. The busiest "
        f"{quarter} of each layer's {result.facts.num_experts} experts do {share:.0%} of the work; "
    )
    return text + (f"{never} of {len(frame)} are never used." if never else "none is never used.")


def srp_of_experts(result: TraceMetrics) -> str:
    """Say how consistent single experts are, and whether the busy ones are more so."""
    if not result.segment_lengths:
        return "No sequence is as long as a window."
    joined = result.srp("expert", result.reference_length).join(
        result.activation_rates().select("layer", "expert", rate="activation_rate"),
        on=["layer", "expert"],
    )
    used = joined.filter(pl.col("rate") > 0)
    border = used["rate"].quantile(0.75)
    busy = used.filter(pl.col("rate") >= border)["srp"].median()
    rest = used.filter(pl.col("rate") < border)["srp"].median()
    if not isinstance(busy, float):
        return "No expert is used."
    text = f"The busiest quarter of all experts has a median SRP of {busy:.2f}"
    if not isinstance(rest, float):
        return text + "; all are used alike."
    text += f", the rest {rest:.2f}. "
    if busy > rest + 0.05:
        return text + "What is used more is also used in longer runs, which caches like."
    return text + "How much an expert is used says little about how local its use is."


def specialization(result: TraceMetrics) -> str:
    """Say in which layers experts specialise, and in what."""
    parts = []
    frame = result.specialization("domain_variation")
    if len(frame) > 0:
        score = pl.col("domain_variation")
        middle = result.median_specialization("domain_variation")
        layers = frame.group_by("layer").agg(score.median()).sort(score, "layer")
        parts.append(
            f"The use of the median expert varies by {middle or 0:.0%} of "
            f"its mean over the {len(result.facts.domains)} domains, most in layer "
            f"{layers['layer'][-1]} ({layers['domain_variation'][-1]:.0%}), least in layer "
            f"{layers['layer'][0]} ({layers['domain_variation'][0]:.0%}); by chance it would be "
            f"{result.median_specialization('domain_variation_chance') or 0:.0%}."
        )
    scores = {
        name: value
        for key, name in VOCABULARIES.items()
        if (value := result.median_specialization(key)) is not None
    }
    if scores:
        listed = ", ".join(f"{value:.0%} by the {name}" for name, value in scores.items())
        chances = [
            value
            for key in VOCABULARIES
            if (value := result.median_specialization(f"{key}_chance")) is not None
        ]
        strongest = max(scores, key=scores.__getitem__)
        parts.append(
            f"The median expert receives {listed} of the uses of the token ids that it owns: "
            f"routing follows the {strongest} most. By chance it would be "
            f"{min(chances, default=0):.0%} to {max(chances, default=0):.0%}."
        )
    return " ".join(parts) or "Neither was measured."


def load_balance(result: TraceMetrics) -> str:
    """Say how uneven windows are, against chance."""
    frame = result.load_balance("model")
    if len(frame) == 0:
        return "No sequence is as long as a window."
    last = frame.row(-1, named=True)
    chance = last["variation_chance"]
    text = (
        f"In windows of {last['segment_length']} tokens the use of experts has a standard "
        f"deviation of {last['variation']:.2f} times its mean; tokens that draw experts at random "
        f"would give about {chance:.2f}. "
    )
    if last["variation"] > 2 * chance:
        return text + "Windows keep to a part of the experts: good for a cache, bad for balance."
    if last["variation"] > 1.2 * chance:
        return text + "Windows are somewhat less even than chance."
    return text + "Windows are about as even as chance makes them: there is little to cache."


def predictability(result: TraceMetrics) -> str:
    """Say how many experts simple predictors would fetch in time."""
    recalls = {
        name: value for key, name in PREDICTORS.items() if (value := result.recall(key)) is not None
    }
    if not recalls:
        return "Not measured: the sequences have one token."
    listed = ", ".join(f"{value:.1%} by the {name}" for name, value in recalls.items())
    best = max(recalls, key=recalls.__getitem__)
    k = result.facts.top_k
    return (
        f"Named in advance: {listed}; guessing names {result.facts.even_share:.1%}. A prefetch by "
        f"the {best} would bring {recalls[best] * k:.1f} of a token's {k} experts in time, if the "
        "link is fast enough."
    )
