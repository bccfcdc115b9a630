import json

import pytest

from moerun_tools.cache_report import layer_table, statistics_text
from moerun_tools.dry_run_report import dry_run_table
from moerun_tools.report import batch_lines, closing_line, device_text, json_object
from moerun_tools.units import as_binary, as_percent, as_rate, as_seconds, of_total


def counters(lookups, hits, top_hits, **changes):
    return {
        "lookups": lookups,
        "hits": hits,
        "top_hits": top_hits,
        "misses": lookups - hits - top_hits,
        "hit_rate": hits / lookups if lookups else None,
        "prefetch_issued": 9,
        "prefetch_useful": 5,
        "prefetch_late": 1,
        "prefetch_wasted": 3,
        "demand_bytes": 1_234_000,
        "prefetch_bytes": 567_000,
        "stalled_s": 0.0125,
        **changes,
    }


def cached(**changes):
    return {
        "state": "cached",
        "policy": "lcp",
        "prefetch": "auto",
        "prefetch_active": True,
        "cache_active": True,
        "predictive_active": None,
        "reason": "the experts do not fit in the budget",
        "budget_bytes": 5_000_000,
        "total_expert_bytes": 18_900_000,
        "arena_bytes": 4_900_000,
        "slot_bytes": 4_500_000,
        "ring_bytes": 400_000,
        "host": None,
        "direct_io": True,
        "decode_tokens": 50,
        "total": counters(400, 240, 60, stalled_s=1.5),
        "layers": [
            {"layer": 0, "slots": 8, "split": 0.4, **counters(200, 100, 50)},
            {"layer": 2, "slots": 12, "split": 1.0, **counters(200, 140, 10)},
        ],
        "link_gb_per_s": 1.234,
        "compute_s_per_token": 0.0021,
        "stalled_s_per_token": 0.0009,
        "ratio_to_limit": 1.117,
        "window": None,
        **changes,
    }


def planned(**changes):
    return {
        "model": "some-model",
        "device": "cpu",
        "device_reason": "asked for",
        "has_tokenizer": True,
        "state": "cached",
        "policy": "lcp",
        "prefetch": "auto",
        "resident_bytes": 4_100_000,
        "total_expert_bytes": 20_000_000,
        "budget_bytes": 5_000_000,
        "arena_bytes": 4_900_000,
        "slot_bytes": 4_500_000,
        "ring_bytes": 400_000,
        "host": None,
        "smallest_budget_bytes": 900_000,
        "kv_cache_bytes_at_full_context": 6_300_000,
        "available_bytes": 20_300_000_000,
        "activation_bytes": 30_000_000,
        "scratch_bytes": 40_000_000,
        "reserve_bytes": 268_000_000,
        "left_for_experts_bytes": 70_000_000_000,
        "device_free_bytes": 71_000_000_000,
        "device_total_bytes": 85_000_000_000,
        "num_moe_layers": 4,
        "num_experts": 32,
        "top_k": 4,
        "expert_bytes_each": 73_728,
        "layers": [
            {"layer": layer, "slots": slots, "split": split, "slot_bytes": 1000}
            for layer, slots, split in ((0, 12, 0.4), (1, 12, 0.4), (3, 12, 0.5), (5, 8, 0.5))
        ],
        **changes,
    }


def stats(cache, **changes):
    return {
        "device": "cpu",
        "device_reason": "no CUDA: no NVIDIA driver is installed",
        "load": {"seconds": 0.1424, "gb_per_s": 0.16},
        "memory": {
            "expert_bytes": 1_200_000_000,
            "resident_bytes": 2_000_000,
            "kv_cache_bytes": 3000,
            "scratch_bytes": 4,
        },
        "cpu_kernels": "avx2",
        "threads": 2,
        "seed": 7,
        "sampling": {
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        },
        "logits_hash": "abc",
        "prompt_tokens": 11,
        "generated_tokens": 100,
        "ttft_s": 0.046,
        "prefill_tokens_per_s": 240.0,
        "decode_tokens_per_s": 61.2,
        "decode_gb_per_s": 1.5,
        "batch": None,
        "plan": None,
        "predicted": None,
        "cache": cache,
        **changes,
    }


def lines_of(text):
    """What follows the label, lines that were wrapped put together again."""
    return " ".join(line[10:] for line in text.splitlines())


# The closing line


def test_the_closing_line_is_for_people():
    expected = "100 tokens, 61 tok/s; prompt 11 tokens, first token after 46 ms"
    assert closing_line(stats(cached())) == expected
    assert closing_line(stats(cached()), interrupted=True) == f"interrupted: {expected}"
    assert closing_line(stats(cached(), device="cuda")) == expected + " (cuda)"


def test_the_closing_line_leaves_out_what_was_not_measured():
    none = {"generated_tokens": 0, "decode_tokens_per_s": None, "ttft_s": None}
    assert closing_line(stats(cached(), **none)) == "0 tokens; prompt 11 tokens"
    one = {"generated_tokens": 1, "decode_tokens_per_s": None, "prompt_tokens": 1}
    assert closing_line(stats(cached(), **one)) == (
        "1 token; prompt 1 token, first token after 46 ms"
    )


def test_the_missing_card_is_named_only_where_there_is_one_or_it_was_asked_for():
    assert device_text(stats(cached())) == "cpu"
    assert device_text(stats(cached(), device_reason="this build has no CUDA part (no nvcc)")) == (
        "cpu"
    )
    reason = "no CUDA: the NVIDIA driver supports CUDA 11.0, and this build needs 12.0"
    assert device_text(stats(cached(), device_reason=reason)) == f"cpu ({reason})"


def batch(**changes):
    return {
        "generated_tokens": 90,
        "prompt_tokens": 30,
        "prefill_s": 0.5,
        "decode_s": 1.0,
        "steps": 40,
        "tokens_per_step": 2.25,
        "decode_tokens_per_s": 60.0,
        "prefill_tokens_per_s": 60.0,
        "active_experts": 7.25,
        "hit_rate": 0.5,
        "ready_rate": 0.75,
        "bytes_per_token": 3 << 20,
        "kv_cache": {"peak_bytes": 1 << 20, "budget_bytes": 4 << 20},
        "schedule": None,
        "prediction": None,
        **changes,
    }


def test_a_batch_ends_with_one_line_and_one_about_its_cache():
    done = stats(cached(), batch=batch())
    assert batch_lines(done, 4, 0, 0) == [
        "4 texts: 90 tokens in 1.50 s, 60 tok/s; prompts 30 tokens",
        "experts: 50.0 % hits, 75.0 % with prefetches in time; 3 MiB read a token",
    ]
    done = stats(cached(), batch=batch(hit_rate=None))
    assert batch_lines(done, 4, 1, 2, interrupted=True) == [
        "interrupted: 4 lines, 1 failed (2 of them before): 90 tokens in 1.50 s, 60 tok/s; "
        "prompts 30 tokens"
    ]
    assert batch_lines(stats(cached()), 1, 0, 0) == ["1 text"]


# --stats


def test_the_statistics_say_how_the_run_went_in_a_few_lines():
    assert statistics_text(stats(cached())).splitlines() == [
        "load      142 ms at 0.16 GB/s; cpu, avx2 kernels, 2 threads",
        "memory    experts 1.12 GiB of 18 MiB, resident 1.91 MiB, KV cache 2.93 KiB,",
        "          scratch 4 B",
        "speed     prompt 240 tok/s; decoding reads 1.50 GB/s of memory",
        "sampling  the likeliest token (greedy)",
        "logits    fingerprint abc",
        "experts   policy lcp, prefetch auto (on), 50 decoded tokens",
        "          60.0 % hits, 15.0 % partly cached, 25.0 % misses of 400 look-ups",
        "          1.72 MiB read (554 KiB of it by prefetch) at 1.23 GB/s; 2.1 ms a token",
        "          to compute, 0.9 ms stalled",
        "          12 % slower than disk and memory allow",
        "          the experts do not fit in the budget",
    ]


@pytest.mark.parametrize("scale", [1, 1000])
def test_every_line_of_the_statistics_fits_in_80_columns(scale):
    many = counters(400 * scale, 240 * scale, 60 * scale, stalled_s=12.5 * scale)
    many |= {name: many[name] * scale for name in many if name.endswith("_bytes")}
    layers = [{"layer": n, "slots": 128, "split": 0.4 + n / 100, **many} for n in range(48)]
    plan = {"started_from": "stored", "planned": 3, "changed": 1, "every": 5000, "last": None}
    text = statistics_text(
        stats(
            cached(layers=layers, total=many, reason="a reason of many words " * 9),
            plan=plan,
            batch=batch(steps=400 * scale),
        ),
        with_layers=True,
    )
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("\n\n") == 1


def test_the_sampling_is_named_where_it_is_not_neutral():
    sampled = {
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.1,
    }
    text = statistics_text(stats(cached(), sampling=sampled))
    assert "sampling  temperature 0.7, top k 50, top p 0.9, repetition penalty 1.1, seed 7" in text
    greedy = {**sampled, "temperature": 0.0}
    text = statistics_text(stats(cached(), sampling=greedy))
    assert "sampling  the likeliest token (greedy), repetition penalty 1.1\n" in text


def test_later_answers_do_not_repeat_the_load():
    text = statistics_text(stats(cached()), with_load=False)
    assert text.startswith("memory ")
    assert "load" not in text


def test_the_window_has_a_line_once_it_says_something():
    rates = {"hit_rate": 0.5, "static_hit_rate": 0.625, "optimal_hit_rate": 0.75}
    few = lines_of(statistics_text(stats(cached(window={"tokens": 63, **rates}))))
    assert few == lines_of(statistics_text(stats(cached())))
    enough = lines_of(statistics_text(stats(cached(window={"tokens": 64, **rates}))))
    assert (
        "last 64 tokens: 50.0 % hits (whole or partly), 62.5 % with the best fixed set, 75.0 % at "
        "best" in enough
    )


def test_what_was_switched_off_is_said():
    text = lines_of(
        statistics_text(
            stats(
                cached(
                    policy="lru",
                    cache_active=False,
                    prefetch_active=False,
                    reason="the cache was switched off: it measured slower than going without",
                    direct_io=False,
                )
            )
        )
    )
    assert "policy lru (switched off)" in text
    assert "prefetch auto (switched off)" in text
    assert "through the page cache" in text
    assert text.endswith("slower than going without")


def test_a_policy_that_went_back_to_another_says_so():
    def policy(**changes):
        return statistics_text(stats(cached(policy="predictive", **changes)))

    assert "policy predictive, prefetch" in policy(predictive_active=True)
    assert "policy predictive (as lcp), prefetch" in policy(predictive_active=False)


def test_what_was_not_measured_is_left_out():
    empty = counters(0, 0, 0, stalled_s=0.0, demand_bytes=0, prefetch_bytes=0)
    text = statistics_text(
        stats(
            cached(
                decode_tokens=0,
                reason="",
                direct_io=None,
                total=empty,
                layers=[{"layer": 0, "slots": 8, "split": 0.0, **empty}],
                link_gb_per_s=None,
                compute_s_per_token=None,
                stalled_s_per_token=None,
                ratio_to_limit=None,
            )
        )
    )
    assert text.splitlines()[-2:] == [
        "experts   policy lcp, prefetch auto (on), split 0.00, 0 decoded tokens",
        "          0 B read",
    ]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(1.004, "as fast as disk"), (0.9, "as fast as disk"), (1.04, "4 % slower than disk")],
)
def test_the_distance_to_the_limit_is_a_percentage(ratio, expected):
    assert f"{expected} and memory allow" in statistics_text(stats(cached(ratio_to_limit=ratio)))


def test_without_a_cache_at_work_there_is_one_line_about_experts():
    text = statistics_text(
        stats(cached(state="resident", layers=[], reason="every expert is in memory"))
    )
    assert text.splitlines()[-1] == "experts   all in memory."


def test_what_a_plan_promised_stands_beside_what_came():
    promised = stats(cached(), predicted={"hit_rate": 0.8, "tpot_ms": 12.5})
    promised["decode_tokens_per_s"] = 100.0
    text = lines_of(statistics_text(promised))
    assert text.endswith(
        "predicted 80.0 % hits (measured 75.0 %) and 12.5 ms a token (measured 10 ms)"
    )
    assert "predicted" not in statistics_text({**promised, "predicted": None})
    assert "predicted" not in statistics_text({**promised, "batch": batch()})


# --layer-stats


def columns(line):
    return line.replace(" MiB", "MiB").replace(" KiB", "KiB").replace(" ms", "ms").split()


def test_the_table_has_a_row_for_each_layer_and_one_for_all():
    lines = layer_table(cached()).splitlines()
    assert len(lines) == 4
    assert columns(lines[1]) == [
        *("0", "8", "0.40", "50.0", "25.0", "25.0", "9", "5", "1", "3", "1.72MiB", "12ms")
    ]
    assert columns(lines[2])[:6] == ["2", "12", "1.00", "70.0", "5.0", "25.0"]
    assert columns(lines[3])[:5] == ["total", "20", "60.0", "15.0", "25.0"]
    assert lines[3].endswith("1.50 s")


def test_columns_that_are_0_everywhere_are_left_out():
    quiet = {
        **dict.fromkeys(("prefetch_issued", "prefetch_useful", "prefetch_late"), 0),
        "prefetch_wasted": 0,
    }
    one = counters(200, 100, 0, **quiet)
    layers = [{"layer": layer, "slots": 8, "split": 1.0, **one} for layer in (0, 1)]
    header = layer_table(cached(layers=layers, total=counters(400, 200, 0, **quiet))).splitlines()
    assert header[0].split() == ["layer", "slots", "hit", "%", "miss", "%", "read", "stalled"]


def test_the_columns_stand_under_their_names():
    header, *rows = layer_table(cached()).splitlines()
    for name in ("layer", "slots", "hit %", "unused", "read", "stalled"):
        end = header.index(name) + len(name)
        for row in rows:
            assert row[end - 1] != " "
            assert row[end : end + 1] in ("", " ")


# --dry-run


def test_the_dry_run_names_every_tier():
    lines = dry_run_table(planned()).splitlines()
    assert lines[0] == "some-model: 4 layers of 32 experts of 72 KiB, 4 a token"
    assert lines[1] == "device cpu (asked for)"
    values = {line[:24].strip(): line[24:].strip() for line in lines[3:12]}
    assert values == {
        "resident weights": "3.91 MiB",
        "KV cache, context full": "6.01 MiB",
        "experts in all": "19.1 MiB",
        "budget for experts": "4.77 MiB  25.0 % of the experts",
        "arena": "4.67 MiB  24.5 % of the experts",
        "slots": "4.29 MiB",
        "staging ring": "391 KiB",
        "smallest budget": "879 KiB",
        "free memory": "18.9 GiB",
    }
    assert "policy lcp, prefetch auto" in lines


def test_the_dry_run_of_a_model_without_a_tokenizer_says_so():
    assert "no tokenizer.json" in dry_run_table(planned(has_tokenizer=False)).splitlines()[-1]
    assert "tokenizer" not in dry_run_table(planned())


def test_the_dry_run_of_a_card_tells_its_memory():
    lines = dry_run_table(planned(device="cuda", device_reason="found a card")).splitlines()
    assert lines[1] == "device cuda (found a card)"
    values = {line[:24].strip(): line[24:].strip() for line in lines[12:18]}
    assert values == {
        "free on the device": "66.1 GiB",
        "of": "79.2 GiB",
        "activations": "28.6 MiB",
        "scratch memory": "38.1 MiB",
        "reserve": "256 MiB",
        "left for experts": "65.2 GiB",
    }
    assert "free on the device" not in dry_run_table(planned())


def test_equal_layers_of_the_dry_run_share_a_row():
    header, *rows = dry_run_table(planned()).splitlines()[-4:]
    assert header.split("  ")[0] == "layers"
    assert [row.split() for row in rows] == [
        ["0-1", "2", "12", "0.40"],
        ["3", "1", "12", "0.50"],
        ["5", "1", "8", "0.50"],
    ]


@pytest.mark.parametrize("layers", [[], planned()["layers"]])
def test_the_dry_run_of_a_model_that_fits_says_so(layers):
    text = dry_run_table(planned(state="resident", policy=None, layers=layers))
    assert text.endswith("every expert fits in the budget: nothing is read after loading")


def test_json_replaces_numbers_that_it_does_not_have_at_any_depth():
    cache = cached(link_gb_per_s=float("inf"))
    cache["layers"][1]["hit_rate"] = float("nan")
    value = json.loads(json_object("", [], [], stats(cache)))
    assert value["stats"]["cache"]["link_gb_per_s"] is None
    assert value["stats"]["cache"]["layers"][1]["hit_rate"] is None
    assert value["stats"]["cache"]["layers"][0]["hit_rate"] == 0.5


def test_numbers_are_short():
    assert [as_binary(n) for n in (None, 0, 999, 1024, 73_728, 5 * 2**30, 2**50)] == [
        *("-", "0 B", "999 B", "1 KiB", "72 KiB", "5 GiB", "1024.0 TiB")
    ]
    assert [of_total(*pair) for pair in ((9 << 19, 18 << 20), (900 << 10, 18 << 20))] == [
        *("4.5 of 18 MiB", "900 KiB of 18 MiB")
    ]
    assert [as_seconds(s) for s in (None, 0.0, 0.0012, 0.0464, 2.5)] == [
        *("-", "0 ms", "1.2 ms", "46 ms", "2.50 s")
    ]
    assert [as_rate(r) for r in (None, 1.234, 123.4)] == ["-", "1.23", "123"]
    assert [as_percent(*pair) for pair in ((1, 3), (0, 0))] == ["33.3", "-"]
