import json

import pytest

from moerun_tools.cache_report import cache_table, dry_run_table, statistics_text
from moerun_tools.report import json_object, memory_line
from moerun_tools.units import as_bytes, as_percent, as_rate, as_seconds


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


def columns(line):
    return line.replace(" MB", "MB").replace(" kB", "kB").replace(" ms", "ms").split()


def test_the_table_has_a_row_for_each_layer_and_one_for_all():
    lines = cache_table(cached()).splitlines()
    assert len(lines) == 7
    assert columns(lines[2]) == [
        *("0", "8", "0.40", "200", "50.0", "25.0", "25.0"),
        *("9", "5", "1", "3", "1.2MB", "567.0kB", "12.5ms"),
    ]
    assert columns(lines[3])[:7] == ["2", "12", "1.00", "200", "70.0", "5.0", "25.0"]
    assert columns(lines[4])[:6] == ["total", "20", "400", "60.0", "15.0", "25.0"]
    assert lines[4].endswith("1.50 s")


def test_the_window_has_a_line_once_it_says_something():
    rates = {"hit_rate": 0.5, "static_hit_rate": 0.625, "optimal_hit_rate": 0.75}
    few = cache_table(cached(window={"tokens": 63, **rates}))
    assert few == cache_table(cached())
    added = set(cache_table(cached(window={"tokens": 64, **rates})).splitlines())
    assert added - set(few.splitlines()) == {
        "last 64 tokens: hit rate 50.0 % (whole or top), best fixed set 62.5 %, "
        "best possible 75.0 %"
    }


def test_the_columns_stand_under_their_names():
    header, *rows = cache_table(cached()).splitlines()[1:5]
    for name in ("layer", "slots", "look-ups", "hit %", "wasted", "demand read", "stalled"):
        end = header.index(name) + len(name)
        for row in rows:
            assert row[end - 1] != " "
            assert row[end : end + 1] in ("", " ")


def test_the_lines_around_the_table_say_what_was_at_work_and_how_fast():
    lines = cache_table(cached()).splitlines()
    assert lines[0] == (
        "expert cache: lcp (at work), 4.9 MB of 18.9 MB, prefetch auto (at work), "
        "50 decoded tokens, reads bypass the page cache"
    )
    assert lines[-2] == (
        "link 1.23 GB/s, compute 2.10 ms/token, stalled 0.90 ms/token, "
        "time per token 1.12 x the limit"
    )
    assert lines[-1] == "the experts do not fit in the budget"


def test_what_was_switched_off_is_said():
    text = cache_table(
        cached(
            policy="lru",
            cache_active=False,
            prefetch_active=False,
            reason="the cache was switched off: it measured slower than going without",
            direct_io=False,
        )
    )
    assert "lru (not at work)" in text
    assert "prefetch auto (not at work)" in text
    assert "reads go through the page cache" in text
    assert text.endswith("slower than going without")


def test_a_policy_that_went_back_to_another_says_so():
    assert "expert cache: predictive (at work)" in cache_table(
        cached(policy="predictive", predictive_active=True)
    )
    assert "expert cache: predictive (as lcp)" in cache_table(
        cached(policy="predictive", predictive_active=False)
    )


def test_prefetch_off_needs_no_more_words():
    assert "prefetch off, 50" in cache_table(cached(prefetch="off", prefetch_active=False))


def test_what_was_not_measured_is_a_dash():
    empty = counters(0, 0, 0, stalled_s=0.0)
    lines = cache_table(
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
    ).splitlines()
    assert columns(lines[2])[:7] == ["0", "8", "0.00", "0", "-", "-", "-"]
    assert lines[-1] == (
        "link - GB/s, compute - ms/token, stalled - ms/token, time per token - x the limit"
    )
    assert "page cache" not in lines[0]


def test_without_a_cache_at_work_there_is_one_line():
    text = cache_table(cached(state="resident", layers=[], reason="The budget holds all of them."))
    assert text == "expert cache: every expert is in memory. The budget holds all of them."


def test_the_dry_run_names_every_tier():
    lines = dry_run_table(planned()).splitlines()
    assert lines[0] == "some-model: 4 layers of 32 experts of 73.7 kB, 4 a token"
    assert lines[1] == "device cpu (asked for)"
    values = {line[:24].strip(): line[24:].strip() for line in lines[3:12]}
    assert values == {
        "resident weights": "4.1 MB",
        "KV cache, context full": "6.3 MB",
        "experts in all": "20.0 MB",
        "budget for experts": "5.0 MB  25.0 % of the experts",
        "arena": "4.9 MB  24.5 % of the experts",
        "slots": "4.5 MB",
        "staging ring": "400.0 kB",
        "smallest budget": "900.0 kB",
        "free memory": "20.3 GB",
    }
    assert "policy lcp, prefetch auto" in lines


def test_the_dry_run_of_a_card_tells_its_memory():
    lines = dry_run_table(planned(device="cuda", device_reason="found a card")).splitlines()
    assert lines[1] == "device cuda (found a card)"
    values = {line[:24].strip(): line[24:].strip() for line in lines[12:18]}
    assert values == {
        "free on the device": "71.0 GB",
        "of": "85.0 GB",
        "activations": "30.0 MB",
        "scratch memory": "40.0 MB",
        "reserve": "268.0 MB",
        "left for experts": "70.0 GB",
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


def stats(cache):
    return {
        "device": "cpu",
        "memory": {
            "expert_bytes": 1_200_000_000,
            "resident_bytes": 2_000_000,
            "kv_cache_bytes": 3000,
            "scratch_bytes": 4,
        },
        "cpu_kernels": "avx2",
        "threads": 2,
        "seed": 7,
        "logits_hash": "abc",
        "cache": cache,
    }


def test_the_memory_line_says_how_many_of_the_experts_are_held():
    line = memory_line(stats(cached(total_expert_bytes=5_100_000_000)))
    assert line.startswith("cpu memory: experts 1.2 GB of 5.1 GB, resident 2.0 MB, ")
    line = memory_line(stats(cached(state="resident")))
    assert line.startswith("cpu memory: experts 1.2 GB, resident 2.0 MB, ")


def test_json_replaces_numbers_that_it_does_not_have_at_any_depth():
    cache = cached(link_gb_per_s=float("inf"))
    cache["layers"][1]["hit_rate"] = float("nan")
    value = json.loads(json_object("", [], [], stats(cache)))
    assert value["stats"]["cache"]["link_gb_per_s"] is None
    assert value["stats"]["cache"]["layers"][1]["hit_rate"] is None
    assert value["stats"]["cache"]["layers"][0]["hit_rate"] == 0.5


def test_numbers_are_short():
    assert [as_bytes(n) for n in (0, 999, 1000, 73_728, 5 * 10**9, 10**16)] == [
        *("0 B", "999 B", "1.0 kB", "73.7 kB", "5.0 GB", "10000.0 TB")
    ]
    assert [as_seconds(s) for s in (None, 0.0, 0.0125, 2.5)] == ["-", "0.0 ms", "12.5 ms", "2.50 s"]
    assert [as_rate(r) for r in (None, 1.234, 123.4)] == ["-", "1.23", "123"]
    assert [as_percent(*pair) for pair in ((1, 3), (0, 0))] == ["33.3", "-"]


def test_what_a_plan_promised_stands_beside_what_came():
    stats = {
        "cache": cached(),
        "plan": None,
        "batch": None,
        "predicted": {"hit_rate": 0.8, "tpot_ms": 12.5},
        "decode_tokens_per_s": 100.0,
    }
    assert statistics_text(stats).splitlines()[-1] == (
        "the plan predicted 80.0 % hits (measured 75.0 %) and 12.5 ms a token (measured 10 ms)"
    )
    plain = statistics_text({**stats, "predicted": None})
    assert "predicted" not in plain
    assert statistics_text({**stats, "batch": {}}) == plain
