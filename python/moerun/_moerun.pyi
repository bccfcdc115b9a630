"""Types of the native module; `moerun.Model` is the documented face of it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str

class Generation(Iterator[int]):
    prompt_tokens: int

    def __iter__(self) -> Generation: ...
    def __next__(self) -> int: ...

class Model:
    config: dict[str, Any]
    context_length: int
    device: str

    def __init__(
        self,
        path: str,
        *,
        device: str = "auto",
        threads: int | None = None,
        context_length: int | None = None,
        prefill_chunk: int = 512,
        cpu_kernels: str = "auto",
        progress: Callable[[int, int], None] | None = None,
        expert_budget: str | None = None,
        policy: str | None = None,
        split: list[float] | None = None,
        prefetch: str | None = None,
        plan: str | None = None,
        pack_folder: str | None = None,
        cache_events: bool = False,
    ) -> None: ...
    def forward(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]: ...
    def generate(
        self,
        token_ids: NDArray[np.int64],
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        seed: int,
        stop_token_ids: list[int],
    ) -> Generation: ...
    def stats(self) -> dict[str, Any]: ...
    def cache_events(self) -> list[tuple[int, int, int, str]]: ...
    def close(self) -> None: ...

def activation_counts(
    expert_ids: NDArray[np.uint16], num_experts: int, segment_length: int
) -> NDArray[np.uint64]: ...
def srp(histogram: NDArray[np.uint64]) -> dict[str, float]: ...
def hits_by_capacity(
    expert_ids: NDArray[np.uint16], num_experts: int, policy: str, segment_length: int = 16
) -> NDArray[np.uint64]: ...
def remove_record_files(model: str, folder: str) -> int: ...
def dry_run(
    path: str,
    *,
    device: str = "auto",
    threads: int | None = None,
    context_length: int | None = None,
    expert_budget: str | None = None,
    policy: str | None = None,
    split: list[float] | None = None,
    prefetch: str | None = None,
    plan: str | None = None,
) -> dict[str, Any]: ...
def build_info() -> dict[str, Any]: ...
def model_config(path: str) -> dict[str, Any]: ...
def measure_read_bandwidth(threads: int, bytes: int) -> float: ...
