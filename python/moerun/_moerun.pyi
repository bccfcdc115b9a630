"""Types of the native module; `moerun.Model` is the documented face of it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str
DEVICES: tuple[str, ...]

class Generation(Iterator[int]):
    prompt_tokens: int

    def __iter__(self) -> Generation: ...
    def __next__(self) -> int: ...

class BatchGeneration:
    def __init__(
        self,
        model: Model,
        *,
        batch_size: int,
        kv_budget: str,
        schedule: str,
        predictor: str,
        model_id: str,
        tokenizer_hash: str,
    ) -> None: ...
    def add(
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
    ) -> int: ...
    def step(self) -> list[tuple[int, int, bool]]: ...
    def cancel(self, sequence: int) -> None: ...

class Model:
    config: dict[str, Any]
    context_length: int
    device: str

    def __init__(
        self,
        path: str | bytes,
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
        pin_limit: str | None = None,
        host_tier: str | None = None,
        sync_times: bool = False,
        routing_replay: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None,
    ) -> None: ...
    def forward(self, token_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], str]: ...
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
    def decode_tokens(self) -> int: ...
    def reconfigure(self, plan: str, plan_text: str = "") -> dict[str, Any]: ...
    def residents(self) -> dict[int, list[int]]: ...
    def routing_window(self) -> dict[str, NDArray[Any]]: ...
    def cache_events(self) -> list[tuple[int, int, int, str]]: ...
    def take_cache_events(self) -> list[tuple[int, int, int, str]]: ...
    def close(self) -> None: ...

class PathState:
    num_tokens: int
    bytes: int

    def clear(self) -> None: ...

class PathPredictor:
    memory_bytes: int

    def __init__(
        self,
        path: str | bytes,
        *,
        threads: int,
        cpu_kernels: str = "auto",
        model_id: str = "",
        tokenizer_hash: str = "",
        vocab_size: int = 0,
        num_experts: int = 0,
        top_k: int = 0,
    ) -> None: ...
    def make_state(self) -> PathState: ...
    def predict(self, token_ids: NDArray[np.int64], /) -> NDArray[np.float32]: ...
    def advance(
        self, states: list[PathState], new_tokens: list[NDArray[np.int64]], /
    ) -> NDArray[np.float32]: ...

class TraceArrays:
    def __init__(
        self,
        expert_ids: NDArray[np.uint16] | NDArray[np.uint8],
        lengths: NDArray[np.int32],
        num_experts: int,
    ) -> None: ...

def check_expert_ids(
    expert_ids: NDArray[np.uint16] | NDArray[np.uint8], lengths: NDArray[np.int32], num_experts: int
) -> None: ...
def layer_histograms(
    trace: TraceArrays, segment_length: int, threads: int, /
) -> NDArray[np.uint64]: ...
def expert_histograms(
    trace: TraceArrays, segment_length: int, threads: int, /
) -> NDArray[np.uint64]: ...
def expert_histograms_by_sequence(
    trace: TraceArrays, layer: int, segment_length: int, threads: int, /
) -> NDArray[np.uint32]: ...
def srp(
    histograms: NDArray[np.uint64], /
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]: ...
def replay_hits(
    trace: TraceArrays, policy: str, segment_length: int, one_pool: bool, threads: int, /
) -> NDArray[np.uint64]: ...
def slot_hits(
    trace: TraceArrays, policy: str, restart: bool, threads: int, /
) -> NDArray[np.uint64]: ...
def policy_hits(
    policy: str,
    num_experts: int,
    start: NDArray[np.uint16],
    tokens: NDArray[np.uint16],
    static_experts: list[int],
    /,
) -> NDArray[np.uint64]: ...
def fit_transfer(samples: list[tuple[float, float, float]], /) -> tuple[float, float]: ...

class Planner:
    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        records: int,
        record_bytes: int,
        attention_s: Sequence[float],
        moe_s: Sequence[float],
        prompt_s: Sequence[float],
        head_s: float,
        link_fixed_s: float,
        link_bytes_per_s: float,
        link_channels: int = 1,
        slowdown: float = 0.0,
        wake_s: float = 0.0,
        hit_rate: NDArray[np.float64],
        correctness: NDArray[np.float64],
        missing: NDArray[np.float64] | None = None,
        absent: NDArray[np.float64] | None = None,
        absent_right: NDArray[np.float64] | None = None,
        move_pieces: NDArray[np.float64] | None = None,
        move_bytes: NDArray[np.float64] | None = None,
        split: float,
    ) -> None: ...
    def divide(self, bytes: int, /) -> list[tuple[int, int]]: ...
    def uniform(self, bytes: int, split: float, /) -> list[tuple[int, int]]: ...
    def estimate(self, settings: list[tuple[int, int]], /) -> dict[str, Any]: ...
    def prompt_seconds(
        self, settings: list[tuple[int, int]], tokens: int, chunk: int, /
    ) -> float: ...
    def bytes_of(self, settings: list[tuple[int, int]], /) -> int: ...

def likeliest_paths(probabilities: NDArray[np.float32], top_k: int, /) -> NDArray[np.uint64]: ...
def split_batches(
    paths: NDArray[np.uint64], num_bits: int, sizes: list[int], /
) -> list[list[int]]: ...
def num_active_experts(
    paths: NDArray[np.uint64], num_bits: int, sequences: list[int], /
) -> int: ...
def slot_statistics(
    trace: TraceArrays,
    guesses: NDArray[np.uint16] | None,
    policy: str,
    ranking: NDArray[np.uint16] | None,
    restart: bool,
    threads: int,
    /,
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]: ...
def move_sizes(
    path: str | bytes, **options: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
def num_activations(trace: TraceArrays, threads: int, /) -> NDArray[np.uint64]: ...
def window_deviations(
    trace: TraceArrays, segment_length: int, threads: int, /
) -> NDArray[np.float64]: ...
def previous_token_hits(trace: TraceArrays, threads: int, /) -> NDArray[np.uint64]: ...
def layer_pairs(trace: TraceArrays, threads: int, /) -> NDArray[np.uint64]: ...
def previous_layer_hits(
    trace: TraceArrays, weights: NDArray[np.float32], threads: int, /
) -> NDArray[np.uint64]: ...
def trace(
    model: Model,
    token_ids: NDArray[np.int64],
    generate: int,
    temperature: float,
    seed: int,
    with_weights: bool,
    with_logits: bool,
    with_predictions: bool,
    with_prefetch: bool,
) -> dict[str, Any]: ...
def simulate(
    path: str | bytes,
    expert_ids: list[NDArray[np.uint16]],
    prefetch_ids: list[NDArray[np.uint16]] | None,
    token_ids: list[NDArray[np.int32]] | None,
    *,
    num_experts: int | None,
    top_k: int | None,
    moe_layers: list[int] | None,
    prompt_tokens: int,
    attention_s: list[float],
    moe_s: list[float],
    prompt_s: list[float],
    head_s: float,
    link_fixed_s: float,
    link_bytes_per_s: float,
    link_channels: int,
    slowdown: float,
    wake_s: float,
    predict_s: float,
    belady: bool,
    batch_size: int,
    schedule: str,
    predictor: str,
    model_id: str,
    tokenizer_hash: str,
    **options: Any,
) -> dict[str, Any]: ...
def layer_times(model: Model) -> dict[str, NDArray[Any]]: ...
def measure_transfers(
    model: Model, layer: int, experts: list[int], first_record: int
) -> tuple[int, int, float]: ...
def num_usable_cpus() -> int: ...
def moe_layers(model: Model) -> list[int]: ...
def remove_record_files(path: str | bytes, folder: str | bytes) -> list[tuple[bytes, int]]: ...
def dry_run(
    path: str | bytes,
    *,
    device: str = "auto",
    threads: int | None = None,
    context_length: int | None = None,
    expert_budget: str | None = None,
    policy: str | None = None,
    split: list[float] | None = None,
    prefetch: str | None = None,
    plan: str | None = None,
    pin_limit: str | None = None,
    host_tier: str | None = None,
) -> dict[str, Any]: ...
def choose_device(requested: str) -> str: ...
def build_info() -> dict[str, Any]: ...
def model_config(path: str | bytes) -> dict[str, Any]: ...
def checkpoint_fingerprint(path: str | bytes) -> tuple[str, str, list[bytes]]: ...
def measure_read_bandwidth(threads: int, bytes: int) -> float: ...
def device_bandwidth(device: str, bytes: int) -> dict[str, float]: ...
