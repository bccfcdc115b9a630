"""Recording of traces: data, engines, and the loop that brings them together.

>>> from moerun import Model
>>> from moerun.recording import NativeEngine, default_data, record
>>> with Model.load() as model:
...     summary = record(NativeEngine(model, "tiny-olmoe"), default_data(), "t.safetensors")

`TransformersEngine` needs torch and transformers: `load_transformers` imports them and says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moerun.boundary import guard
from moerun.errors import UnsupportedModelError
from moerun.recording.data import DataSource, FileData, RandomTokens, TextData, default_data
from moerun.recording.engine import Engine, Stack, TraceOptions
from moerun.recording.native_engine import NativeEngine
from moerun.recording.record import (
    RecordingInterrupted,
    RecordingSummary,
    check_output,
    record,
)
from moerun.recording.study_import import import_study

if TYPE_CHECKING:
    from moerun.recording.transformers_engine import TransformersEngine

__all__ = [
    "DataSource",
    "Engine",
    "FileData",
    "NativeEngine",
    "RandomTokens",
    "RecordingInterrupted",
    "RecordingSummary",
    "Stack",
    "TextData",
    "TraceOptions",
    "check_output",
    "default_data",
    "import_study",
    "load_transformers",
    "record",
]


def load_transformers(*args: Any, **options: Any) -> TransformersEngine:
    """Return `TransformersEngine.load(...)`, which has the same arguments.

    Raises:
        UnsupportedModelError: torch or transformers is not installed, or too old.
    """
    try:
        from moerun.recording.transformers_engine import TransformersEngine
    except ImportError as error:
        raise UnsupportedModelError(
            f"the engine transformers needs torch and transformers 5, and they cannot be imported: "
            f"{error}. Install them with: pip install torch transformers"
        ) from error
    return TransformersEngine.load(*args, **options)


guard(__all__, __name__)
