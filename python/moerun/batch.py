"""Many texts at once: sequences join a batch and leave it, each with the text it has alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import WeakSet

from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_int, check_str, shown
from moerun.cache_options import size_text
from moerun.errors import InvalidArgumentError, MoerunError
from moerun.generation_request import MAX_SEED, GenerationRequest, draw_seed, request_of
from moerun.identity import ModelIdentity
from moerun.user_files import user_path

if TYPE_CHECKING:
    from moerun.model import Model


_MOST = 2**31 - 1

Schedule = bool | Literal["auto"]


@dataclass(frozen=True)
class BatchResult:
    """A text that has ended.

    Attributes:
        sequence: its number in the batch: sequences count from 0, as they are added.
        prompt_tokens: number of tokens of the prompt.
        token_ids: what was generated, with the token that ended it.
        finish_reason: "eos", "stop", "length" or "context", as of `Generation`.
        seed: of its random numbers.
    """

    sequence: int
    prompt_tokens: int
    token_ids: list[int]
    finish_reason: str
    seed: int


@dataclass
class _Running:
    request: GenerationRequest
    token_ids: list[int]


class Batch(Iterator[BatchResult]):
    """Sequences that are decoded together, a token of each in a step; made by `Model.batch`.

    Iterating gives every text when it has ended, the first to end first. Sequences may be added
    at any time, also from other threads; those for which there is no room wait, in the order of
    their arrival.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int | None,
        kv_budget: str | int | None,
        predictor: str | os.PathLike[str] | None,
        schedule: Schedule | None,
    ) -> None:
        self._model = model
        self._lock = RLock()  # a signal handler may come back in the middle of a step
        _batches.add(self)
        self._native: _moerun.BatchGeneration | None = _moerun.BatchGeneration(
            model._open(),
            batch_size=0 if batch_size is None else check_int("batch_size", batch_size, 1, _MOST),
            kv_budget="" if kv_budget is None else size_text("kv_budget", kv_budget, 1),
            **scheduling_options(model.path, predictor, schedule),
        )
        self._running: dict[int, _Running] = {}
        self._ended: list[BatchResult] = []

    def add(self, token_ids: Iterable[int] | NDArray[Any], **generation: Any) -> int:
        """Put a sequence at the end of those that wait.

        Args:
            token_ids: the prompt, at least one token and fewer than the model's context_length.
            **generation: `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `seed`, `stop`, `ignore_eos`, as of `Model.generate`.

        Returns:
            Its number: sequences count from 0.

        Raises:
            InvalidArgumentError: an argument has the wrong type or is out of its range, the prompt
                leaves no room in the context, or it needs more than the KV budget with its answer.
                What was added before is not touched.
        """
        request = request_of(self._model, token_ids, **generation)
        with self._lock:
            number = self._open().add(request.prompt, **request.native)
            self._running[number] = _Running(request, [])
            return number

    def cancel(self, sequence: int) -> None:
        """End a sequence without a result; nothing happens if it has ended."""
        with self._lock:
            self._open().cancel(check_int("sequence", sequence, 0, MAX_SEED))
            self._running.pop(sequence, None)

    def step(self) -> list[tuple[int, int]]:
        """Give each sequence that runs its next token; first of all, let those join that can.

        A step either runs the prompts of sequences that join, which gives each of them its first
        token, or decodes one token of each that runs.

        Returns:
            (sequence, token id) each; nothing when every sequence has ended.

        Raises:
            DeviceError: the device failed. This and any other error end all sequences, also
                KeyboardInterrupt.
        """
        with self._lock:
            native = self._open()
            try:
                tokens = native.step()
                for sequence, token_id, is_last in tokens:
                    self._note(native, sequence, token_id, is_last)
            except BaseException:
                for sequence in self._running:
                    native.cancel(sequence)
                self._running.clear()
                raise
        return [(sequence, token_id) for sequence, token_id, _ in tokens]

    def close(self) -> None:
        """End all sequences and give their memory back; the batch cannot be used afterwards."""
        with self._lock:
            self._running.clear()
            self._native = None

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def num_unfinished(self) -> int:
        """Sequences that wait or run."""
        return len(self._running)

    def __iter__(self) -> Batch:
        return self

    def __next__(self) -> BatchResult:
        while not self._ended:
            if not self._running:
                raise StopIteration
            self.step()
        return self._ended.pop(0)

    def results(self) -> list[BatchResult]:
        """Return all texts that have not been handed out, in the order in which they were added."""
        return sorted(self, key=lambda result: result.sequence)

    def _open(self) -> _moerun.BatchGeneration:
        if self._native is None:
            raise MoerunError("the batch is closed")
        return self._native

    def _note(
        self, native: _moerun.BatchGeneration, sequence: int, token_id: int, is_last: bool
    ) -> None:
        running = self._running.get(sequence)
        if running is None:  # cancelled while its token was computed
            return
        request = running.request
        running.token_ids.append(token_id)
        reason = request.reason_of_token.get(token_id)
        strings = request.stop_strings
        if reason is None and strings is not None and strings.push(token_id):
            reason = "stop"
            native.cancel(sequence)
        if reason is None and is_last:
            reason = request.reason_at_limit
        if reason is None:
            return
        del self._running[sequence]
        self._ended.append(
            BatchResult(sequence, len(request.prompt), running.token_ids, reason, request.seed)
        )


_batches: WeakSet[Batch] = WeakSet()


def _renew_locks() -> None:
    """Replace locks in a forked process: threads that hold them may exist only in the parent."""
    for batch in _batches:
        batch._lock = RLock()


os.register_at_fork(after_in_child=_renew_locks)


def scheduling_options(
    model: str | os.PathLike[str],
    predictor: str | os.PathLike[str] | None,
    schedule: Schedule | None,
) -> dict[str, str]:
    """Return the predictor and the schedule of a batch as the native module takes them.

    Raises:
        InvalidArgumentError: one of them has the wrong type.
    """
    if schedule is None:
        schedule = "auto" if predictor is not None else False
    if schedule is not False and schedule is not True and schedule != "auto":
        raise InvalidArgumentError(f'schedule must be True, False or "auto", not {shown(schedule)}')
    names = {True: "on", False: "off", "auto": "auto"}
    if predictor is None:  # which the runtime refuses, unless it is off
        nothing = {"predictor": "", "model_id": "", "tokenizer_hash": ""}
        return {"schedule": names[schedule], **nothing}
    identity = ModelIdentity(model)
    return {
        "schedule": names[schedule],
        "predictor": check_str("predictor", str(user_path(predictor, "predictor"))),
        "model_id": identity.model_id,
        "tokenizer_hash": identity.tokenizer_hash,
    }


class BatchControl:
    """The part of `Model` that runs many texts at once."""

    def batch(
        self,
        batch_size: int | None = None,
        kv_budget: str | int | None = None,
        *,
        predictor: str | os.PathLike[str] | None = None,
        schedule: Schedule | None = None,
    ) -> Batch:
        """Return a batch without sequences, to add some to while it runs.

        Args:
            batch_size: most sequences that run at once; 1 to `prefill_chunk` or `context_length`,
                whichever is smaller. None for 16, or that.
            kv_budget: most memory for the keys and values of their tokens: bytes, a text such as
                "2GiB", or a share of what `batch_size` sequences take that fill the context.
                Sequences for which there is no room wait. None for as much as can be needed, but
                no more than half of the free memory.
            predictor: a file of `moerun.predictor.train` for this model, for scheduling, and for a
                model that was loaded with the policy "predictive".
            schedule: True: twice `batch_size` sequences run, and half of them, those that are
                predicted to use the same experts, decode in a step; False: no such thing; "auto":
                for as long as it is not slower than the order of arrival. None for "auto" with a
                predictor, else False. The texts are the same.

        Raises:
            InvalidArgumentError: an argument has the wrong type or is out of its range, or there is
                no predictor to schedule with.
            MissingFileError, FileError: the predictor cannot be read.
            FormatError: it is damaged, or of another model or tokenizer.
            OutOfMemoryError: there is too little memory for `kv_budget`.
        """
        return Batch(cast("Model", self), batch_size, kv_budget, predictor, schedule)

    def generate_batch(
        self,
        prompts: Iterable[Iterable[int] | NDArray[Any]],
        *,
        batch_size: int | None = None,
        kv_budget: str | int | None = None,
        predictor: str | os.PathLike[str] | None = None,
        schedule: Schedule | None = None,
        seed: int | None = None,
        **generation: Any,
    ) -> Batch:
        """Continue many prompts at once; each gets the text that it gets alone.

        Args:
            prompts: token ids of each, as for `generate`.
            batch_size: as for `batch`.
            kv_budget: as for `batch`.
            predictor: as for `batch`.
            schedule: as for `batch`.
            seed: of the first prompt; the n-th one after it has `seed` + n. None draws one.
            **generation: the other arguments of `generate`, the same for all prompts.

        Returns:
            An iterator of the texts, the first to end first; its `results()` gives all in the order
            of the prompts. They are computed as they are asked for.

        Raises:
            InvalidArgumentError: an argument has the wrong type or is out of its range; of a
                prompt, the message says its number.
            OutOfMemoryError, MissingFileError, FileError, FormatError: as for `batch`.
        """
        batch = self.batch(batch_size, kv_budget, predictor=predictor, schedule=schedule)
        first = draw_seed() if seed is None else check_int("seed", seed, 0, MAX_SEED)
        for number, token_ids in enumerate(prompts):
            try:
                batch.add(token_ids, seed=(first + number) % (MAX_SEED + 1), **generation)
            except InvalidArgumentError as error:
                raise InvalidArgumentError(f"prompts[{number}]: {error}") from None
        return batch
