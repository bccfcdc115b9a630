"""Runs a predictor; no PyTorch is needed for that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_str, check_token_ids, shown
from moerun.errors import InvalidArgumentError
from moerun.identity import ModelIdentity
from moerun.metrics.groups import num_threads
from moerun.predictor.files import PredictorInfo, read_info
from moerun.user_files import user_path


class PathState:
    """What the tokens of one sequence have left behind; made by `PathPredictor.state`."""

    def __init__(self, native: _moerun.PathState, owner: PathPredictor) -> None:
        self._native = native
        self._owner = owner

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence so far."""
        return self._native.num_tokens

    @property
    def bytes(self) -> int:
        """Memory that it takes, however long the sequence gets."""
        return self._native.bytes

    def clear(self) -> None:
        """Go back to the start of a sequence."""
        self._native.clear()


class PathPredictor:
    """Probabilities of all layers' experts, from the tokens alone; made by `PathPredictor.open`.

    One call at a time computes, others wait.

    Attributes:
        path: of its file.
        info: what the file says about it.
    """

    def __init__(self, native: _moerun.PathPredictor, path: Path, info: PredictorInfo) -> None:
        self._native = native
        self.path = path
        self.info = info

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: str | os.PathLike[str] | None = None,
        *,
        threads: int | None = None,
        cpu_kernels: str = "auto",
    ) -> PathPredictor:
        """Open a predictor.

        Args:
            path: a file that `train` has written.
            model: directory or repository id of the model that the predictor must be of; None to
                take any.
            threads: number of CPU threads; None for one a core.
            cpu_kernels: as for `moerun.Model.load`.

        Raises:
            MissingFileError, FileError: a file cannot be read, or there is no such model.
            FormatError: the file is no predictor, is damaged, or is of another model.
            InvalidArgumentError: an argument has the wrong type or is out of its range.
        """
        file = user_path(path)
        expected = {} if model is None else ModelIdentity(model).expected
        native = _moerun.PathPredictor(
            check_str("path", str(file)),
            threads=num_threads(threads),
            cpu_kernels=check_str("cpu_kernels", cpu_kernels),
            **expected,
        )
        return cls(native, file, read_info(file))

    def predict(self, token_ids: Any) -> NDArray[np.float32]:
        """Return the probabilities after each token of a sequence: (T, L, E) float32.

        Row t says which experts token t itself will use, from the tokens up to it.

        Raises:
            InvalidArgumentError: there are no tokens, or one is outside the vocabulary.
        """
        return self._native.predict(check_token_ids(token_ids, self.info.vocab_size))

    def state(self) -> PathState:
        """Return the state of a sequence without tokens."""
        return PathState(self._native.make_state(), self)

    def advance(
        self, states: Sequence[PathState], new_tokens: Sequence[Any]
    ) -> NDArray[np.float32]:
        """Give some sequences their next tokens, and return the probabilities after the last ones.

        How tokens are divided into calls, and which sequences share one, changes no bit.

        Args:
            states: of this predictor, each once.
            new_tokens: for each state at least one token id.

        Returns:
            (sequences, L, E) float32.

        Raises:
            InvalidArgumentError: a state is not of this predictor or comes twice, or tokens are
                missing or outside the vocabulary; no state has changed then.
        """
        if len(states) != len(new_tokens):
            raise InvalidArgumentError(
                f"new_tokens: expected tokens for each of {len(states)} states, found "
                f"{len(new_tokens)}"
            )
        for state in states:
            if not isinstance(state, PathState) or state._owner is not self:
                raise InvalidArgumentError(
                    f"states: expected states of this predictor, found {shown(state)}"
                )
        ids = [check_token_ids(tokens, self.info.vocab_size) for tokens in new_tokens]
        return self._native.advance([state._native for state in states], ids)

    @property
    def memory_bytes(self) -> int:
        """Memory for weights and scratch; states come on top."""
        return self._native.memory_bytes

    def __repr__(self) -> str:
        info = self.info
        return (
            f"<moerun.predictor.PathPredictor {self.path} model={info.model} "
            f"layers={len(info.moe_layers)} num_experts={info.num_experts} "
            f"parameters={info.num_parameters}>"
        )
