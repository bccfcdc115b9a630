"""Measuring on this machine what the parts of a token take, for one model."""

from __future__ import annotations

import datetime
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moerun import _moerun
from moerun.arguments import check_int
from moerun.cache_options import cache_options, dry_run, machine_options
from moerun.errors import InvalidArgumentError
from moerun.hub import resolve_model
from moerun.identity import ModelIdentity, machine_name
from moerun.model import Model
from moerun.packs import folder_of
from moerun.planning.costs import CostModel
from moerun.planning.layer_costs import Routing, layer_costs
from moerun.planning.link import measure_link
from moerun.sizes import size_text

Progress = Callable[[str, float], None]

_TEXTS = 4  # as many of them as begin before so many seconds
_TEXTS_S = 12.0
_MOST_TOKENS = 256  # whose times are kept
# A text whose tokens take long ends after so many seconds of decoding, but not before so many
# tokens of each phase.
_DECODING_S = 20.0
_FEWEST_TOKENS = 4
_MOST_TOKENS = 256  # decoded, at most


def calibrate(
    path: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    pack: bool | str | os.PathLike[str] = False,
    threads: int | None = None,
    context_tokens: int = 256,
    expert_budget: str | int | None = None,
    progress: Progress | None = None,
) -> CostModel:
    """Measure what a model's layers and the link to its experts take on this machine.

    The model generates text with a part of its experts in memory, so one that is larger than the
    memory is measured as well; then experts are moved and nothing else is done. The other work of
    the machine should be as it will be later. docs/planning.md says how it is measured.

    Args:
        path: as for `Model.load`.
        device: as for `Model.load`.
        pack: as for `Model.load`; a record file that is not there is written first.
        threads: as for `Model.load`.
        context_tokens: tokens before those that are timed, for attention takes longer the more
            there are; at most half of what the model's context holds.
        expert_budget: as for `Model.load`; less than all experts. None for half of them, or for
            all that fits in memory.
        progress: called now and then with what is being done, and how much of it, from 0 to 1. If
            it raises, so does this.

    Raises:
        InvalidArgumentError: an argument is out of its range, no expert of the model can be left
            out of memory, or all of them fit in `expert_budget`.
        As `Model.load`, besides.
    """
    report = progress or (lambda step, share: None)
    directory = resolve_model(path)
    machine = machine_options(device, threads, None)
    context = check_int("context_tokens", context_tokens, 1)
    config = _moerun.model_config(os.fsencode(directory))
    machine["context_length"] = min(context + _MOST_TOKENS, config["max_position_embeddings"])
    sizes = _sizes(directory, machine, expert_budget)
    routing = Routing.make([layer["slots"] for layer in sizes["layers"]], config)
    longest = config["max_position_embeddings"]
    if context > max(2, longest // 2):
        raise InvalidArgumentError(
            f"context_tokens: expected at most {longest // 2}, half of what the model's context "
            f"holds, found {context}"
        )
    context = max(2, context)
    length = max(2, context - routing.num_tokens // 2)  # the middle token has this context
    options = {
        **machine,
        **cache_options(sizes["budget_bytes"], "lcp", 1, True, None),
        "context_length": min(length + routing.num_tokens + 1, longest),
        "routing_replay": (routing.expert_ids, routing.predicted_ids),
        "cache_events": True,  # the cache stays on
        "sync_times": True,
    }
    if (folder := folder_of(pack)) is not None:
        options["pack_folder"] = folder
    report("loading", 0.0)
    native = _moerun.Model(
        os.fsencode(directory),
        progress=lambda done, total: report("loading", done / total),
        **options,
    )
    with Model(native, directory) as model:
        _generate(model, length, routing, report)
        times = layer_costs(_moerun.layer_times(native), routing)
        link = measure_link(native, config, report)
        stats = model.stats()
    identity = ModelIdentity(directory)
    return CostModel(
        **times,
        link_fixed_s=link.fixed_s,
        link_bytes_per_s=link.bytes_per_s,
        link_channels=link.channels,
        device=stats["device"],
        model=identity.name,
        sizes_id=identity.sizes_id,
        machine=machine_name(),
        store="checkpoint" if folder is None else "record file",
        threads=stats["threads"],
        cpu_kernels=stats["cpu_kernels"],
        context_tokens=context,
        direct_io=stats["cache"]["direct_io"],
        link_error=link.error,
        link_error_worst=link.error_worst,
        moerun_version=_moerun.__version__,
        measured_at=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def _sizes(directory: Path, machine: dict[str, Any], given: str | int | None) -> dict[str, Any]:
    """Return what `dry_run` says of a budget with which experts have to be moved."""
    sizes = dry_run(directory, **machine, expert_budget=given, split=1)
    total, smallest = sizes["total_expert_bytes"], sizes["smallest_budget_bytes"]
    if given is not None and sizes["state"] == "resident" and smallest < total:
        raise InvalidArgumentError(
            f"every expert fits in expert_budget={given!r} (they take "
            f"{size_text(total, 'up')}), so none would be moved and there is no link to measure: "
            "leave it out, or give less"
        )
    if given is None:
        most = total // 2 if sizes["state"] == "resident" else sizes["budget_bytes"]
        given = max(smallest, min(total // 2, most))
        sizes = dry_run(directory, **machine, expert_budget=given, split=1)
    if total == 0 or sizes["state"] == "resident":
        raise InvalidArgumentError(
            f"{directory}: no part of this model's experts can be left out of memory, so there is "
            "nothing to calibrate"
        )
    return sizes


def _generate(model: Model, length: int, routing: Routing, report: Progress) -> None:
    """Generate texts after prompts of such a length, whatever they say."""
    numbers = random.Random(0)
    vocabulary = model.config["vocab_size"]
    begin = time.monotonic()
    num_texts = min(_TEXTS, _MOST_TOKENS // routing.num_tokens)
    for text in range(num_texts):
        if text and time.monotonic() - begin > _TEXTS_S:
            break
        report("prompt", text / num_texts)
        prompt = [numbers.randrange(vocabulary) for _ in range(length)]
        room = model.context_length - length
        generation = model.generate(
            prompt, min(routing.num_tokens + 1, room), ignore_eos=True, temperature=0
        )
        next(generation)
        started = time.monotonic()
        for number, _ in enumerate(generation, 1):
            report("decoding", (text + number / routing.num_tokens) / num_texts)
            is_long = time.monotonic() - started > _DECODING_S
            if is_long and number >= routing.first_mixed + _FEWEST_TOKENS:
                break
