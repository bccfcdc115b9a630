"""Traces: which experts every token of many sequences used, in files.

`Trace.open` reads one, `TraceWriter` writes one, `SequenceRouting` is what goes in.
"""

from moerun.boundary import guard
from moerun.trace.reader import Trace, TraceShard
from moerun.trace.routing import CACHE_EVENT_KINDS, NO_PREDICTION, SequenceRouting
from moerun.trace.writer import TraceWriter

__all__ = [
    "CACHE_EVENT_KINDS",
    "NO_PREDICTION",
    "SequenceRouting",
    "Trace",
    "TraceShard",
    "TraceWriter",
]

guard(__all__, __name__)
