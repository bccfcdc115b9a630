"""Local routing consistency, cache hit rates and expert specialisation of a trace.

Every function takes a `moerun.Trace`, reads it file by file, and returns a polars frame; see
docs/metrics.md for the definitions and their sources.
"""

from moerun.boundary import guard
from moerun.metrics.cache_hits import hit_rate
from moerun.metrics.chance import independent_srp, independent_variation
from moerun.metrics.chance_hits import chance_hit_rate
from moerun.metrics.expert_load import activation_rates, load_balance
from moerun.metrics.expert_roles import specialization
from moerun.metrics.local_consistency import srp
from moerun.metrics.predictors import predictability
from moerun.metrics.suitability import Verdict, verdict

__all__ = [
    "Verdict",
    "activation_rates",
    "chance_hit_rate",
    "hit_rate",
    "independent_srp",
    "independent_variation",
    "load_balance",
    "predictability",
    "specialization",
    "srp",
    "verdict",
]

guard(__all__, __name__)
