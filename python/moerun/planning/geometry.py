"""Sizes of a model's experts, and of what must be in memory beside the slots."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_int, check_str
from moerun.cache_options import dry_run
from moerun.errors import InvalidArgumentError
from moerun.identity import ModelIdentity
from moerun.packs import folder_of


@dataclass(frozen=True)
class Geometry:
    """What a plan has to fit.

    Attributes:
        model: name of the model, for people.
        moe_layers: numbers of the L layers with experts, rising.
        num_experts: routed experts of a layer, E.
        top_k: experts that a token uses in a layer, k.
        records: rows of an expert's intermediate size; a slot holds the first so many.
        record_bytes: of one, its three rows with their padding.
        ring_bytes: of the staging ring, which every budget has to hold beside the slots; the
            smallest budget that works.
        move_pieces: (L, Q + 1) float64, pieces in which an expert moves whose first 0 ... Q quanta
            of records are in a slot, mean over a layer's experts. None: one.
        move_bytes: (L, Q + 1) float64, bytes that the slow tier gives for it: whole sectors, and
            without a record file all of down_proj. None: those that are missing.

        model_id: from `moerun.planning.model_id`; empty if that is not known.
        sizes_id: `ModelIdentity.sizes_id`, which stored costs are found by; empty if not known.

    Raises:
        InvalidArgumentError: a number is out of its range.
    """

    model: str
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    records: int
    record_bytes: int
    ring_bytes: int
    move_pieces: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)
    move_bytes: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)
    model_id: str = ""
    sizes_id: str = ""

    def __post_init__(self) -> None:
        check_str("model", self.model)
        check_str("model_id", self.model_id)
        check_str("sizes_id", self.sizes_id)
        layers = tuple(check_int("a number in moe_layers", n, 0, 2**20) for n in self.moe_layers)
        if not layers or any(a >= b for a, b in itertools.pairwise(layers)):
            raise InvalidArgumentError(
                f"moe_layers: expected rising layer numbers, found {self.moe_layers}"
            )
        object.__setattr__(self, "moe_layers", layers)
        check_int("num_experts", self.num_experts, 1, 2**16)
        check_int("top_k", self.top_k, 1, self.num_experts)
        check_int("records", self.records, 1, 2**24)
        check_int("record_bytes", self.record_bytes, 1, 2**30)
        check_int("ring_bytes", self.ring_bytes, 0, self.total_bytes - 1)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return self.records * self.record_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts."""
        return len(self.moe_layers) * self.num_experts * self.expert_bytes

    @classmethod
    def of_model(
        cls,
        path: str | os.PathLike[str] | None = None,
        device: str = "auto",
        pack: bool | str | os.PathLike[str] = False,
    ) -> Geometry:
        """Return the sizes of a model; of its weights, the headers and samples are read.

        Args:
            path: as for `moerun.Model.load`.
            device: where it would run.
            pack: whether experts would come from a record file, as for `moerun.Model.load`; none
                is written.

        Raises:
            InvalidArgumentError: the model has no experts that a cache could leave out.
            As `moerun.dry_run`, besides.
        """
        identity = ModelIdentity(path)
        directory = identity.directory
        where = _moerun.choose_device(check_str("device", device))
        # Sizes are the same on every device; on the CPU nobody asks how much memory is free.
        smallest = dry_run(directory, "cpu", expert_budget="100%")["smallest_budget_bytes"]
        sizes = dry_run(directory, "cpu", expert_budget=smallest) if smallest else None
        if sizes is None or sizes["state"] == "resident":
            raise InvalidArgumentError(
                f"{path}: no part of this model's experts can be left out of memory, so there is "
                "nothing to plan"
            )
        records = _moerun.model_config(os.fsencode(directory))["moe_intermediate_size"]
        pieces, moved = None, None
        if where == "cpu":
            folder = folder_of(pack)
            options = {} if folder is None else {"pack_folder": folder}
            pieces, moved = _moerun.move_sizes(
                os.fsencode(directory), expert_budget="100%", **options
            )
        return cls(
            model=identity.name,
            moe_layers=tuple(layer["layer"] for layer in sizes["layers"]),
            num_experts=sizes["num_experts"],
            top_k=sizes["top_k"],
            records=records,
            record_bytes=sizes["expert_bytes_each"] // records,
            ring_bytes=sizes["ring_bytes"],
            move_pieces=pieces,
            move_bytes=moved,
            model_id=identity.model_id,
            sizes_id=identity.sizes_id,
        )
