"""Groups and figures of the study that SRP and SCH come from (arXiv 2505.16056)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moerun.metrics import independent_srp

GROUP_LENGTH = 16  # tokens; the study groups models by SRP at this segment length


@dataclass(frozen=True)
class Group:
    """A range of SRP(16), and what the study concludes from it."""

    name: str
    lowest: float
    label: str


GROUPS = (
    Group("suits", 0.50, "suits offloading"),
    Group("usable", 0.45, "usable"),
    Group("poor", 0.35, "poor"),
    Group("unsuitable", 0.0, "unsuitable"),
)


@dataclass(frozen=True)
class PublishedModel:
    """SRP(16), and SCH with a cache of twice the experts of one token, of a model in the study."""

    name: str
    srp: float
    sch: float
    num_experts: int
    top_k: int

    @property
    def srp_chance_even(self) -> float:
        """SRP(16) of independent routing that uses all of its experts equally often."""
        share = np.full((1, 1), self.top_k / self.num_experts)
        return float(independent_srp(share, GROUP_LENGTH).item())


PUBLISHED = (
    PublishedModel("Qwen3-30B-A3B", 0.541, 0.770, 128, 8),
    PublishedModel("OLMoE", 0.509, 0.741, 64, 8),
    PublishedModel("Mixtral-8x7B", 0.494, 0.742, 8, 2),
    PublishedModel("DeepSeek-V2-Lite", 0.379, 0.581, 64, 6),
    PublishedModel("Qwen1.5-MoE", 0.307, 0.461, 60, 4),
)


def neighbours(srp: float) -> tuple[PublishedModel | None, PublishedModel | None]:
    """Return the published model next above and next below an SRP(16)."""
    above: Sequence[PublishedModel] = [model for model in PUBLISHED if model.srp > srp]
    below: Sequence[PublishedModel] = [model for model in PUBLISHED if model.srp <= srp]
    return (above[-1] if above else None, below[0] if below else None)
