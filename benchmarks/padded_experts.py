"""Makes a small trained model's experts as large as real ones, without changing what it says.

Each expert gets rows and columns of zeros: routing, texts and predictors stay what they are, while
an expert takes as long to read as that of a real model does beside the time it takes to compute.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np

from moerun.planning import model_id

ROWS = ("gate_proj", "up_proj")


def opened(file: Path) -> tuple[dict[str, Any], memoryview]:
    """Return header and data of a safetensors file."""
    data = memoryview(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    return json.loads(bytes(data[8 : 8 + length])), data[8 + length :]


def write(file: Path, header: dict[str, Any], parts: list[Any]) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            out.write(part)


def padded(name: str, shape: list[int], data: Any, factor: int) -> tuple[list[int], bytes]:
    """Return shape and bytes of an expert's tensor, whatever its dtype."""
    rows, cols = shape
    old = np.frombuffer(data, np.uint8).reshape(rows, -1)
    is_rows = any(each in name for each in ROWS)
    new = [rows * factor, cols] if is_rows else [rows, cols * factor]
    larger = np.zeros((new[0], old.shape[1] * (1 if is_rows else factor)), np.uint8)
    larger[:rows, : old.shape[1]] = old
    return new, larger.tobytes()


def pad_model(source: Path, target: Path, factor: int) -> None:
    """Write `source` to `target` with intermediate sizes `factor` times as large."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    config["intermediate_size"] *= factor
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for file in sorted(source.glob("*.safetensors")):
        header, data = opened(file)
        larger: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        parts: list[Any] = []
        end = 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape, part = entry["shape"], data[slice(*entry["data_offsets"])]
            if ".experts." in name:
                shape, part = padded(name, shape, part, factor)
            offsets = [end, end + len(part)]
            larger[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": offsets}
            parts.append(part)
            end += len(part)
        write(target / file.name, larger, parts)


def relabel_predictor(source: Path, target: Path, model: Path) -> None:
    """Write a predictor of the model that was padded as one of `model`."""
    header, data = opened(source)
    header["__metadata__"]["model_id"] = model_id(model)
    write(target, header, [data])


@click.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--factor", default=16, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--predictor",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Of SOURCE: written to TARGET.predictor.safetensors for the larger model.",
)
def main(source: Path, target: Path, factor: int, predictor: Path | None) -> None:
    """Write the model of the folder SOURCE to TARGET, with larger experts."""
    pad_model(source, target, factor)
    if predictor is not None:
        relabel_predictor(
            predictor, target.with_name(target.name + ".predictor.safetensors"), target
        )


if __name__ == "__main__":
    main()
