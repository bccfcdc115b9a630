"""Decoding under an expert budget: policies, splits and prefetch side by side, against the disk.

Random weights route at random, so the routing is replayed: a Markov source gives every layer the
locality of a trained model (SRP at 16 tokens near 0.5), and predictions that name a true expert as
often as a next-layer router does. What is read, cached and computed is real.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 4 << 20
MAX_READ_BYTES = 3 << 30
WINDOW = 16

# --- routing --------------------------------------------------------------------------------------


def markov_routing(
    tokens: int, layers: int, experts: int, top_k: int, stay: float, seed: int
) -> NDArray[np.int32]:
    """Returns expert ids (tokens, layers, top_k): each stays active with probability `stay`.

    An expert that leaves is replaced by one drawn from the layer's own skewed popularity (a Zipf
    law with exponent 0.6), as trained routers have favourites.
    """
    random = np.random.default_rng(seed)
    ids = np.empty((tokens, layers, top_k), dtype=np.int32)
    for layer in range(layers):
        popularity = 1.0 / (1 + random.permutation(experts)) ** 0.6
        popularity /= popularity.sum()
        active = list(random.choice(experts, top_k, replace=False, p=popularity))
        for token in range(tokens):
            for slot in range(top_k):
                if random.random() >= stay:
                    others = popularity.copy()
                    others[active] = 0
                    active[slot] = random.choice(experts, p=others / others.sum())
            order = random.permutation(top_k)
            ids[token, layer] = np.array(active)[order]
    return ids


def predictions_of(ids: NDArray[np.int32], experts: int, accuracy: float, seed: int) -> Any:
    """Returns ids of the same shape: each is right with probability `accuracy`, else another."""
    random = np.random.default_rng(seed)
    predicted = ids.copy()
    for row in predicted.reshape(-1, ids.shape[-1]):
        for slot in np.flatnonzero(random.random(len(row)) >= accuracy):
            row[slot] = random.choice(np.setdiff1d(np.arange(experts), row))
    return predicted


def srp(ids: NDArray[np.int32], experts: int, window: int) -> float:
    """Returns segment routing best performance, the mean over layers (arXiv 2505.16056)."""
    tokens, layers, _ = ids.shape
    scores = []
    for layer in range(layers):
        used = np.zeros((tokens + 1, experts), dtype=np.int64)
        np.add.at(
            used, (np.repeat(np.arange(1, tokens + 1), ids.shape[2]), ids[:, layer].ravel()), 1
        )
        total = used.cumsum(axis=0)
        counts = (total[window:] - total[:-window]).ravel()
        f1 = [
            2 * counts[counts >= a].sum() / (window * (counts >= a).sum() + counts.sum())
            for a in range(window + 1)
        ]
        scores.append(max(f1))
    return float(np.mean(scores))


# --- the machine's limit --------------------------------------------------------------------------


def direct_read_rate(files: list[Path], threads: int) -> float:
    """Returns bytes/s of reading the files past the page cache, with `threads` reads under way."""

    def read_share(thread_idx: int) -> int:
        buffer = mmap(-1, BLOCK_BYTES)
        num_read = 0
        block_idx = 0
        for path in files:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                for offset in range(0, path.stat().st_size - BLOCK_BYTES, BLOCK_BYTES):
                    if block_idx * BLOCK_BYTES >= MAX_READ_BYTES:
                        return num_read
                    if block_idx % threads == thread_idx:
                        num_read += os.preadv(descriptor, [buffer], offset)
                    block_idx += 1
            finally:
                os.close(descriptor)
        return num_read

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        num_read = sum(pool.map(read_share, range(threads)))
        return num_read / (time.perf_counter() - start)


# --- one configuration, in a process of its own ---------------------------------------------------


def measure_moerun(checkpoint: str, tokens: int, routing: str, options: dict[str, Any]) -> Any:
    import moerun

    with np.load(routing) as arrays:
        replay = (arrays["ids"], arrays["predicted"])
    native = moerun._moerun.Model(checkpoint, routing_replay=replay, **options)
    generation = native.generate(
        [1, 2, 3], max_new_tokens=tokens + 1, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0,
        repetition_penalty=1.0, seed=1, stop_token_ids=[],
    )  # fmt: skip
    times = []
    for _ in generation:
        times.append(time.perf_counter())
    stats = native.stats()
    # The first half warms the cache up.
    half = np.diff(times)[tokens // 2 :]
    return {
        "tokens_per_s": 1 / float(np.mean(half)),
        "cache": stats["cache"],
        "peak_rss_bytes": peak_rss_bytes(),
        "logits_hash": stats["logits_hash"],
    }


def replay_routers(model: Any, torch: Any, ids: NDArray[np.int32]) -> dict[str, int]:
    """Makes the routers of a transformers model choose `ids[state["token"]]` while decoding."""
    state = {"token": 0}
    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    for layer, router in enumerate(routers):

        def choose(_module: Any, _inputs: Any, out: Any, layer: int = layer) -> Any:
            logits, scores, indices = out
            if indices.shape[0] == 1:
                chosen = ids[state["token"] % len(ids), layer].astype(np.int64)
                indices = torch.from_numpy(chosen)[None]
            return logits, scores, indices

        router.register_forward_hook(choose)
    return state


def measure_accelerate(
    checkpoint: str, tokens: int, routing: str, threads: int, folder: str
) -> Any:
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    device_map: dict[str, str] = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    device_map |= {"model.rotary_emb": "cpu"}
    for layer in range(config.num_hidden_layers):
        device_map[f"model.layers.{layer}"] = "disk"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device_map=device_map, offload_folder=folder
    ).eval()
    with np.load(routing) as arrays:
        state = replay_routers(model, torch, arrays["ids"])
    ids = torch.tensor([[1, 2, 3]])
    cache = None
    times = []
    for token in range(tokens + 1):
        state["token"] = max(token - 1, 0)
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        ids = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        times.append(time.perf_counter())
    # As for moerun: the first half warms up what there is to warm up.
    return {"tokens_per_s": 1 / float(np.mean(np.diff(times)[tokens // 2 :]))}


class MemoryLimit:
    """A cgroup: it bounds the page cache too, which is free memory otherwise."""

    def __init__(self, num_bytes: int) -> None:
        for root, limit in (
            (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
            (Path("/sys/fs/cgroup"), "memory.max"),
        ):
            if not (root / "cgroup.procs").exists():
                continue
            self._folder = root / f"moerun-bench-{os.getpid()}"
            try:
                self._folder.mkdir(exist_ok=True)
                (self._folder / limit).write_text(str(num_bytes))
                return
            except OSError:
                continue
        raise click.ClickException("bounding memory needs cgroups and the right to make one (root)")

    def enter(self) -> None:
        (self._folder / "cgroup.procs").write_text("0")

    def remove(self) -> None:
        self._folder.rmdir()


def peak_rss_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def in_process(limit: int | None, function: str, *arguments: Any, script: str = __file__) -> Any:
    """Calls a function of `script` in a fresh process with at most `limit` bytes of memory."""
    command = [sys.executable, script, "--worker", json.dumps([function, *arguments])]
    group = None if limit is None else MemoryLimit(limit)
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=None if group is None else group.enter,
    )
    if group is not None:
        group.remove()
    if done.returncode != 0:
        raise click.ClickException(f"{function} failed; its message is above")
    return json.loads(done.stdout.splitlines()[-1])


# --- the run --------------------------------------------------------------------------------------


def memory_limits(checkpoint: Path, budgets: list[str]) -> dict[str, int]:
    """Returns for every budget what a process may use: budget, resident weights, and 1 GiB."""
    import moerun

    limits = {}
    for budget in budgets:
        plan = moerun.dry_run(checkpoint, expert_budget=budget)
        limits[budget] = plan["budget_bytes"] + plan["resident_bytes"] + (1 << 30)
    return limits


def configurations(budgets: list[str]) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    for budget in budgets:
        runs.append({"expert_budget": budget, "policy": "off"})
        for policy in ("lru", "lfu", "lcp"):
            for split in (1.0, 0.4):
                for prefetch in ("off", "on"):
                    runs.append(
                        {
                            "expert_budget": budget,
                            "policy": policy,
                            "split": [split],
                            "prefetch": prefetch,
                        }
                    )
    return runs


def row_of(options: dict[str, Any], result: dict[str, Any], link: float) -> dict[str, Any]:
    cache = result["cache"]
    total = cache["total"]
    lookups = max(total["lookups"], 1)
    missed = (total["demand_bytes"] + total["prefetch_bytes"]) / max(cache["decode_tokens"], 1)
    return options | {
        "tokens_per_s": result["tokens_per_s"],
        "hit_rate": total["hits"] / lookups,
        "top_hit_rate": total["top_hits"] / lookups,
        "mb_per_token": missed / 1e6,
        "read_share_of_link": result["tokens_per_s"] * missed / link,
        "ratio_to_limit": cache["ratio_to_limit"],
        "peak_rss_bytes": result["peak_rss_bytes"],
        "logits_hash": result["logits_hash"],
    }


def table(rows: list[dict[str, Any]], accelerate: dict[str, float]) -> str:
    head = "| budget | policy | split | prefetch | tokens/s | whole / top hits | MB read a token | "
    head += "of the link's rate | times the limit | against accelerate |"
    lines = [head, "|" + "---|" * 10]
    for row in rows:
        split = row.get("split", [None])[0]
        peer = accelerate.get(row["expert_budget"])
        against = f"{row['tokens_per_s'] / peer:.1f} x" if peer else "-"
        lines.append(
            f"| {row['expert_budget']} | {row['policy']} | {'-' if split is None else split} | "
            f"{row.get('prefetch', 'off')} | {row['tokens_per_s']:.2f} | "
            f"{row['hit_rate']:.0%} / {row['top_hit_rate']:.0%} | {row['mb_per_token']:.0f} | "
            f"{row['read_share_of_link']:.0%} | {row['ratio_to_limit']:.2f} | {against} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--threads", default=2, show_default=True)
@click.option("--tokens", default=96, show_default=True, help="Decoded tokens per configuration.")
@click.option("--budget", "budgets", multiple=True, default=["25%", "50%"], show_default=True)
@click.option("--accuracy", default=0.8, show_default=True, help="Of the replayed predictions.")
@click.option("--stay", default=0.65, show_default=True, help="Of the Markov source.")
@click.option("--limit-memory", is_flag=True, help="Bound every process by a cgroup (root).")
@click.option("--skip-peer", is_flag=True, help="Leave accelerate out.")
@click.option("--folder", default="/tmp", show_default=True, help="For what accelerate offloads.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--worker", hidden=True)
def main(
    checkpoint: Path | None,
    threads: int,
    tokens: int,
    budgets: tuple[str, ...],
    accuracy: float,
    stay: float,
    limit_memory: bool,
    skip_peer: bool,
    folder: str,
    as_json: bool,
    worker: str | None,
) -> None:
    """Measure decoding of CHECKPOINT (see make_checkpoint.py) under expert budgets."""
    if worker is not None:
        function, *arguments = json.loads(worker)
        print(json.dumps(globals()[function](*arguments)))
        return
    if checkpoint is None:
        raise click.UsageError("--checkpoint is needed.")
    config = json.loads((checkpoint / "config.json").read_text())
    layers, experts = config["num_hidden_layers"], config["num_experts"]
    ids = markov_routing(tokens + 2, layers, experts, config["num_experts_per_tok"], stay, seed=1)
    routing = Path(folder) / f"moerun-routing-{os.getpid()}.npz"
    np.savez(routing, ids=ids, predicted=predictions_of(ids, experts, accuracy, seed=2))
    files = sorted(checkpoint.glob("*.safetensors"))
    rates = {n: max(direct_read_rate(files, n) for _ in range(2)) for n in (1, 2, 4)}
    link = rates[2]
    limits = memory_limits(checkpoint, list(budgets)) if limit_memory else {}
    rows = []
    accelerate = {}
    peer_tokens = min(tokens, 48)
    offload = Path(folder) / f"moerun-offload-{os.getpid()}"
    try:
        for options in configurations(list(budgets)):
            click.echo(str(options), err=True)
            limit = limits.get(options["expert_budget"])
            arguments = (str(checkpoint), tokens, str(routing), options | {"threads": threads})
            result = in_process(limit, "measure_moerun", *arguments)
            rows.append(row_of(options, result, link))
        for budget in () if skip_peer else budgets:
            click.echo(f"accelerate, {budget}", err=True)
            arguments = (str(checkpoint), peer_tokens, str(routing), threads, str(offload))
            peer = in_process(limits.get(budget), "measure_accelerate", *arguments)
            accelerate[budget] = peer["tokens_per_s"]
    finally:
        routing.unlink()
        shutil.rmtree(offload, ignore_errors=True)
    if len({row["logits_hash"] for row in rows}) != 1:
        raise click.ClickException("the configurations disagree about the logits")
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    result = {
        "machine": machine,
        "direct_read_bytes_per_s": rates,
        "srp_16": srp(ids, experts, WINDOW),
        "prediction_accuracy": accuracy,
        "accelerate_tokens_per_s": accelerate,
        "rows": rows,
    }
    if as_json:
        print(json.dumps(result))
        return
    print(f"SRP(16) of the routing {result['srp_16']:.2f}, predictions right {accuracy:.0%}")
    print(
        "direct reads: " + ", ".join(f"{n} under way {r / 1e9:.2f} GB/s" for n, r in rates.items())
    )
    for budget, rate in accelerate.items():
        bound = f"{limits[budget] / 2**30:.2f} GiB of memory" if limits else "all memory"
        print(f"accelerate, layers on disk, {bound}: {rate:.3f} tokens/s")
    print(table(rows, accelerate))


if __name__ == "__main__":
    main()
