"""Loads what runs the model of moe-trace record."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from moerun.errors import InvalidArgumentError, UnsupportedModelError
from moerun.hub import resolve_model
from moerun.identity import name_of
from moerun.recording import Engine, NativeEngine, load_transformers
from moerun.user_files import user_path
from moerun_tools.cache_options import cache_arguments
from moerun_tools.loading import load_model
from moerun_tools.trace_options import CACHE_OPTIONS


@contextlib.contextmanager
def open_engine(
    *,
    engine: str,
    model: str | None,
    device: str,
    threads: int | None,
    tokens: int,
    seed: int,
    quiet: bool,
    random_init: bool,
    layers: int | None,
    dtype: str,
    trust_remote_code: bool,
    cache_events: bool,
    **cache: Any,
) -> Iterator[Engine]:
    """Load a model; `tokens` is how long the longest text becomes.

    Raises:
        MoerunError: the engine cannot run the model.
    """
    if engine == "transformers":
        _quieten_transformers(quiet)
        loaded = load_transformers(
            model,
            device=device,
            threads=threads,
            dtype=dtype,
            random_init=random_init,
            num_layers=layers,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        with contextlib.closing(loaded):
            yield loaded
        return
    if model is not None and user_path(model).is_file():
        raise InvalidArgumentError(
            f"{model} is a file, not the directory of a model; for a configuration alone add "
            "--engine transformers --random-init"
        )
    directory = resolve_model(model)
    try:
        native = load_model(
            directory,
            quiet,
            device=device,
            threads=threads,
            context_length=tokens,
            cache_events=cache_events,
            **cache_arguments(*(cache[name] for name in CACHE_OPTIONS)),
        )
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error}. Try --engine transformers") from error
    except InvalidArgumentError as error:
        if "context_length" not in str(error):
            raise
        raise InvalidArgumentError(
            f"--length and --generate together are {tokens} tokens, more than the model allows: "
            f"{error}"
        ) from error
    with native:
        if cache_events and native.stats()["cache"]["state"] != "cached":
            raise InvalidArgumentError(
                "--cache-events: every expert is in memory, so there is nothing to record; give a "
                "smaller --expert-budget"
            )
        is_repository = model is not None and not user_path(model).is_dir()
        yield NativeEngine(native, str(model) if is_repository else name_of(directory.resolve()))


def _quieten_transformers(quiet: bool) -> None:
    """Keep its warnings out of the terminal, and its progress bars out of files."""
    warnings.filterwarnings("ignore", module=r"(torch|transformers)(\.|$)")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        try:
            from transformers.utils import logging
        except ImportError:  # said when the engine is loaded
            return
        logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
