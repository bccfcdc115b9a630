"""Speed of moerun on one checkpoint, beside the machine's limits and beside transformers.

Both runtimes are measured in processes of their own (this file, called with --worker), which obey
one-line JSON commands; so their memory and threads never mix. Rounds alternate between the two.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

READ_BLOCK_BYTES = 4 << 20
# Large beside any cache: an Emerald Rapids has up to 320 MB of it.
BANDWIDTH_BYTES = 4 << 30
DECODE_PROMPT_TOKENS = 16
WARM_UP_TOKENS = 8
NUM_LOADS = 3
# batched_mm copies the weights of every (token, expert) pair: 34 GB in a prefill of OLMoE.
PEER_EXPERTS = {
    "prefill": ("eager", "grouped_mm"),
    "decode": ("eager", "grouped_mm", "batched_mm"),
}

# --- the machine ---------------------------------------------------------------------------------


def proc_value(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown"


def machine() -> dict[str, Any]:
    return {
        "cpu": proc_value("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def available_bytes() -> int:
    return int(proc_value("/proc/meminfo", "MemAvailable").split()[0]) * 1024


def weight_files(checkpoint: Path) -> list[Path]:
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise click.ClickException(f"{checkpoint} holds no .safetensors file")
    return files


def read_share(
    files: list[Path], thread_idx: int, num_threads: int, target: memoryview | None
) -> int:
    """Reads every `num_threads`-th block of the files, to its place in `target`.

    Without a target, everything goes into one reused buffer, which stays in the cache.
    """
    buffer = memoryview(np.empty(READ_BLOCK_BYTES, dtype=np.uint8))
    num_read = 0
    block_idx = 0
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            for offset in range(0, path.stat().st_size, READ_BLOCK_BYTES):
                if block_idx % num_threads == thread_idx:
                    place = block_idx * READ_BLOCK_BYTES
                    block = target[place : place + READ_BLOCK_BYTES] if target else buffer
                    num_read += os.preadv(descriptor, [block], offset)
                block_idx += 1
        finally:
            os.close(descriptor)
    return num_read


def read_once(files: list[Path], threads: int, into_fresh_memory: bool) -> float:
    """Returns bytes/s of one pass over the files."""
    target = None
    if into_fresh_memory:
        num_blocks = sum(-(-path.stat().st_size // READ_BLOCK_BYTES) for path in files)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has no huge pages
        memory = mmap.mmap(-1, num_blocks * READ_BLOCK_BYTES, flags)
        memory.madvise(mmap.MADV_HUGEPAGE)
        target = memoryview(memory)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        start = time.perf_counter()
        shares = [pool.submit(read_share, files, i, threads, target) for i in range(threads)]
        num_read = sum(share.result() for share in shares)
        return num_read / (time.perf_counter() - start)


def cached_read_rate(files: list[Path], threads: int, into_fresh_memory: bool) -> float:
    """Returns bytes/s of reading the files from the page cache: the median of three passes."""
    # The first pass fills the page cache.
    rates = [read_once(files, threads, into_fresh_memory) for _ in range(4)]
    return statistics.median(rates[1:])


# --- the two sides -------------------------------------------------------------------------------


def prompt_of(num_tokens: int, vocab_size: int) -> list[int]:
    return np.random.default_rng(1).integers(0, vocab_size, num_tokens).tolist()


def median_token_seconds(token_times: list[float]) -> float:
    """Returns the median step, from the times at which tokens arrived, warm-up left out."""
    steps = np.diff(token_times)[WARM_UP_TOKENS:]
    if len(steps) == 0:
        raise RuntimeError("the model stopped before a token was timed; choose another prompt")
    return float(np.median(steps))


class MoerunSide:
    def __init__(self, checkpoint: Path, threads: int) -> None:
        import moerun

        self._vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        self._threads = threads
        self._native = moerun._moerun
        self._build_info = moerun.build_info()
        self._load_seconds = []
        for load_idx in range(NUM_LOADS):
            if load_idx > 0:
                self._model.close()
            start = time.perf_counter()
            self._model = moerun.Model.load(str(checkpoint), device="cpu", threads=threads)
            self._load_seconds.append(time.perf_counter() - start)

    def describe(self) -> dict[str, Any]:
        return {"all_load_seconds": self._load_seconds, "build_info": self._build_info}

    def bandwidth(self) -> dict[str, Any]:
        gb_per_s = self._native.measure_read_bandwidth(self._threads, BANDWIDTH_BYTES)
        return {"bytes_per_s": 1e9 * gb_per_s}

    def prefill(self, num_tokens: int) -> dict[str, Any]:
        ids = prompt_of(num_tokens, self._vocab_size)
        start = time.perf_counter()
        next(iter(self._model.generate(ids, max_new_tokens=1, temperature=0.0)))
        return {"tokens_per_s": num_tokens / (time.perf_counter() - start)}

    def decode(self, num_tokens: int) -> dict[str, Any]:
        ids = prompt_of(DECODE_PROMPT_TOKENS, self._vocab_size)
        times = [
            time.perf_counter()
            for _ in self._model.generate(
                ids, max_new_tokens=1 + WARM_UP_TOKENS + num_tokens, temperature=0.0
            )
        ]
        return {
            "tokens_per_s": 1 / median_token_seconds(times),
            "bytes_per_token": self._model.stats()["decode_bytes_per_token"],
        }


class TransformersSide:
    def __init__(self, checkpoint: Path, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        start = time.perf_counter()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._load_seconds = time.perf_counter() - start
        self._torch = torch
        self._versions = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def describe(self) -> dict[str, Any]:
        return {"load_seconds": self._load_seconds, "versions": self._versions}

    def use(self, experts: str) -> dict[str, Any]:
        self._model.set_experts_implementation(experts)
        return {}

    def _prompt(self, num_tokens: int) -> Any:
        ids = prompt_of(num_tokens, self._model.config.vocab_size)
        return self._torch.tensor([ids], dtype=self._torch.long)

    def prefill(self, num_tokens: int) -> dict[str, Any]:
        ids = self._prompt(num_tokens)
        start = time.perf_counter()
        logits = self._model(ids, use_cache=True, logits_to_keep=1).logits
        int(logits[0, -1].argmax())
        return {"tokens_per_s": num_tokens / (time.perf_counter() - start)}

    def decode(self, num_tokens: int) -> dict[str, Any]:
        """Decodes greedily with the bare model: no generate(), whose loop costs extra."""
        ids = self._prompt(DECODE_PROMPT_TOKENS)
        cache = None
        times = []
        for _ in range(1 + WARM_UP_TOKENS + num_tokens):
            out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            ids = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            int(ids)
            times.append(time.perf_counter())
        return {"tokens_per_s": 1 / median_token_seconds(times)}


SIDES: dict[str, Callable[[Path, int], Any]] = {
    "moerun": MoerunSide,
    "transformers": TransformersSide,
}


def serve(side_name: str, checkpoint: Path, threads: int) -> None:
    """The worker's loop: a JSON list [method, *arguments] a line in, a JSON object a line out."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    side = SIDES[side_name](checkpoint, threads)
    print(json.dumps(side.describe()), file=replies, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            reply = getattr(side, method)(*arguments)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


class WorkerError(Exception):
    pass


class Worker:
    def __init__(self, side_name: str, checkpoint: Path, threads: int) -> None:
        self._side_name = side_name
        command = [sys.executable, __file__, "--worker", side_name]
        command += ["--checkpoint", str(checkpoint), "--threads", str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.description = self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"the {self._side_name} process ended; its message is above")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def call(self, method: str, *arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Workers:
    """Keeps both processes open where both models fit in memory, and restarts them where not."""

    def __init__(self, checkpoint: Path, threads: int, keep_open: bool) -> None:
        self._checkpoint = checkpoint
        self._threads = threads
        self._keep_open = keep_open
        self._open: dict[str, Worker] = {}

    @contextlib.contextmanager
    def use(self, side_name: str) -> Iterator[Worker]:
        if side_name not in self._open:
            self._open[side_name] = Worker(side_name, self._checkpoint, self._threads)
        yield self._open[side_name]
        if not self._keep_open:
            self._open.pop(side_name).close()

    def close(self) -> None:
        for worker in self._open.values():
            worker.close()
        self._open.clear()


# --- the run -------------------------------------------------------------------------------------


def best_peer_experts(worker: Worker, prompt_tokens: int, decode_tokens: int) -> dict[str, Any]:
    """Measures every experts implementation that runs: the best of three, after a warm-up."""
    tokens_per_s: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}}
    for phase, num_tokens in (("prefill", prompt_tokens), ("decode", decode_tokens)):
        for experts in PEER_EXPERTS[phase]:
            try:
                worker.call("use", experts)
                worker.call(phase, num_tokens)
                tokens_per_s[phase][experts] = max(
                    worker.call(phase, num_tokens)["tokens_per_s"] for _ in range(3)
                )
            except WorkerError as error:
                click.echo(f"transformers {experts}, {phase}: {error}", err=True)
    if not all(tokens_per_s.values()):
        raise click.ClickException("transformers runs with no experts implementation")
    return {
        "tokens_per_s": tokens_per_s,
        "best": {phase: max(rates, key=rates.__getitem__) for phase, rates in tokens_per_s.items()},
    }


def measure(
    checkpoint: Path,
    threads: int,
    prompt_tokens: int,
    decode_tokens: int,
    rounds: int,
    skip_peer: bool,
) -> dict[str, Any]:
    files = weight_files(checkpoint)
    checkpoint_bytes = sum(path.stat().st_size for path in files)
    read_rate = cached_read_rate(files, threads, into_fresh_memory=False)
    fresh_read_rate = cached_read_rate(files, threads, into_fresh_memory=True)
    workers = Workers(checkpoint, threads, keep_open=2.5 * checkpoint_bytes < available_bytes())
    samples: dict[str, list[dict[str, Any]]] = {
        f"{side}_{phase}": []
        for side in ("moerun", "transformers")
        for phase in ("prefill", "decode")
    }
    bandwidths: list[float] = []
    peer: dict[str, Any] = {}
    try:
        with workers.use("moerun") as worker:
            ours = worker.description
            worker.call("prefill", prompt_tokens)  # warm-up
        if not skip_peer:
            with workers.use("transformers") as worker:
                peer = worker.description
                peer |= best_peer_experts(worker, prompt_tokens, decode_tokens)
        for round_idx in range(rounds):
            click.echo(f"round {round_idx + 1} of {rounds}", err=True)
            with workers.use("moerun") as worker:
                bandwidths.append(worker.call("bandwidth")["bytes_per_s"])
                samples["moerun_prefill"].append(worker.call("prefill", prompt_tokens))
                samples["moerun_decode"].append(worker.call("decode", decode_tokens))
            if skip_peer:
                continue
            with workers.use("transformers") as worker:
                worker.call("use", peer["best"]["prefill"])
                samples["transformers_prefill"].append(worker.call("prefill", prompt_tokens))
                worker.call("use", peer["best"]["decode"])
                samples["transformers_decode"].append(worker.call("decode", decode_tokens))
    finally:
        workers.close()

    def tokens_per_s(name: str) -> float:
        return statistics.median(sample["tokens_per_s"] for sample in samples[name])

    bytes_per_token = statistics.median(s["bytes_per_token"] for s in samples["moerun_decode"])
    decode_bytes_per_s = bytes_per_token * tokens_per_s("moerun_decode")
    bandwidth = max(bandwidths)  # it is a limit: the best of the rounds
    load_seconds = statistics.median(ours["all_load_seconds"])
    load_rate = checkpoint_bytes / load_seconds
    result = {
        "machine": machine(),
        "checkpoint": str(checkpoint),
        "checkpoint_bytes": checkpoint_bytes,
        "threads": threads,
        "rounds": rounds,
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
        "build_info": ours["build_info"],
        "read_bandwidth_bytes_per_s": bandwidth,
        "cached_read_bytes_per_s": read_rate,
        "load_seconds": load_seconds,
        "all_load_seconds": ours["all_load_seconds"],
        "load_bytes_per_s": load_rate,
        "load_share_of_cached_read": load_rate / read_rate,
        "fresh_read_bytes_per_s": fresh_read_rate,
        "load_share_of_fresh_read": load_rate / fresh_read_rate,
        "prefill_tokens_per_s": tokens_per_s("moerun_prefill"),
        "decode_tokens_per_s": tokens_per_s("moerun_decode"),
        "decode_bytes_per_token": bytes_per_token,
        "decode_bytes_per_s": decode_bytes_per_s,
        "decode_share_of_bandwidth": decode_bytes_per_s / bandwidth,
    }
    if not skip_peer:
        result["peer"] = {
            "versions": peer["versions"],
            "load_seconds": peer["load_seconds"],
            "experts_tokens_per_s": peer["tokens_per_s"],
            "best_experts": peer["best"],
            "prefill_tokens_per_s": tokens_per_s("transformers_prefill"),
            "decode_tokens_per_s": tokens_per_s("transformers_decode"),
        }
        for phase in ("prefill", "decode"):
            theirs = result["peer"][f"{phase}_tokens_per_s"]
            result[f"{phase}_ratio_to_peer"] = result[f"{phase}_tokens_per_s"] / theirs
        result["peer"]["decode_share_of_bandwidth"] = (
            bytes_per_token * result["peer"]["decode_tokens_per_s"] / bandwidth
        )
    return result


def table(result: dict[str, Any]) -> str:
    box = result["machine"]
    gb = 1e9
    rows = [
        ("machine", f"{box['cpu']}, {box['cores']} cores, {box['ram_bytes'] / 2**30:.0f} GiB"),
        ("kernel, python", f"{box['kernel']}, {box['python']}"),
        ("cpu kernels", result["build_info"]["cpu_kernels"]["chosen"]),
        ("checkpoint", f"{result['checkpoint']}, {result['checkpoint_bytes'] / gb:.2f} GB"),
        ("threads", str(result["threads"])),
        ("memory read bandwidth", f"{result['read_bandwidth_bytes_per_s'] / gb:.1f} GB/s"),
        (
            "cached file read",
            f"{result['cached_read_bytes_per_s'] / gb:.2f} GB/s into a reused buffer, "
            f"{result['fresh_read_bytes_per_s'] / gb:.2f} GB/s into fresh memory",
        ),
        (
            f"load, median of {NUM_LOADS}",
            f"{result['load_seconds']:.2f} s, {result['load_bytes_per_s'] / gb:.2f} GB/s = "
            f"{result['load_share_of_cached_read']:.0%} and "
            f"{result['load_share_of_fresh_read']:.0%} of that",
        ),
        (f"prefill {result['prompt_tokens']}", f"{result['prefill_tokens_per_s']:.1f} tokens/s"),
        (
            "decode",
            f"{result['decode_tokens_per_s']:.1f} tokens/s, "
            f"{result['decode_bytes_per_token'] / 1e6:.0f} MB/token, "
            f"{result['decode_bytes_per_s'] / gb:.1f} GB/s = "
            f"{result['decode_share_of_bandwidth']:.0%} of the bandwidth",
        ),
    ]
    if peer := result.get("peer"):
        rows.append(("peer", f"{peer['versions']}, bf16, sdpa"))
        for phase in ("prefill", "decode"):
            tried = ", ".join(
                f"{name} {rate:.1f}" for name, rate in peer["experts_tokens_per_s"][phase].items()
            )
            rows.append((f"peer {phase}, by experts", f"{tried} tokens/s"))
            rows.append(
                (
                    f"peer {phase}",
                    f"{peer[f'{phase}_tokens_per_s']:.1f} tokens/s "
                    f"({peer['best_experts'][phase]}, median of {result['rounds']} rounds)",
                )
            )
        share = peer["decode_share_of_bandwidth"]
        rows.append(("peer decode, of bandwidth", f"{share:.0%}"))
        rows.append(("prefill, moerun / peer", f"{result['prefill_ratio_to_peer']:.2f}"))
        rows.append(("decode, moerun / peer", f"{result['decode_ratio_to_peer']:.2f}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


@click.command()
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Model directory, e.g. one that make_checkpoint.py wrote.",
)
@click.option("--threads", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--prompt-tokens", default=512, show_default=True, type=click.IntRange(min=1))
@click.option("--decode-tokens", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--skip-peer", is_flag=True, help="Leave transformers out.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--worker", "worker_side", type=click.Choice(list(SIDES)), hidden=True)
def main(
    checkpoint: Path,
    threads: int,
    prompt_tokens: int,
    decode_tokens: int,
    rounds: int,
    skip_peer: bool,
    as_json: bool,
    worker_side: str | None,
) -> None:
    """Measure load, prefill and decode on one checkpoint, with their limits and their peer."""
    if worker_side:
        serve(worker_side, checkpoint, threads)
        return
    result = measure(checkpoint, threads, prompt_tokens, decode_tokens, rounds, skip_peer)
    click.echo(json.dumps(result, indent=2) if as_json else table(result))


if __name__ == "__main__":
    main()
