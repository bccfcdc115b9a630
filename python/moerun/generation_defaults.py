"""How a model's own generation_config.json wants its texts generated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerun.errors import FormatError
from moerun.json_text import read_json_object

_FILE = "generation_config.json"
_MAX_BYTES = 1 << 20
_MAX_INT = 2**31 - 1
# transformers samples among so many tokens where a file that samples names no top_k.
_TOP_K_WHEN_SAMPLING = 50

# Fields that change which tokens are taken, and the values with which they change nothing.
_NOT_COMPUTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "diversity_penalty": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_length": (20,),  # what old files repeat of transformers' own default
    "max_time": (),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ([], {}),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """Arguments of `Model.generate` that the model itself names, and what it asks for in vain.

    Attributes:
        temperature: 0 where the file does not say do_sample.
        max_new_tokens: None: the file has no limit.
        top_k, top_p, min_p, repetition_penalty: as of `Model.generate`.
        stop: texts that end a text.
        notes: a sentence for each field that changes texts and that moerun does not compute.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of_model(cls, directory: Path) -> GenerationDefaults:
        """Read generation_config.json of a model as transformers understands it.

        Without the file, the likeliest token is always taken.

        Raises:
            FileError: the file cannot be read.
            FormatError: it is no JSON object, or a field has a value that means nothing.
        """
        path = directory / _FILE
        if not path.is_file():
            return cls()
        fields = _Fields(path, read_json_object(path, _MAX_BYTES))
        samples = fields.flag("do_sample")
        temperature = fields.number("temperature", 1.0, lambda value: value >= 0, "0 or above")
        return cls(
            temperature=temperature if samples else 0.0,
            top_k=fields.integer("top_k", _TOP_K_WHEN_SAMPLING if samples else 0, 0) or 0,
            top_p=fields.number("top_p", 1.0, lambda v: 0 < v <= 1, "above 0 and at most 1"),
            min_p=fields.number("min_p", 0.0, lambda v: 0 <= v <= 1, "from 0 to 1"),
            repetition_penalty=fields.number("repetition_penalty", 1.0, lambda v: v > 0, "above 0"),
            max_new_tokens=fields.integer("max_new_tokens", None, 1),
            stop=fields.texts("stop_strings"),
            notes=fields.not_computed(),
        )

    def merged(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments `given`, with the model's own in place of those that are None.

        A temperature of 0 that is given is plain greedy decoding: the model's other settings of
        sampling belong to its own temperature, and are left out.
        """
        temperature = given.get("temperature")
        if isinstance(temperature, int | float) and temperature == 0:
            plain = GenerationDefaults(max_new_tokens=self.max_new_tokens, stop=self.stop)
            if plain != self:
                return plain.merged(given)
        own = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": list(self.stop),
        }
        return {
            name: own.get(name) if value is None else value
            for name, value in {**own, **given}.items()
        }


@dataclass(frozen=True)
class _Fields:
    """Fields of the file; one that is null counts as absent, as in transformers."""

    path: Path
    values: dict[str, Any]

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return bool(value)

    def number(
        self, name: str, absent: float, allows: Callable[[float], bool], expected: str
    ) -> float:
        value = self.values.get(name)
        if value is None:
            return absent
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, f"a number {expected}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or not allows(number):
            raise self._wrong(name, f"a number {expected}")
        return number

    def integer(self, name: str, absent: int | None, least: int) -> int | None:
        value = self.values.get(name)
        if value is None:
            return absent
        is_whole = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_whole or value != value or not least <= value <= _MAX_INT or value != int(value):
            raise self._wrong(name, f"a whole number of at least {least}")
        return int(value)

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name)
        texts = [value] if isinstance(value, str) else value or []
        if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
            raise self._wrong(name, "a text or a list of texts")
        return tuple(texts)

    def not_computed(self) -> tuple[str, ...]:
        asked = [
            f"{name} = {_shown(value)}"
            for name, neutral in _NOT_COMPUTED.items()
            if (value := self.values.get(name)) is not None and value not in neutral
        ]
        if not asked:
            return ()
        verb = "is" if len(asked) == 1 else "are"
        return (f"{self.path}: {', '.join(asked)} {verb} left out: moerun does not compute that",)

    def _wrong(self, name: str, expected: str) -> FormatError:
        found = _shown(self.values[name])
        return FormatError(f"{self.path}: field '{name}': expected {expected}, found {found}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
