"""The files that moe-metrics writes, and how they get to their folder: all of them, or none."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import polars as pl

from moerun import __version__
from moerun.errors import FileError
from moerun.user_files import read_bounded
from moerun.write_lock import WriteLock
from moerun_tools.metrics_published import PUBLISHED
from moerun_tools.metrics_results import (
    POLICIES,
    TABLES,
    VOCABULARIES,
    TraceMetrics,
    clean_text,
    joined_table,
)
from moerun_tools.report import json_line

FORMAT = "moerun-metrics"
_SUMMARY = "metrics.json"
_SUMMARY_BYTES = 256 * 2**20
_OWN = re.compile(
    rf"({'|'.join(TABLES)})\.parquet|metrics\.json|report\.html|figures/[a-z_]+\.(png|svg)"
)
_STAGE = ".moe-metrics-"


def summary(
    results: Sequence[TraceMetrics], settings: Mapping[str, Any], warnings: Sequence[str]
) -> dict[str, Any]:
    """Return what metrics.json holds: the verdicts and the small tables."""
    return {
        "format": FORMAT,
        "version": 1,
        "settings": dict(settings),
        "versions": _versions(),
        "traces": [_trace_summary(result) for result in results],
        "published": [
            {**vars(model), "srp_chance_even": model.srp_chance_even} for model in PUBLISHED
        ],
        "warnings": list(warnings),
    }


def _versions() -> dict[str, str]:
    found = {"moerun": __version__, "python": platform.python_version()}
    for package in ("numpy", "polars", "matplotlib"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _trace_summary(result: TraceMetrics) -> dict[str, Any]:
    facts = result.facts
    capacities = set(range(facts.top_k, facts.num_experts + 1, facts.top_k))
    if result.verdict is not None:
        capacities.add(result.verdict.capacity)
    verdict = None if result.verdict is None else result.verdict.as_dict()
    scores = [
        f"{name}{suffix}"
        for name in ("domain_variation", *VOCABULARIES)
        for suffix in ("", "_chance")
    ]
    return {
        "trace": result.label,
        "files": facts.files,
        "model": facts.model,
        "num_experts": facts.num_experts,
        "top_k": facts.top_k,
        "moe_layers": facts.moe_layers,
        "num_sequences": facts.num_sequences,
        "num_tokens": facts.num_tokens,
        "domains": {clean_text(name): count for name, count in facts.domains.items()},
        "verdict": verdict,
        "srp": result.tables["srp"].filter(pl.col("level") != "expert").to_dicts(),
        "hit_rate": [
            {
                "capacity": capacity,
                "cache_ratio": capacity / facts.top_k,
                "random": capacity / facts.num_experts,
                "static": result.static_hit_rate_at(capacity),
                **{policy: result.hit_rate_at(policy, capacity) for policy in POLICIES},
                "by_chance": {
                    use: {
                        policy: result.chance_hit_rate_at(policy, capacity, use)
                        for policy in POLICIES
                    }
                    for use in ("same", "even")
                },
            }
            for capacity in sorted(capacities)
        ],
        "load_balance": result.load_balance("model").to_dicts(),
        "predictability": result.tables["predictability"].to_dicts(),
        "specialization": {name: result.median_specialization(name) for name in scores},
    }


def data_files(results: Sequence[TraceMetrics], values: dict[str, Any]) -> dict[str, bytes]:
    """Return metrics.json and the parquet files by name."""
    plain = json.loads(json_line(values))  # without nan
    files = {_SUMMARY: (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()}
    for name in TABLES:
        buffer = io.BytesIO()
        joined_table(results, name).write_parquet(buffer)
        files[f"{name}.parquet"] = buffer.getvalue()
    return files


def check_folder(folder: Path, overwrite: bool) -> None:
    """Find out before the work whether the results can go to `folder`.

    Raises:
        FileError: it is no folder, may not be written to, or holds other files than ours.
    """
    try:
        if folder.is_symlink() and not folder.exists():
            raise FileError(f"{folder} is a link to nothing; --output must be a folder")
        if not folder.exists():
            parent = next(path for path in folder.absolute().parents if path.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                raise FileError(f"cannot create {folder}: {parent} is not a folder to write to")
            return
        if not folder.is_dir():
            raise FileError(f"{folder} is a file; --output must be a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise FileError(f"the folder {folder} may not be written to")
        foreign = [] if overwrite else _foreign(folder)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot use the folder {folder}: {error.strerror}") from error
    if foreign:
        raise FileError(
            f"the folder {folder} holds {', '.join(foreign[:3])}"
            f"{' and more' if len(foreign) > 3 else ''}, which is not of an earlier moe-metrics: "
            "choose another --output, or give --overwrite to write beside it"
        )


def install(files: Mapping[str, bytes], folder: Path) -> None:
    """Write all files aside, then move them to `folder`; earlier results there go.

    Raises:
        FileError: something cannot be written; a folder that was not there is not there then.
    """
    try:
        is_new = not folder.exists()
        if is_new:
            folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        # In an existing folder, so that neither its parent has to be writable nor its mount left.
        place = folder.absolute().parent if is_new else folder
        stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=place))
        try:
            written = stage / "results"
            for name, data in files.items():
                (written / name).parent.mkdir(parents=True, exist_ok=True)
                (written / name).write_bytes(data)
            if is_new:
                written.rename(folder)
            else:
                lock = WriteLock(folder / f"{_STAGE}lock", folder)  # results of two runs do not mix
                try:
                    _replace(files, written, folder)
                finally:
                    lock.release()
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except FileError:  # of the lock
        raise
    except OSError as error:
        raise FileError(f"cannot write the results to {folder}: {error.strerror}") from error


def _replace(files: Mapping[str, bytes], written: Path, folder: Path) -> None:
    earlier = _names(folder) if _is_ours(folder) else []
    # The summary first: it makes the folder ours, should the rest be cut off.
    for name in sorted(files, key=lambda name: name != _SUMMARY):
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(written / name, folder / name)
    for name in earlier:
        if name not in files and _OWN.fullmatch(name):
            (folder / name).unlink()
    if not any(name.startswith("figures/") for name in files) and earlier:
        pictures = folder / "figures"
        if pictures.is_dir() and not pictures.is_symlink() and not any(pictures.iterdir()):
            pictures.rmdir()


def _foreign(folder: Path) -> list[str]:
    """Return what is in a folder and is not of earlier results."""
    names = _names(folder)
    if not _is_ours(folder):
        return names
    return [name for name in names if not _OWN.fullmatch(name)]


def _names(folder: Path) -> list[str]:
    """Return the files in a folder and in its figures, and all else that is in there."""
    names = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(_STAGE):
            continue  # of a run at work, or one that was killed
        if path.name == "figures" and path.is_dir() and not path.is_symlink():
            names += [f"figures/{inner.name}" for inner in sorted(path.iterdir())]
        else:
            names.append(path.name)
    return names


def _is_ours(folder: Path) -> bool:
    try:
        value = json.loads(read_bounded(folder / _SUMMARY, _SUMMARY_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT
