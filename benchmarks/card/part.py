"""One part of gpu_check.py, in a process of its own: python part.py NAME JSON prints rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from card.rows import Row

MARK = "ROW "


def checkpoints(models: dict[str, int], folder: str) -> Iterator[Row]:
    import make_checkpoint

    for like, layers in models.items():
        arguments = ["--like", like, "--layers", str(layers), "-o", f"{folder}/{like}"]
        make_checkpoint.main(arguments, standalone_mode=False)
    yield from ()


def checks(name: str, device: str, quick: bool) -> Iterator[Row]:
    from card import checks as found

    yield from getattr(found, name)(device, quick)


def limits(device: str, num_bytes: int) -> Iterator[Row]:
    from card import speeds

    yield from speeds.limits(device, num_bytes)


def speed_of(name: str, setting: dict[str, Any], **options: Any) -> Iterator[Row]:
    from card import speeds

    setting["checkpoint"] = Path(setting["checkpoint"])
    yield from getattr(speeds, name)(speeds.Setting(**setting), **options)


def torch_products(like: str, checkpoint: str, tokens: int) -> Iterator[Row]:
    import moerun
    from card import peers, speeds

    config = moerun._moerun.model_config(checkpoint)
    flops = speeds.prefill_flops(config, tokens)
    yield from peers.torch_products(like, config, tokens, flops)


def accelerate_offload(like: str, checkpoint: str, tokens: int) -> Iterator[Row]:
    from card import peers

    yield from peers.accelerate_offload(like, Path(checkpoint), tokens)


def machine() -> Iterator[Row]:
    import moerun

    yield {"kind": "machine", "build": moerun.build_info(), "package": str(moerun.__file__)}


PARTS = {
    part.__name__: part
    for part in (
        accelerate_offload,
        checkpoints,
        checks,
        limits,
        machine,
        speed_of,
        torch_products,
    )
}

if __name__ == "__main__":
    for row in PARTS[sys.argv[1]](**json.loads(sys.argv[2])):
        print(MARK + json.dumps(row), flush=True)
