"""Tells models apart by their files, so that a recording is not resumed with another model."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from moerun.errors import FileError

# Not whatever else is there: the trace itself may be written beside the weights.
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")
_TAIL_BYTES = 2**16


def model_fingerprint(model: Path, *, with_weights: bool = True) -> str:
    """Return a short hash of a model's configuration and, for its weights, what is quick to read.

    That is the name and size of each file and its last bytes, which differ between models that
    were trained from each other. Copies of a model have the same hash.

    Args:
        model: its directory, or a configuration file.
        with_weights: False if they are not used.

    Raises:
        FileError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        config = model if model.is_file() else model / "config.json"
        digest.update(config.read_bytes() + b"\0")
        if with_weights and model.is_dir():
            for file in sorted(f for f in model.iterdir() if _WEIGHTS.fullmatch(f.name)):
                size = file.stat().st_size
                digest.update(f"{file.name}\0{size}\0".encode())
                with file.open("rb") as opened:
                    opened.seek(max(0, size - _TAIL_BYTES))
                    digest.update(opened.read(_TAIL_BYTES))
    except OSError as error:
        raise FileError(f"{error.filename or model} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]
