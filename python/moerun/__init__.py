"""Run Mixture-of-Experts models from safetensors checkpoints.

>>> import moerun
>>> model = moerun.Model.load()
>>> prompt = model.tokenizer.encode("import os\\n")
>>> text = model.tokenizer.decode(list(model.generate(prompt, max_new_tokens=16)))
"""

import importlib
from types import ModuleType

from moerun import errors
from moerun._moerun import __version__, build_info
from moerun.batch import Batch, BatchResult
from moerun.boundary import guard
from moerun.cache_control import CacheEvent, RoutingWindow
from moerun.cache_options import dry_run
from moerun.generation import Generation
from moerun.hub import default_model
from moerun.model import Model
from moerun.packs import pack_folder, remove_pack
from moerun.simulation import Simulation, SimulationCosts, simulate
from moerun.tokenizer import Tokenizer
from moerun.trace import SequenceRouting, Trace, TraceWriter

__all__ = [
    "Batch",
    "BatchResult",
    "CacheEvent",
    "Generation",
    "Model",
    "RoutingWindow",
    "SequenceRouting",
    "Simulation",
    "SimulationCosts",
    "Tokenizer",
    "Trace",
    "TraceWriter",
    "__version__",
    "build_info",
    "default_model",
    "dry_run",
    "errors",
    "pack_folder",
    "remove_pack",
    "simulate",
]

# Imported when first asked for: polars and what it needs take longer than all of the above.
_LAZY_MODULES = ("metrics", "planning", "predictor", "recording")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"moerun.{name}")
    raise AttributeError(f"module 'moerun' has no attribute {name!r}")


guard(__all__, __name__)
