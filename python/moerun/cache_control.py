"""Looking into the expert cache of a loaded model, and changing it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moerun import _moerun
from moerun.plan_files import check_plan_model, named_plan

if TYPE_CHECKING:
    from moerun.model import Model
    from moerun.planning import Plan
    from moerun.planning.online import OnlinePlanner


class CacheEvent(NamedTuple):
    """One thing that happened in the expert cache; see `Model.cache_events`."""

    token: int
    layer: int
    expert: int
    kind: str


@dataclass(frozen=True)
class RoutingWindow:
    """What the last decoded tokens asked of the cache; see `Model.routing_window`.

    Attributes:
        moe_layers: numbers of the L layers with experts.
        expert_ids: (L, tokens, top_k), in the router's order: falling score.
        named: (L, top_k), for how many tokens prefetch named an r-th likeliest expert in advance.
        right: (L, top_k), of these, for how many the token used it.
    """

    moe_layers: tuple[int, ...]
    expert_ids: NDArray[np.uint16]
    named: NDArray[np.uint64]
    right: NDArray[np.uint64]


class CacheControl:
    """The part of `Model` that is about its expert cache."""

    path: Path
    _kept_events: list[tuple[int, int, int, str]]
    _pack: Any = False
    _planner: OnlinePlanner | None = None  # of plan="auto"
    _predicted: dict[str, float] | None = None  # of a plan from a file

    def _open(self) -> _moerun.Model:
        raise NotImplementedError

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        raise NotImplementedError

    def cache_events(self) -> list[CacheEvent]:
        """Return what happened in the expert cache, in order, if it was loaded with cache_events.

        Kinds: every look-up is a "hit" (whole expert in its slot), a "top_hit" (its top segment)
        or a "miss"; "insert" and "evict" change what a layer holds; "prefetch" was issued, and was
        "prefetch_useful" (there in time), "prefetch_late" or "prefetch_wasted".

        Returns:
            (token, layer, expert, kind) each; `token` is the number of tokens decoded before.
        """
        return [CacheEvent(*event) for event in [*self._kept_events, *self._open().cache_events()]]

    def reconfigure(self, plan: str | os.PathLike[str] | Plan) -> dict[str, Any]:
        """Give the cache other slots and splits while the model stays loaded.

        Between two tokens at the earliest; texts that are being generated go on, with the same
        tokens. The memory does not grow: the plan has to fit in what the model was loaded with
        (`stats()["cache"]["arena_bytes"]`). The policy stays the same, and so does what it has
        learned. Of every layer, the experts that the policy values most keep their slots; slots
        that are empty are filled with the plan's `warm` experts, then with those that the policy
        values. Counters go on; `stats()["cache"]["window"]` begins anew.

        Args:
            plan: a JSON file, or a plan from `moerun.planning`.

        Returns:
            `bytes_read`, `seconds`, and `layers`: of each `layer`, `slots` and `split` (and
            `slots_before`, `split_before`), and how many experts were `kept`, `dropped` and
            `warmed`, which is read into empty slots.

        Raises:
            InvalidArgumentError: every expert is in memory, or the plan wants that or another
                policy; or `plan` is neither a path nor a plan.
            OutOfMemoryError: the plan needs more memory than the cache has.
            FormatError: the file is no plan, or one of another model.
            MissingFileError: there is no such file.
            FileError: experts cannot be read. The plan's slots then hold what was read; the rest
                is read when it is needed.
        """
        native = self._open()
        name, text = named_plan(plan)
        check_plan_model(name, self.path, text)
        return native.reconfigure(name, text)

    def residents(self) -> dict[int, list[int]]:
        """Return which experts are in slots now: for each layer with experts their ids.

        Those that the policy would let go last come first. With every expert in memory: all.
        """
        return self._open().residents()

    def routing_window(self) -> RoutingWindow:
        """Return what the last decoded tokens asked of the cache, and how good guesses were.

        Between 4096 and 8192 tokens once there were so many, fewer for a model whose ids would
        take more than 8 MiB. Prompts are not in it.

        Raises:
            InvalidArgumentError: every expert is in memory, so that there is no cache.
        """
        native = self._open()
        window = native.routing_window()
        return RoutingWindow(tuple(_moerun.moe_layers(native)), **window)

    def save_plan(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write the cache as it is now as a plan: slots, splits, and the experts in the slots.

        A model that is loaded with it starts warm: these experts are read at once.

        Args:
            path: the file, which is replaced; None for where `Model.load(plan="auto")` finds it.

        Returns:
            The file.

        Raises:
            InvalidArgumentError: the policy is "static", whose plan is the one it was loaded with.
            FileError: it cannot be written.
        """
        self._open()
        from moerun.planning.stored_plans import save_plan

        return save_plan(cast("Model", self), path, pack=self._pack)

    def _plan_again(self) -> None:
        """Plan anew if the model was loaded with plan="auto" and it is time."""
        if self._planner is not None:
            self._planner.step()
