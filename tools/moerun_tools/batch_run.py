"""moe-run --batch: continues the prompts of a file, many at once."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm  # type: ignore[import-untyped]

from moerun import Batch, BatchResult, Model
from moerun.batch import Schedule
from moerun.errors import MoerunError
from moerun.generation_request import draw_seed
from moerun.user_files import user_path
from moerun_tools.batch_file import BadLine, BatchInput, BatchLine
from moerun_tools.batch_output import BatchOutput, results_in_order
from moerun_tools.closing import Closing
from moerun_tools.command import Interrupted, write_out
from moerun_tools.conversation import Conversation
from moerun_tools.prompt_model import PromptModel
from moerun_tools.report import json_line

# Sequences that wait or run: one is always ready to join, and a large file is no large queue.
_MOST_AHEAD = 4096
_MAX_ERROR = 1000  # characters


class BatchRun:
    """The prompts of a file on their way through a model.

    Args:
        model: the model.
        prompt_model: makes tokens of prompts.
        batch: takes the sequences.
        lines: those to do.
        chat: the prompts are what a user says.
        system: the system message of every chat.
        generation: of lines that do not say otherwise; a line's seed is `seed` + its number - 1.
    """

    def __init__(
        self,
        model: Model,
        prompt_model: PromptModel,
        batch: Batch,
        lines: list[BatchLine | BadLine],
        chat: bool,
        system: str | None,
        generation: dict[str, Any],
    ) -> None:
        self._model = model
        self._prompt_model = prompt_model
        self._batch = batch
        self._lines = lines
        self._chat = chat
        self._system = system
        self._generation = generation
        self._running: dict[int, tuple[BatchLine, list[int]]] = {}
        self.num_reported = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield what becomes of every line, as it ends."""
        for line in self._lines:
            failure = self._add(line)
            if failure is not None:
                self.num_reported += 1
                yield failure
            while self._batch.num_unfinished > _MOST_AHEAD:
                yield self._report(next(self._batch))
        for result in self._batch:
            yield self._report(result)

    def _report(self, result: BatchResult) -> dict[str, Any]:
        self.num_reported += 1
        line, prompt = self._running.pop(result.sequence)
        try:
            text = self._model.tokenizer.decode(result.token_ids, after=prompt)
        except Exception as error:
            return _failure(line, error)
        return {
            **_head(line),
            "text": text,
            "prompt_tokens": result.prompt_tokens,
            "generated_tokens": len(result.token_ids),
            "finish_reason": result.finish_reason,
            "seed": result.seed,
        }

    def _add(self, line: BatchLine | BadLine) -> dict[str, Any] | None:
        """Put a line into the batch, or return why it cannot be."""
        if isinstance(line, BadLine):
            return {"line": line.number, "error": line.error}
        try:
            token_ids = Conversation(self._prompt_model, self._chat, self._system).ask(line.prompt)
            seed = (self._generation["seed"] + line.number - 1) % 2**64
            options = {**self._generation, "seed": seed, **line.generation}
            self._running[self._batch.add(token_ids, **options)] = (line, token_ids)
        except Exception as error:  # the other lines go on
            return _failure(line, error)
        return None


def _failure(line: BatchLine, error: Exception) -> dict[str, Any]:
    """Return the result of a line that cannot be continued, whatever the reason; others can."""
    is_known = isinstance(error, MoerunError)
    text = str(error) if is_known else f"cannot be continued: {type(error).__name__}: {error}"
    return {**_head(line), "error": text[:_MAX_ERROR]}


def _head(line: BatchLine) -> dict[str, Any]:
    return {"line": line.number} | ({} if line.id is None else {"id": line.id})


@contextmanager
def _progress(total: int, done: int, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    tokens = 0
    with tqdm(
        desc="generating",
        unit="text",
        total=total,
        initial=done,
        delay=0 if is_terminal else 1,
        mininterval=0.1 if is_terminal else 5,
        leave=False,
        disable=quiet or sys.stderr is None,
    ) as bar:

        def show(result: dict[str, Any]) -> None:
            nonlocal tokens
            tokens += result.get("generated_tokens", 0)
            bar.set_postfix_str(f"{tokens} tokens", refresh=False)
            bar.update()

        yield show


@dataclass(frozen=True)
class BatchJob:
    """What the command line asks of a batch.

    Attributes:
        lines: the prompts.
        output: where results go; None for standard output, in the order of the lines.
        resume, overwrite: what to do with results that are there.
        batch_size, kv_budget, predictor, schedule: as for `Model.batch`.
        chat: use the chat template.
        system: message of every chat.
        context_length: of the model.
        generation: arguments of `Model.generate`, with the model's own settings.
        given: those of the command line, None where the model decides.
    """

    lines: BatchInput
    output: BatchOutput | None
    resume: bool
    overwrite: bool
    batch_size: int | None
    kv_budget: str | None
    predictor: str | None
    schedule: Schedule | None
    chat: bool
    system: str | None
    context_length: int | None
    generation: dict[str, Any]
    given: dict[str, Any]

    @classmethod
    def prepare(
        cls, path: str, output: str | None, directory: Path, resume: bool, overwrite: bool,
        quiet: bool, **options: Any
    ) -> BatchJob:  # fmt: skip
        """Read the prompts and look at the output, before the model is loaded."""
        lines = BatchInput.read(user_path(path))
        if lines.ignored and not quiet:
            names = ", ".join(lines.ignored)
            noun = "field" if len(lines.ignored) == 1 else "fields"
            click.echo(f"note: ignored unknown {noun}: {names}", err=True)
        target = None
        if output is not None and output != "-":
            target = BatchOutput(
                user_path(output),
                _run_of(lines, directory, options),
                options["generation"]["seed"],
                frozenset(line.number for line in lines.lines),
            )
            target.check([path], resume, overwrite)
        return cls(lines, target, resume, overwrite, **options)

    def run(
        self, model: Model, prompt_model: PromptModel, *, as_json: bool, closing: Closing
    ) -> int:
        """Continue every prompt, and return how many lines failed.

        Raises:
            Interrupted: Ctrl-C ended the run; the closing lines have been written.
        """
        output = self.output
        failed: list[int] = []
        with (
            model.batch(
                self.batch_size,
                self.kv_budget,
                predictor=self.predictor,
                schedule=self.schedule,
            ) as batch,
            output or nullcontext(),
        ):
            seed = self.generation["seed"] if output is None else output.seed
            seed = draw_seed() if seed is None else seed
            if output is not None:
                output.seed = seed
                output.open(self.resume, self.overwrite)
            done = {} if output is None else output.done
            before = len(done)
            failed += [number for number, result in done.items() if "error" in result]
            todo = [line for line in self.lines.lines if line.number not in done]
            generation = {**self.given, "seed": seed}
            run = BatchRun(model, prompt_model, batch, todo, self.chat, self.system, generation)
            try:
                self._run(run, todo, before, failed, closing.quiet)
            except KeyboardInterrupt:
                num_done = len(self.lines.lines) - len(todo) + run.num_reported
                closing.after_batch(model.stats(), num_done, len(failed), before, True)
                raise Interrupted from None
            if output is not None:
                output.finish()
        self._report(model.stats(), sorted(failed), before, as_json, closing)
        return len(failed)

    def _run(
        self,
        run: BatchRun,
        todo: list[BatchLine | BadLine],
        before: int,
        failed: list[int],
        quiet: bool,
    ) -> None:
        in_order, ready = deque(todo), dict[int, dict[str, Any]]()
        try:
            with _progress(len(self.lines.lines), before, quiet) as show:
                for result in run:
                    if "error" in result:
                        failed.append(result["line"])
                    if self.output is not None:
                        self.output.add(result)
                    else:
                        ready[result["line"]] = result
                        for each in results_in_order(in_order, ready):
                            write_out(json_line(each))
                    show(result)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                click.echo(err=True)
            if self.output is not None and self.output.done:
                click.echo(
                    f"moe-run: {len(self.output.done)} of {len(self.lines.lines)} lines are in "
                    f"{self.output.partial_path}; --resume goes on from there",
                    err=True,
                )
            raise

    def _report(
        self,
        stats: dict[str, Any],
        failed: list[int],
        before: int,
        as_json: bool,
        closing: Closing,
    ) -> None:
        num_lines = len(self.lines.lines)
        if as_json:
            summary = {"lines": num_lines, "failed_lines": failed, "stats": stats}
            write_out(json_line(summary))
        else:
            closing.after_batch(stats, num_lines, len(failed), before)
        if failed:
            shown = ", ".join(str(number) for number in failed[:10])
            more = f" and {len(failed) - 10} more" if len(failed) > 10 else ""
            where = "" if self.output is None else f"; {self.output.path} says why"
            noun = "line" if len(failed) == 1 else "lines"
            click.echo(f"moe-run: {len(failed)} {noun} failed: {shown}{more}{where}", err=True)


def _run_of(lines: BatchInput, directory: Path, options: dict[str, Any]) -> dict[str, str]:
    """Return what is the same for two runs whose results may be mixed, by name."""
    from moerun.identity import ModelIdentity

    names = ("chat", "system", "context_length", "generation")
    given = json.dumps([options[name] for name in names], sort_keys=True)
    return {
        "prompts": lines.fingerprint,
        **ModelIdentity(directory).all_parts,
        "options of generation": hashlib.sha256(given.encode()).hexdigest(),
    }
