"""Columns of numbers as polars frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

_DTYPES: dict[str, Any] = {
    "level": pl.String,
    "layer": pl.Int32,
    "expert": pl.Int32,
    "domain": pl.String,
    "policy": pl.String,
    "use": pl.String,
    "predictor": pl.String,
    "segment_length": pl.Int32,
    "threshold": pl.Int32,
    "capacity": pl.Int32,
}


class Rows:
    """Collects blocks of rows; scalars of a block hold for all of its rows."""

    def __init__(self, *columns: str) -> None:
        self._schema = {name: _DTYPES.get(name, pl.Float64) for name in columns}
        self._blocks: list[pl.DataFrame] = []

    def add(self, **values: Any) -> None:
        """Add a block: arrays of one length, and scalars; nan becomes null."""
        lengths = [len(value) for value in values.values() if isinstance(value, np.ndarray)]
        length = lengths[0] if lengths else 1
        series = []
        for name, dtype in self._schema.items():
            value = values[name]
            if not isinstance(value, np.ndarray):
                value = [value] * length
            series.append(pl.Series(name, value, dtype=dtype, strict=False))
        block = pl.DataFrame(series)
        self._blocks.append(
            block.with_columns(
                pl.col(name).fill_nan(None)
                for name, dtype in self._schema.items()
                if dtype == pl.Float64
            )
        )

    def frame(self) -> pl.DataFrame:
        """Return everything that was added."""
        if not self._blocks:
            return pl.DataFrame(schema=self._schema)
        return pl.concat(self._blocks)
