"""Records with Hugging Face transformers: any model with routers, encoder-decoder ones too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from moerun.errors import (
    InvalidArgumentError,
    MissingFileError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from moerun.identity import name_of, parts_of_recording
from moerun.recording.documents import separator_token
from moerun.recording.engine import Stack, TraceOptions, no_tokenizer
from moerun.recording.expert_calls import ExpertCalls
from moerun.recording.routers import Watch, find_routers
from moerun.recording.stack_reader import StackReader
from moerun.recording.token_loop import decode
from moerun.recording.transformers_loading import (
    HubTokenizer,
    device_of,
    load_config,
    load_model,
    local_files,
    model_source,
)
from moerun.trace import SequenceRouting

_PROBE_TOKENS = 16
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "top_k_experts",
    "router_topk",
    "num_selected_experts",
)


class TransformersEngine:
    """Runs a model of transformers, one sequence at a time, and reads its routers; see `load`.

    Args:
        model: a model of transformers, in evaluation mode.
        model_name: what the traces call it.
        tokenizer: turns text into token ids, None if the data are token ids.
        settings: how it was loaded, as far as routing depends on it.
    """

    name = "transformers"

    def __init__(
        self,
        model: Any,
        model_name: str,
        tokenizer: HubTokenizer | None,
        settings: dict[str, Any],
    ) -> None:
        self.model_name = model_name
        self.settings = settings
        self._model = model
        self._tokenizer = tokenizer
        self._is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        text = model.config.get_text_config()
        self.vocab_size = int(getattr(text, "vocab_size", None) or model.config.vocab_size)
        most = getattr(text, "max_position_embeddings", None)
        self._max_tokens = most if isinstance(most, int) and most > 0 else None
        top_k = next((v for n in _TOP_K if isinstance(v := getattr(text, n, None), int)), None)
        self._readers = self._probe(top_k)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        threads: int | None = None,
        dtype: str = "auto",
        random_init: bool = False,
        num_layers: int | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> TransformersEngine:
        """Load a model and find its routers.

        Args:
            model: a directory, a Hugging Face repository id, None for the shipped model; with
                `random_init` also a configuration file alone.
            device: "cpu", "cuda", or "auto".
            threads: CPU threads of torch; None for its own choice.
            dtype: "float32", "bfloat16", "float16", or "auto" for that of the weights.
            random_init: take random weights instead of the model's.
            num_layers: with `random_init`, only so many layers.
            seed: of the random weights.
            trust_remote_code: run Python code that the model brings along.

        Raises:
            MissingFileError: there is no such model.
            FileError: it cannot be read or downloaded.
            FormatError: a file of the model says something wrong.
            UnsupportedModelError: transformers does not know the model, or it has no routers.
            OutOfMemoryError: it does not fit in memory.
            InvalidArgumentError: arguments do not go together.
        """
        if num_layers is not None and not random_init:  # its routing would not be the model's
            raise InvalidArgumentError("fewer layers (--layers) need random weights, --random-init")
        source = model_source(model)
        if not random_init and os.path.isfile(source):
            raise InvalidArgumentError(f"{source} is a configuration alone: add --random-init")
        if threads is not None:
            torch.set_num_threads(threads)
        place = device_of(device)
        config = load_config(source, num_layers=num_layers, trust_remote_code=trust_remote_code)
        loaded = load_model(
            source,
            config,
            random_init=random_init,
            seed=seed,
            dtype=dtype,
            device=place,
            trust_remote_code=trust_remote_code,
        )
        files = local_files(source)
        settings = {
            "model": parts_of_recording(files, with_weights=not random_init),
            "device": place.type,
            "dtype": str(next(loaded.parameters()).dtype).removeprefix("torch."),
            "random_init": random_init,
            "init_seed": seed if random_init else None,
            "layers": num_layers,
            "transformers": transformers.__version__,
        }
        path = Path(source)
        name = (
            (path.stem if path.is_file() else name_of(path.resolve())) if path.exists() else source
        )
        if random_init:
            name += " (random weights)"
        return cls(loaded, name, HubTokenizer(source, trust_remote_code), settings)

    @property
    def stacks(self) -> Sequence[Stack]:
        """What `trace` records: one stack, or encoder and decoder as far as they have experts."""
        return [reader.stack for reader in self._readers]

    @cached_property
    def separator(self) -> int | None:
        """The token between two documents, None for none; see `separator_token`."""
        config = self._model.config
        owners = (getattr(self._model, "generation_config", None), config, config.get_text_config())
        model_ids = [getattr(owner, "eos_token_id", None) for owner in owners]
        folder = None if self._tokenizer is None else self._tokenizer.folder
        return separator_token(folder, self.encode, model_ids, self.vocab_size)

    def check_length(self, tokens: int) -> None:
        """Refuse sequences that are longer than the model allows."""
        if self._max_tokens is not None and tokens > self._max_tokens:
            raise InvalidArgumentError(
                f"a sequence of {tokens} tokens is longer than {self.model_name} allows: "
                f"max_position_embeddings is {self._max_tokens}; lower --length or --generate"
            )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text` without special tokens."""
        if self._tokenizer is None:
            raise MissingFileError(no_tokenizer(f"{self.model_name} has no tokenizer"))
        return self._tokenizer.encode(text)

    def trace(
        self, token_ids: NDArray[np.int32], options: TraceOptions, seed: int
    ) -> list[SequenceRouting]:
        """Return the routing of one sequence, for each of `stacks`.

        With `options.generate`, `token_ids` are the prompt, which is not recorded; an encoder sees
        only the prompt and is recorded. Without it, a decoder behind an encoder gets the sequence
        shifted by one.
        """
        if options.with_prefetch:
            raise InvalidArgumentError(
                "the engine transformers has no prefetcher whose predictions could be recorded; "
                "record with the engine native"
            )
        self.check_length(len(token_ids) + options.generate)
        with torch.inference_mode():
            if options.generate:
                return self._decode(token_ids, options, seed)
            inputs = {"input_ids": self._batch(token_ids)}
            decoder_ids = token_ids
            if self._is_encoder_decoder:
                decoder_ids = np.concatenate([[self._decoder_start], token_ids[:-1]])
                inputs["decoder_input_ids"] = self._batch(decoder_ids)
            with self._watch as watch:
                output = self._run(**inputs, use_cache=False)
            predicted_ids = None
            if options.with_predictions:
                predicted_ids = output.logits[0].argmax(dim=-1).to(torch.int32).cpu().numpy()
            seen = watch.clear()
            return [
                reader.routing(reader.read(seen), token_ids, None, options)
                if reader.stack.name == "encoder"
                else reader.routing(reader.read(seen), decoder_ids, predicted_ids, options)
                for reader in self._readers
            ]

    def notes(self) -> list[str]:
        """Return what a reader of the traces so far should know about them."""
        notes = []
        guesses = [path for reader in self._readers for path in reader.guesses]
        if guesses:
            notes.append(
                f"{len(guesses)} routers show only logits (the first is {guesses[0]}): their "
                "largest are taken for the choice, which is wrong if the model adds a bias to them "
                "or limits groups of experts"
            )
        dropped = sum(reader.num_dropped for reader in self._readers)
        if dropped:
            notes.append(
                f"{dropped} choices were not computed, because the expert had more tokens than its "
                "capacity; they are in the trace, with weight 0"
            )
        if self._wrong:
            notes.append(
                f"transformers {transformers.__version__} does not compute the experts that this "
                f"model's routers choose ({self._wrong[0]} and {len(self._wrong) - 1} more): the "
                "trace holds the routers' choices, but those of later layers follow from wrong "
                "hidden states"
            )
        return notes

    def close(self) -> None:
        """Take the hooks out of the model."""
        self._watch.close()

    def _decode(
        self, prompt: NDArray[np.int32], options: TraceOptions, seed: int
    ) -> list[SequenceRouting]:
        decoder_inputs: dict[str, Any] = {}
        routings = []
        ids = self._batch(prompt)
        if self._is_encoder_decoder:
            with self._watch as watch:
                encoder_outputs = self._model.get_encoder()(input_ids=ids)
            decoder_inputs["encoder_outputs"] = encoder_outputs
            seen = watch.clear()
            routings = [
                reader.routing(reader.read(seen), prompt, None, options)
                for reader in self._readers
                if reader.stack.name == "encoder"
            ]
            ids = self._batch(np.array([self._decoder_start]))
        for reader in self._readers:
            if reader.stack.name != "encoder":
                routings.append(
                    decode(self._run, self._watch, reader, ids, decoder_inputs, options, seed)
                )
        return routings

    def _run(self, **inputs: Any) -> Any:
        """Run the model; what its code raises becomes one of our exceptions."""
        try:
            return self._model(**inputs)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"{self.model_name} needs more memory: {error}") from error
        except Exception as error:  # whatever the code of a model raises
            raise UnsupportedModelError(
                f"{self.model_name} ({type(self._model).__name__}) does not run in transformers "
                f"{transformers.__version__}: {type(error).__name__}: {error}"
            ) from error

    def _batch(self, token_ids: NDArray[Any]) -> torch.Tensor:
        ids = torch.from_numpy(np.asarray(token_ids, np.int64))
        return ids[None].to(next(self._model.parameters()).device)

    def _token(self, name: str) -> int | None:
        owners = (
            self._model.config,
            self._model.config.get_text_config(),
            getattr(self._model, "generation_config", None),
        )
        for owner in owners:
            value = getattr(owner, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if isinstance(value, int) and 0 <= value < self.vocab_size:
                return value
        return None

    @cached_property
    def _decoder_start(self) -> int:
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            if (token := self._token(name)) is not None:
                return token
        return 0

    def _probe(self, top_k: int | None) -> list[StackReader]:
        """Run a few tokens through the model and see which routers are used, and how."""
        routers = find_routers(self._model)
        num_tokens = min(_PROBE_TOKENS, self._max_tokens or _PROBE_TOKENS)
        tokens = np.random.default_rng(0).integers(0, self.vocab_size, num_tokens)
        inputs = {"input_ids": self._batch(tokens)}
        if self._is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        self._watch = Watch(routers)
        calls = ExpertCalls(routers)
        with torch.inference_mode(), self._watch as watch, calls.counting():
            self._run(**inputs, use_cache=False)
        seen = watch.clear()
        self._watch.close()
        used = {id(observation.router) for observation in seen}
        routers = [router for router in routers if id(router) in used]  # not those for pictures
        if not routers:
            raise UnsupportedModelError(
                f"{self.model_name} ({type(self._model).__name__}) has no router that is known as "
                "one: is it a Mixture-of-Experts model?"
            )
        self._watch = Watch(routers)
        names = ("encoder", "decoder") if self._is_encoder_decoder else (None,)
        readers = []
        for name in names:
            own = [router for router in routers if name is None or router.stack == name]
            if own:
                readers.append(StackReader(name, own, seen, top_k))
        self._wrong = [
            router.path
            for reader in readers
            for router, choices in zip(reader.routers, reader.read(seen), strict=True)
            if calls.differ(router, choices)
        ]
        return readers
