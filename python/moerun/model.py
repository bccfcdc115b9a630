"""A loaded model: logits, generation, statistics."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_int, check_number, check_str
from moerun.batch import BatchControl
from moerun.cache_control import CacheControl
from moerun.cache_options import Prefetch, Split, cache_options, machine_options
from moerun.errors import MoerunError, MoerunWarning
from moerun.generation import Generation
from moerun.generation_defaults import GenerationDefaults
from moerun.generation_request import MAX_SEED, check_prompt, request_of
from moerun.hub import resolve_model
from moerun.packs import folder_of
from moerun.plan_files import check_plan_model, predicted_by
from moerun.tokenizer import Tokenizer
from moerun.trace.routing import CACHE_EVENT_KINDS, SequenceRouting


class Model(CacheControl, BatchControl):
    """A Mixture-of-Experts model that is loaded and ready to run; made by `Model.load`.

    A context manager: the memory is given back at the end of the block, or by `close`.

    Attributes:
        path: the directory of the model.
    """

    def __init__(self, native: _moerun.Model, path: Path, logs_events: bool = False) -> None:
        self.path = path
        self._logs_events = logs_events
        self._kept_events: list[tuple[int, int, int, str]] = []
        self._native: _moerun.Model | None = native
        self._last_generation: Generation | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        device: str = "auto",
        threads: int | None = None,
        context_length: int | None = None,
        prefill_chunk: int = 512,
        cpu_kernels: str = "auto",
        progress: Callable[[int, int], None] | None = None,
        *,
        expert_budget: str | int | None = None,
        policy: str | None = None,
        split: Split | None = None,
        prefetch: Prefetch | None = None,
        plan: str | os.PathLike[str] | None = None,
        pack: bool | str | os.PathLike[str] = False,
        cache_events: bool = False,
        pin_limit: str | int | None = None,
        host_tier: str | None = None,
    ) -> Model:
        """Load a model.

        Args:
            path: a directory with config.json and *.safetensors; or a Hugging Face repository id
                `organisation/name`, which is downloaded if it is not on this machine; or None for
                `moerun.default_model()`.
            device: "cpu", "cuda", or "auto": CUDA where a card, its driver and this build suit each
                other, else the CPU. `stats()["device_reason"]` says why. Of several cards the first
                usable one is taken; CUDA_VISIBLE_DEVICES chooses.
            threads: number of CPU threads; None for one a core.
            context_length: tokens of prompt and answer together; None for what the model allows.
            prefill_chunk: tokens of a prompt that are computed together.
            cpu_kernels: a name from `build_info()["cpu_kernels"]["compiled"]`, or "auto" for the
                fastest that this CPU runs.
            progress: called now and then, from the thread that loads, with the bytes done and the
                bytes in all. If it raises, loading ends with that exception.
            expert_budget: most memory for routed experts: bytes, or a text such as "6GiB",
                "500MB" or "25%" (of all experts). None for all that fits in free memory. When
                not every expert fits, the rest is read from the model's files as it is needed.
            policy: which expert makes room for another: "lcp", "lru", "lfu" or "static"; "off"
                keeps none. "predictive": the one that is expected to be used last, whatever its
                layer; best with a predictor (see `batch`), and the only one that goes with a plan
                of another policy. None for "lcp", or what the plan says.
            split: share of a cached expert that stays in memory, from 0 to 1: one number, or one
                per layer with experts. None for 1: whole experts.
            prefetch: read what the next layer will probably need: True, False, or "auto" for as
                long as it pays. None for "auto", or what the plan says.
            plan: a JSON file with slots and split of each layer, and perhaps experts to start with;
                takes the place of `expert_budget`, `policy` and `split`. Or "auto": starts from
                what `save_plan()` stored for this budget, if it did, and plans again after every
                5,000 tokens, when a text has ended (docs/planning.md).
            pack: read experts from a record file, which is written first if it is not there: True
                for one in `moerun.pack_folder()`, or a folder. It is as large as all experts.
                Without one, any part of an expert costs all of its down_proj. Used only when not
                every expert fits.
            cache_events: keep what happens in the cache for `cache_events()`.
            pin_limit: with device "cuda", most memory of the host that is page-locked for experts
                which the device copies: bytes, or a text as for `expert_budget`; 0 for none. What
                is beyond it is slower to copy. None for all that fits in free memory.
            host_tier: with device "cuda", where the other experts are: "memory", "disk" (memory
                stays free), or "auto" for memory as far as it goes. None for "auto".

        Warns:
            MoerunWarning: less memory than was asked for could be page-locked.

        Raises:
            MissingFileError: there is no such model, or a file of it is missing.
            FileError: a file cannot be read, or a repository cannot be downloaded.
            FormatError: a file of the model says something wrong.
            UnsupportedModelError: this version cannot run the model.
            OutOfMemoryError: the model does not fit, or its experts do not run in the budget; the
                message names the smallest one that works.
            InvalidArgumentError: an argument has the wrong type or is out of its range, or two
                exclude each other.
        """
        directory = resolve_model(path)
        is_auto, stored = plan == "auto", None
        if is_auto:
            from moerun.planning.stored_plans import start_of_auto

            plan, stored = (
                None,
                start_of_auto(
                    directory, device, threads, context_length, expert_budget, policy, split, pack
                ),
            )
        options = {
            **machine_options(device, threads, context_length),
            "prefill_chunk": check_int("prefill_chunk", prefill_chunk, 1),
            "cpu_kernels": check_str("cpu_kernels", cpu_kernels),
            "progress": progress,
            **cache_options(expert_budget, policy, split, prefetch, plan, pin_limit, host_tier),
        }
        if (folder := folder_of(pack)) is not None:
            options["pack_folder"] = folder
        if cache_events:
            options["cache_events"] = True
        check_plan_model(options.get("plan"), directory)
        native = _moerun.Model(os.fsencode(directory), **options)
        for note in native.stats()["load"]["notes"]:
            warnings.warn(note, MoerunWarning, stacklevel=3)  # guarded: see boundary.py
        model = cls(native, directory, bool(cache_events))
        model._pack = pack
        model._predicted = predicted_by(options.get("plan"))
        if is_auto and native.stats()["cache"]["state"] == "cached":
            from moerun.planning.online import OnlinePlanner
            from moerun.planning.stored_plans import has_taken

            from_stored = stored is not None and has_taken(model, stored)
            model._planner = OnlinePlanner(model, pack=pack, from_stored=from_stored)
        return model

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says, in one form for every family of models."""
        return dict(self._open().config)

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._open().context_length

    @property
    def device(self) -> str:
        """Where the model runs: "cpu" or "cuda"."""
        return self._open().device

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the layers with experts."""
        return _moerun.moe_layers(self._open())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, read when it is first asked for.

        Raises:
            MissingFileError: the model has no tokenizer.json.
            FormatError: tokenizer.json cannot be understood.
        """
        return Tokenizer(self.path)

    @cached_property
    def generation_defaults(self) -> GenerationDefaults:
        """Settings of texts in generation_config.json, read when they are first asked for.

        Warns:
            MoerunWarning: the file asks for something that moerun does not compute.

        Raises:
            FileError: the file cannot be read.
            FormatError: it says something wrong.
        """
        defaults = GenerationDefaults.of_model(self.path)
        for note in defaults.notes:
            warnings.warn(note, MoerunWarning, stacklevel=6)  # of `generate`
        return defaults

    def forward(self, token_ids: Iterable[int] | NDArray[Any]) -> NDArray[np.float32]:
        """Return the logits after each token of one sequence.

        Args:
            token_ids: ids of T tokens, 1 <= T <= context_length.

        Returns:
            Logits of shape (T, vocab_size).

        Raises:
            InvalidArgumentError: no tokens, too many, or an id outside the vocabulary.

        Warns:
            MoerunWarning: logits are NaN or infinite, because a weight is or the activations
                overflow; it names layer and tensor. Generation and traces raise FormatError then.
        """
        native = self._open()
        logits, complaint = native.forward(self._check_prompt(token_ids, self.context_length))
        if complaint:
            warnings.warn(complaint, MoerunWarning, stacklevel=3)  # guarded: see boundary.py
        return logits

    def generate(
        self,
        token_ids: Iterable[int] | NDArray[Any],
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: int | str | Sequence[int | str] | None = None,
        ignore_eos: bool = False,
    ) -> Generation:
        """Continue a prompt, token by token.

        The arguments are checked here and now; the tokens are computed as the iterator is asked
        for them. The token that ends the text is part of it.

        Of `max_new_tokens`, `stop` and the five arguments of sampling, None stands for what the
        model's generation_config.json says (`generation_defaults`), as in transformers; without
        such a file the likeliest token is always taken. `temperature=0` is plain greedy decoding:
        the model's other settings of sampling are then left out, too.

        Args:
            token_ids: the prompt, at least one token and fewer than `context_length`.
            max_new_tokens: most tokens to generate; more than there is room for goes on until the
                model ends the text or the context is full, and so does None where the model names
                no number.
            temperature: divides the logits before sampling; 0 always takes the likeliest token.
            top_k: sample among the k likeliest tokens; 0 for all.
            top_p: sample among the likeliest tokens that together have this probability.
            min_p: leave out tokens less likely than this share of the likeliest one.
            repetition_penalty: above 1, tokens that are already there become less likely.
            seed: same seed, same tokens. None draws one, which `stats()["seed"]` reports.
            stop: token ids and strings; ends after the token that is one, or that completes one.
            ignore_eos: go on when the model ends the text.

        Raises:
            InvalidArgumentError: an argument has the wrong type or is out of its range, or the
                prompt leaves no room in the context.
            MissingFileError: `stop` has a string, and the model has no tokenizer.json.
            FileError, FormatError: generation_config.json cannot be read, or says something wrong.
        """
        native = self._open()
        self._plan_again()  # where the last text was not asked for to its end
        request = request_of(
            self,
            token_ids,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
            stop,
            ignore_eos,
        )
        self._last_generation = Generation(
            native.generate(request.prompt, **request.native), request, at_end=self._plan_again
        )
        return self._last_generation

    def trace(
        self,
        token_ids: Iterable[int] | NDArray[Any],
        *,
        generate: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
        with_weights: bool = False,
        with_logits: bool = False,
        with_predictions: bool = False,
        with_prefetch: bool = False,
    ) -> SequenceRouting:
        """Return which experts the tokens of a sequence use.

        Args:
            token_ids: ids of T tokens; with `generate`, those of the prompt.
            generate: 0 computes `token_ids` at once, as a prompt, and records them. N decodes N
                tokens after them and records those alone; no token ends the text. The routing is
                that of the text as one pass, also where it outgrows the original length of
                longrope: the tokens so far are then computed and recorded anew.
            temperature: of `generate`; 0 always takes the likeliest token.
            seed: of `generate`; same seed, same tokens.
            with_weights: also record the experts' weights.
            with_logits: also record all router logits.
            with_predictions: also record the likeliest next token after each.
            with_prefetch: also record what the prefetcher would be told, for `simulate`.

        Returns:
            The routing; with `cache_events` if the model was loaded with them, which are then no
            longer in `cache_events()`. Events of the prompt have the number of the first token.

        Raises:
            InvalidArgumentError: as for `forward`, or `generate` leaves the context.
        """
        native = self._open()
        prompt = self._check_prompt(token_ids, self.context_length)
        if self._logs_events:
            self._kept_events += native.take_cache_events()
            served = native.stats()["cache"]["decode_tokens"] or 0
        arrays = _moerun.trace(
            native,
            prompt,
            generate=check_int("generate", generate, 0),
            temperature=check_number("temperature", temperature, 0),
            seed=check_int("seed", seed, 0, MAX_SEED),
            with_weights=bool(with_weights),
            with_logits=bool(with_logits),
            with_predictions=bool(with_predictions),
            with_prefetch=bool(with_prefetch),
        )
        if not self._logs_events:
            return SequenceRouting(**arrays)
        events = [
            (token - served, layer, expert, CACHE_EVENT_KINDS.index(kind))
            for token, layer, expert, kind in native.take_cache_events()
        ]
        return SequenceRouting(
            **arrays, cache_events=np.array(events, dtype=np.int32).reshape(-1, 4)
        )

    def stats(self) -> dict[str, Any]:
        """Return what was measured, in seconds, bytes, 1e9 bytes a second and tokens a second.

        `load`, `memory`, `device`, `device_reason`, `cpu_kernels`, `threads`, `threads_at_work` and
        `threads_withheld` (docs/threads.md) are about the model. The rest is about the last
        generation, None where nothing was measured yet: `prompt_tokens`, `generated_tokens`,
        `ttft_s` (time to first token), `prefill_tokens_per_s`, `decode_tokens_per_s`,
        `decode_bytes_per_token`, `decode_gb_per_s`, `logits_hash`, `seed`,
        `sampling` (the values used), `finish_reason`.

        `cache` is about the experts. `state` is "resident" while every expert is in memory, else
        "cached"; `policy`, `prefetch`, `cache_active`, `prefetch_active`, `predictive_active` and
        `reason` say what is at work and why; `budget_bytes`, `total_expert_bytes`, `arena_bytes` =
        `slot_bytes` + `ring_bytes` how much is held; `host`, where a device copies experts from the
        host, how many bytes are page-locked, pageable and on disk; `direct_io` whether reads bypass
        the page cache. Over the `decode_tokens` tokens since loading, `total` and each of `layers`
        count `lookups` = `hits` (the whole expert was in its slot) + `top_hits` (its top segment
        was) + `misses`, `hit_rate` = `hits` / `lookups`, `ready_rate` with `prefetch_useful`;
        `prefetch_issued`, `prefetch_useful`, `prefetch_late`, `prefetch_wasted`; `demand_bytes`,
        `prefetch_bytes` read; `stalled_s` waited for. `link_gb_per_s` is the rate while reads were
        under way; `compute_s_per_token` and `stalled_s_per_token` make up the time per token, and
        `ratio_to_limit` is that time by max(compute, missed bytes / link rate). `window` compares
        the last `tokens` with what could have been: `hit_rate` (whole or top), `static_hit_rate`
        with the best fixed set of experts, `optimal_hit_rate` with full knowledge, and the same for
        each of its `layers`.
        `batch`, of the batch that made progress last: sequences `waiting`, `running`, `finished`,
        `most_running` at once; `prompt_tokens`, `decode_tokens` in so many `steps`, and both per
        second; `active_experts` of a layer in a step, the mean; `hit_rate` (whole or top),
        `ready_rate` and `bytes_per_token` of the cache in these steps; `kv_cache` bytes;
        `prediction` and `schedule`, null without: docs/batching.md.
        `plan`, of plan "auto", says what it started from, how often it was `planned` and
        `changed`, and what the `last` decision was. `predicted` is what a plan from a file promises
        (`hit_rate`, `tpot_ms`), null without one.
        `reconfigured` counts `reconfigure`, `warm_bytes` what was read into slots in advance.
        docs/cache.md says more.
        """
        last = self._last_generation
        return {
            **self._open().stats(),
            "seed": None if last is None else last.seed,
            "sampling": None if last is None else last.sampling,
            "finish_reason": None if last is None else last.finish_reason,
            "plan": None if self._planner is None else self._planner.as_dict(),
            "predicted": self._predicted,
        }

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._native is None

    def close(self) -> None:
        """Give the memory back; the model cannot be used afterwards. Closing twice is fine."""
        if self._native is not None:
            self._native.close()
        self._native = None
        self._last_generation = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._native is None:
            return f"<moerun.Model {self.path} closed>"
        config = self.config
        return (
            f"<moerun.Model {self.path} {config['model_type']} num_experts={config['num_experts']} "
            f"top_k={config['top_k']} context_length={self.context_length} device={self.device}>"
        )

    def _open(self) -> _moerun.Model:
        if self._native is None:
            raise MoerunError(f"the model {self.path} is closed")
        return self._native

    def _check_prompt(self, token_ids: Any, max_tokens: int) -> NDArray[np.int64]:
        vocab_size = self._open().config["vocab_size"]
        return check_prompt(token_ids, vocab_size, self.context_length, max_tokens)
