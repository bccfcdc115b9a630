"""The C interface (`moerun.h`) through ctypes: the same runtime without any C++ or pybind11.

For callers who embed libmoerun, and a reference for bindings in other languages. Python programs
have more of everything in `moerun.Model`.

>>> from moerun import capi, default_model
>>> with capi.Model(default_model()) as model:
...     tokens = list(model.generate([1, 2, 3], max_new_tokens=8))
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun import errors

_OK = 0
_END = 1
_EXCEPTIONS: dict[int, type[errors.MoerunError]] = {
    -1: errors.InvalidArgumentError,
    -2: errors.FileError,
    -3: errors.FormatError,
    -4: errors.UnsupportedModelError,
    -5: errors.OutOfMemoryError,
    -7: errors.DeviceError,
    -8: errors.ForkError,
}


class _Options(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("device", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("context_length", ctypes.c_int64),
        ("prefill_chunk", ctypes.c_int64),
        ("cpu_kernels", ctypes.c_char_p),
    )


class _Sampling(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("max_new_tokens", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("repetition_penalty", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("stop_token_ids", ctypes.POINTER(ctypes.c_int32)),
        ("num_stop_token_ids", ctypes.c_size_t),
    )


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Load libmoerun.so of this package and declare its functions.

    Raises:
        MissingFileError: the package was built without it.
    """
    path = Path(__file__).parent / "libmoerun.so"
    if not path.exists():
        raise errors.MissingFileError(f"{path}: not found; reinstall moerun")
    loaded = ctypes.CDLL(str(path))
    handle = ctypes.c_void_p
    size = ctypes.c_size_t
    ids = ctypes.POINTER(ctypes.c_int32)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "moerun_version": (ctypes.c_char_p, []),
        "moerun_last_error": (ctypes.c_char_p, []),
        "moerun_options_default": (ctypes.c_int, [ctypes.POINTER(_Options), size]),
        "moerun_sampling_default": (ctypes.c_int, [ctypes.POINTER(_Sampling), size]),
        "moerun_open": (
            ctypes.c_int,
            [ctypes.c_char_p, ctypes.POINTER(_Options), ctypes.POINTER(handle)],
        ),
        "moerun_close": (None, [handle]),
        "moerun_vocab_size": (ctypes.c_int64, [handle]),
        "moerun_context_length": (ctypes.c_int64, [handle]),
        "moerun_forward": (
            ctypes.c_int,
            [handle, ids, size, ctypes.POINTER(ctypes.c_float), size],
        ),
        "moerun_generate": (
            ctypes.c_int,
            [handle, ids, size, ctypes.POINTER(_Sampling), ctypes.POINTER(handle)],
        ),
        "moerun_generation_next": (ctypes.c_int, [handle, ids]),
        "moerun_generation_close": (None, [handle]),
        "moerun_stats_json": (ctypes.c_int, [handle, ctypes.c_char_p, size, ctypes.POINTER(size)]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype = result
        function.argtypes = arguments
    return loaded


def version() -> str:
    """Return the version of the library."""
    text: bytes = library().moerun_version()
    return text.decode()


def _check(status: int) -> None:
    if status not in (_OK, _END):
        text = library().moerun_last_error().decode(errors="replace")
        raise _EXCEPTIONS.get(status, errors.MoerunError)(text)


def _id_array(token_ids: Sequence[int] | NDArray[Any], name: str = "token_ids") -> Any:
    try:
        array = np.asarray(token_ids, dtype=np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise errors.InvalidArgumentError(f"{name}: expected integers: {error}") from None
    if array.ndim != 1:
        raise errors.InvalidArgumentError(f"{name}: expected one dimension, found {array.shape}")
    limits = np.iinfo(np.int32)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise errors.InvalidArgumentError(f"{name}: an id does not fit 32 bits")
    return (ctypes.c_int32 * len(array))(*array.tolist())


def _set(structure: ctypes.Structure, **values: Any) -> None:
    """Fill fields of a structure; ctypes would cut off the bits of a number that do not fit."""
    for name, value in values.items():
        try:
            setattr(structure, name, value)
        except TypeError as error:
            raise errors.InvalidArgumentError(f"{name}: {error}, found {value!r}") from None
        if isinstance(value, int) and getattr(structure, name) != value:
            raise errors.InvalidArgumentError(
                f"{name}: expected a number of the C type's range, found {value}"
            )


class Model:
    """A model opened through the C interface; a context manager."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str = "auto",
        threads: int = 0,
        context_length: int = 0,
        prefill_chunk: int = 512,
        cpu_kernels: str = "auto",
    ) -> None:
        """Open the model in directory `path`; see `moerun.Model.load` for the arguments.

        0 threads means one a usable core, context_length 0 what the model was made for.
        """
        options = _Options()
        _check(library().moerun_options_default(ctypes.byref(options), ctypes.sizeof(options)))
        options.device = device.encode()
        _set(
            options,
            threads=threads,
            context_length=context_length,
            prefill_chunk=prefill_chunk,
        )
        options.cpu_kernels = cpu_kernels.encode()
        self._handle = ctypes.c_void_p()
        _check(
            library().moerun_open(
                os.fsencode(path), ctypes.byref(options), ctypes.byref(self._handle)
            )
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(library().moerun_vocab_size(self._handle))

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return int(library().moerun_context_length(self._handle))

    def forward(self, token_ids: Sequence[int] | NDArray[Any]) -> NDArray[np.float32]:
        """Return the logits after each of T tokens, of shape (T, vocab_size)."""
        ids = _id_array(token_ids)
        logits = np.empty((len(ids), self.vocab_size), dtype=np.float32)
        pointer = logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        _check(library().moerun_forward(self._handle, ids, len(ids), pointer, logits.size))
        return logits

    def generate(
        self,
        token_ids: Sequence[int] | NDArray[Any],
        *,
        max_new_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_token_ids: Sequence[int] | None = None,
    ) -> Iterator[int]:
        """Yield the tokens that continue a prompt; see `moerun.Model.generate`.

        max_new_tokens 0 goes on until a stop token or a full context; stop_token_ids None takes
        the model's own end-of-sequence tokens.
        """
        ids = _id_array(token_ids)
        sampling = _Sampling()
        _check(library().moerun_sampling_default(ctypes.byref(sampling), ctypes.sizeof(sampling)))
        _set(
            sampling,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        if stop_token_ids is not None:
            # One more than there are, for an empty list must not be a null pointer.
            stops = _id_array([*stop_token_ids, 0], "stop_token_ids")
            sampling.stop_token_ids = ctypes.cast(stops, ctypes.POINTER(ctypes.c_int32))
            sampling.num_stop_token_ids = len(stop_token_ids)
        generation = ctypes.c_void_p()
        _check(
            library().moerun_generate(
                self._handle, ids, len(ids), ctypes.byref(sampling), ctypes.byref(generation)
            )
        )
        return self._tokens(generation)

    @staticmethod
    def _tokens(generation: ctypes.c_void_p) -> Iterator[int]:
        token = ctypes.c_int32()
        try:
            while True:
                status = library().moerun_generation_next(generation, ctypes.byref(token))
                _check(status)
                if status == _END:
                    return
                yield token.value
        finally:
            library().moerun_generation_close(generation)

    def stats(self) -> dict[str, Any]:
        """Return statistics of the model and its last generation."""
        length = ctypes.c_size_t()
        _check(library().moerun_stats_json(self._handle, None, 0, ctypes.byref(length)))
        buffer = ctypes.create_string_buffer(length.value + 1)
        _check(library().moerun_stats_json(self._handle, buffer, len(buffer), ctypes.byref(length)))
        result: dict[str, Any] = json.loads(buffer.value)
        return result

    def close(self) -> None:
        """Give the memory back; the model cannot be used afterwards."""
        if self._handle:
            library().moerun_close(self._handle)
            self._handle = ctypes.c_void_p()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()
