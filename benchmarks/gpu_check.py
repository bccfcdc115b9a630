"""Is the CUDA part right on this machine's card, and how fast beside the card's own limits?

One command, no network, under nine minutes: builds what is missing, runs all CUDA tests on the
card, compares logits and text with the CPU and with transformers, looks with compute-sanitizer, and
measures decode, prefill and offloading against bandwidths that it measured just before.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from card import programs
from card.build import ROOT, build
from card.machine import describe
from card.part import MARK
from card.process import Background, Deadline, run
from card.rows import Row, exit_status, failed, line, not_run, speed, table

# Layers of each: so few that files and time suffice, so many that caches do not help.
MODELS = {"olmoe-1b-7b": 8, "qwen3-30b-a3b": 6, "mixtral-8x7b": 4}
QUICK_MODELS = {"tiny": 2}
BUDGETS = ("25%", "50%", "75%")
PEER_MODEL = "olmoe-1b-7b"
CHECK_LIMIT_S = 90.0
SPEED_LIMIT_S = 45.0
BANDWIDTH_BYTES = 1 << 30
PROMPT_TOKENS, DECODE_TOKENS = 2048, 64
PEER_TOKENS = 12


class GpuCheck:
    """The parts in turn, each in a process of its own, and what they reported."""

    def __init__(self, device: str, quick: bool, folder: Path, deadline: Deadline) -> None:
        self.device = device
        self.quick = quick
        self.rows: list[Row] = []
        self.models = QUICK_MODELS if quick else MODELS
        self._folder = folder
        self._deadline = deadline

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if row["kind"] in ("check", "speed"):
            click.echo(line(row))

    def part(
        self, kind: str, title: str, name: str, limit: float, arguments: dict[str, Any]
    ) -> list[Row]:
        """Runs a part of card/part.py and takes over its rows, also where it does not end well."""
        found: list[Row] = []

        def on_line(text: str) -> None:
            if text.startswith(MARK):
                found.append(json.loads(text[len(MARK) :]))
                self.add(found[-1])

        report = failed if kind == "check" else not_run
        limit = min(limit, self._deadline.left())
        if limit < 2:
            self.add(not_run(kind, title, "no time is left"))
            return found
        done = run(part_command(name, arguments), limit, on_line)
        if done.status is None:
            self.add(report(kind, title, f"not done in {limit:.0f} s"))
        elif done.status != 0:
            print("\n".join(done.lines[-15:]), file=sys.stderr)
            self.add(report(kind, title, done.last_line()))
        return found

    def has_device(self) -> bool:
        """Whether the moerun that was found can use the device; says so if not."""
        found = self.part("check", "import moerun", "machine", CHECK_LIMIT_S, {})
        if not found:
            return False
        cuda = found[0]["build"]["cuda"]
        if self.device == "cuda" and not cuda["available"]:
            self.add(failed("check", "a card that this build can use", cuda["reason"]))
            return False
        return True

    def check_results(self, build_folder: Path) -> None:
        self.add(programs.run_tests(build_folder, self.device, self.quick, self._deadline))
        for name in ("against_cpu", "against_transformers"):
            arguments = {"name": name, "device": self.device, "quick": self.quick}
            self.part("check", name.replace("_", " "), "checks", CHECK_LIMIT_S, arguments)
        if self.device == "cuda":
            for tool in ("memcheck", "racecheck"):
                self.add(programs.run_sanitizer(self.device, tool, self._deadline))

    def measure(self, writer: Background) -> None:
        """Everything about speed; `writer` makes the checkpoints meanwhile."""
        written = writer.wait(self._deadline.left())
        if written.status != 0:
            click.echo(f"not all checkpoints could be written: {written.last_line()}", err=True)
        num_bytes = 1 << 20 if self.quick else BANDWIDTH_BYTES
        arguments = {"device": self.device, "num_bytes": num_bytes}
        rates = values(self.part("speed", "bandwidths", "limits", SPEED_LIMIT_S, arguments))
        if "from_host" not in rates:
            self.add(not_run("speed", "shares of the limits", "the limits are not known"))
            return
        for like in self.models:
            if (self._folder / like).exists():
                self._measure_model(like, rates)
            else:
                self.add(not_run("speed", like, "its checkpoint could not be written"))

    def _measure_model(self, like: str, rates: dict[str, float]) -> None:
        checkpoint = str(self._folder / like)
        tokens = 24 if self.quick else PROMPT_TOKENS
        products = {"like": like, "checkpoint": checkpoint, "tokens": tokens}
        torch = values(
            self.part("speed", f"{like}: torch", "torch_products", SPEED_LIMIT_S, products)
        )
        setting = {
            "device": self.device,
            "like": like,
            "checkpoint": checkpoint,
            "read": rates["read"],
            "from_host": rates["from_host"],
            "torch_tflops": torch.get("torch_tflops"),
            "prompt_tokens": tokens,
            "decode_tokens": 6 if self.quick else DECODE_TOKENS,
        }
        for name in ("resident", "missing"):
            arguments = {"name": name, "setting": setting}
            self.part("speed", f"{like}: {name}", "speed_of", SPEED_LIMIT_S, arguments)
        for share in BUDGETS[:1] if self.quick else BUDGETS:
            arguments = {"name": "budget", "setting": setting, "share": share}
            self.part("speed", f"{like}: {share}", "speed_of", SPEED_LIMIT_S, arguments)
        if like == PEER_MODEL or self.quick:
            self._measure_peer(like, checkpoint)

    def _measure_peer(self, like: str, checkpoint: str) -> None:
        arguments = {"like": like, "checkpoint": checkpoint, "tokens": PEER_TOKENS}
        found = values(
            self.part("speed", f"{like}: peer", "accelerate_offload", SPEED_LIMIT_S, arguments)
        )
        ours = [row for row in self.rows if row.get("key") == "tokens_per_s 25%"]
        ours = [row for row in ours if row["name"].startswith(f"{like}:")]
        if ours and "accelerate" in found:
            times = ours[0]["tokens_per_s"] / found["accelerate"]
            self.add(speed(f"{like}: moerun at 25% by accelerate", times, "times"))


def values(rows: list[Row]) -> dict[str, Any]:
    return {row["key"]: row["value"] for row in rows if "key" in row}


def part_command(name: str, arguments: dict[str, Any]) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks/card/part.py"), name, json.dumps(arguments)]


@contextlib.contextmanager
def scratch_folder(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="moerun-gpu-check-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def use_packages(folder: Path) -> None:
    """Makes the processes to come import moerun from there."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([before] if before else [])])


def write_result(output: Path, result: dict[str, Any], checker: GpuCheck) -> None:
    rows = [row for row in checker.rows if row["kind"] != "machine"]
    found = [row for row in checker.rows if row["kind"] == "machine"]
    output.write_text(json.dumps(result | {"moerun": found[-1:], "rows": rows}, indent=2) + "\n")


@click.command()
@click.option(
    "--device", type=click.Choice(["cuda", "cuda-host"]), default="cuda", show_default=True
)
@click.option("--quick", is_flag=True, help="A little of everything, to test this script.")
@click.option(
    "--build/--no-build",
    "does_build",
    default=True,
    show_default=True,
    help="Build the module and the tests first; else use the moerun that Python finds.",
)
@click.option(
    "--build-folder",
    type=click.Path(path_type=Path),
    default=ROOT / "build" / "gpu-check",
    help="Kept, so that the next build is short.  [default: build/gpu-check]",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="For checkpoints, 29 GB, deleted at the end.  [default: the system's]",
)
@click.option("--speed/--no-speed", "does_measure", default=True, show_default=True)
@click.option(
    "--minutes", default=9.0, show_default=True, help="What is not done then is left out."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Everything, as JSON.")
def main(
    device: str,
    quick: bool,
    does_build: bool,
    build_folder: Path,
    folder: Path | None,
    does_measure: bool,
    minutes: float,
    output: Path | None,
) -> None:
    """Check and measure the CUDA part on this machine's card."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begin = time.monotonic()
    deadline = Deadline(60 * minutes)
    result: dict[str, Any] = {"machine": describe(), "device": device, "quick": quick}
    interrupted = False
    with scratch_folder(folder) as scratch:
        checker = GpuCheck(device, quick, scratch, deadline)
        writer = None
        try:
            if does_measure:  # beside building and tests, which need the disk little
                arguments = {"models": checker.models, "folder": str(scratch)}
                writer = Background(part_command("checkpoints", arguments))
            packages: Path | None = None
            if does_build:
                row, packages = build(build_folder, device, deadline)
                checker.add(row)
            if packages is not None:
                use_packages(packages)
            if (packages is not None or not does_build) and checker.has_device():
                checker.check_results(build_folder)
                if writer is not None:
                    checker.measure(writer)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if writer is not None:
                writer.end()
    result["seconds"] = time.monotonic() - begin
    result["interrupted"] = interrupted
    if output is not None:
        write_result(output, result, checker)
    click.echo(f"\n{result['machine']['nvidia_smi'] or device}, {result['seconds']:.0f} s")
    click.echo(table(checker.rows))
    sys.exit(130 if interrupted else exit_status(checker.rows))


if __name__ == "__main__":
    main()
