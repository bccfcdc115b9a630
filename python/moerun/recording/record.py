"""Records traces: sequence after sequence, so that an end at any time leaves a valid one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moerun import _moerun
from moerun.arguments import check_int, check_number
from moerun.errors import FileError, InvalidArgumentError, MissingFileError
from moerun.recording.data import DataSource
from moerun.recording.engine import Engine, Stack, TraceOptions
from moerun.recording.interrupts import interrupts_delayed
from moerun.recording.sequences import Sequences, sequences_of
from moerun.trace import TraceWriter
from moerun.trace.header import shards_on_disk
from moerun.trace.work_folder import check_free
from moerun.user_files import user_path

_SUFFIX = ".safetensors"
_MAX_SEED = 2**64
MAX_TOKENS = 2**31 - 1  # of a sequence, and sequences of a domain


@dataclass
class RecordingSummary:
    """What a recording has written.

    Attributes:
        model: name of the model.
        engine: what ran it.
        phase: "prefill" or "decode".
        files: the files of each trace, by the name of its stack; None for the only one.
        num_sequences: sequences in each trace.
        num_new_sequences: those of them that this call has recorded.
        num_new_tokens: tokens that this call has recorded, of all traces together.
        seconds: how long that took.
        domains: sequences of each domain.
    """

    model: str
    engine: str
    phase: str
    files: dict[str | None, list[Path]] = field(default_factory=dict)
    num_sequences: int = 0
    num_new_sequences: int = 0
    num_new_tokens: int = 0
    seconds: float = 0.0
    domains: dict[str, int] = field(default_factory=dict)


class RecordingInterrupted(KeyboardInterrupt):
    """Ctrl-C ended a recording; what was done is a valid trace, which can be resumed.

    Attributes:
        summary: what was done.
    """

    def __init__(self, summary: RecordingSummary) -> None:
        super().__init__()
        self.summary = summary


def record(
    engine: Engine,
    sources: Sequence[DataSource],
    output: str | os.PathLike[str],
    *,
    length: int = 512,
    samples: int = 64,
    seed: int = 0,
    options: TraceOptions | None = None,
    shard_bytes: int = 256 * 2**20,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    on_failure: Callable[[RecordingSummary], None] | None = None,
) -> RecordingSummary:
    """Record which experts the tokens of some data use.

    Args:
        engine: the model.
        sources: the domains, each with a name of its own.
        output: the trace, *.safetensors; with an encoder and a decoder, two beside each other,
            `NAME-encoder.safetensors` and `NAME-decoder.safetensors`.
        length: tokens of a sequence; of the prompt, when `options.generate` tokens follow it.
        samples: most sequences of a domain.
        seed: of sampling.
        options: what is recorded of a sequence.
        shard_bytes: a file is written when this much is there for it.
        resume: go on with what is there; everything else must be as it was.
        overwrite: remove what is there.
        progress: called with the tokens done and those of all sequences that may come.
        on_failure: told what was written when an error ends the recording in the middle.

    Raises:
        RecordingInterrupted: after Ctrl-C.
        InvalidArgumentError: an argument is out of its range, a domain has less than one sequence,
            or `resume` finds a trace that was recorded otherwise.
        FileError: data cannot be read, or the trace cannot be written or exists already.
        FormatError: data are empty or wrong.
    """
    options = options or TraceOptions()
    check_int("length", length, 1, MAX_TOKENS)
    check_int("samples", samples, 1, MAX_TOKENS)
    check_int("generate", options.generate, 0, MAX_TOKENS)
    check_number("temperature", options.temperature, 0)
    check_int("seed", seed, 0, _MAX_SEED - 1)
    engine.check_length(length + options.generate)
    if not sources:
        raise InvalidArgumentError("there are no data to record")
    names = [source.domain for source in sources]
    if len(set(names)) != len(names):
        raise InvalidArgumentError(
            f"every domain needs a name of its own, found {', '.join(names)}"
        )
    if resume and overwrite:
        raise InvalidArgumentError("resume and overwrite exclude each other")

    summary = RecordingSummary(
        engine.model_name, engine.name, "decode" if options.generate else "prefill"
    )
    settings = {
        **engine.settings,
        **asdict(options),
        "length": length,
        "samples": samples,
        "seed": seed,
        "separator": engine.separator,
        "data": {source.domain: source.fingerprint() for source in sources},
    }
    # The first sequence of every domain: what is wrong there shows before the first is traced.
    packed = [
        sequences_of(
            source,
            engine.encode,
            vocab_size=engine.vocab_size,
            separator=engine.separator,
            length=length,
            samples=samples,
        )
        for source in sources
    ]
    writers: list[tuple[Stack, TraceWriter]] = []
    try:
        with ExitStack() as closing:
            for stack in engine.stacks:
                metadata = _metadata(engine, stack, summary.phase, settings)
                writer = TraceWriter(
                    path_of(output, stack.name),
                    model=engine.model_name,
                    num_experts=stack.num_experts,
                    top_k=stack.top_k,
                    moe_layers=list(stack.moe_layers),
                    metadata=metadata,
                    shard_bytes=shard_bytes,
                    resume=resume,
                    overwrite=overwrite,
                )
                # In the order of the stacks; closing is the other way.
                summary.files[stack.name] = []
                closing.callback(_close, writer, stack, summary)
                writers.append((stack, writer))
            started = time.perf_counter()
            try:
                _record_all(
                    engine, names, packed, writers, samples, seed, options, summary, progress
                )
            except KeyboardInterrupt:
                raise RecordingInterrupted(summary) from None
            finally:
                summary.seconds = time.perf_counter() - started
                summary.num_sequences = min(writer.num_sequences for _, writer in writers)
    except Exception:  # the files have their names now
        if on_failure is not None and summary.num_sequences > 0:
            on_failure(summary)
        raise
    return summary


def check_output(
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    can_resume: bool = True,
) -> None:
    """Refuse a name that cannot be written to, before a model is loaded for nothing.

    Args:
        output: where the trace is to go.
        resume: go on with what is there.
        overwrite: remove what is there.
        can_resume: whether the message may offer `resume`.

    Raises:
        InvalidArgumentError: it does not end in .safetensors.
        FileError: there is no such directory, a trace of this name and neither `resume` nor
            `overwrite` is set, or another process writes it.
    """
    path = user_path(output, "the output")
    if not path.name.endswith(_SUFFIX) or path.name == _SUFFIX:
        raise InvalidArgumentError(f"a trace is a *{_SUFFIX} file, not {path}; try {path}{_SUFFIX}")
    if os.path.isdir(path):
        raise FileError(f"{path} is a directory; name a *{_SUFFIX} file")
    if not os.path.isdir(path.parent):
        raise MissingFileError(f"there is no directory {path.parent} to write {path.name} in")
    for stack in (None, "encoder", "decoder"):
        target = path_of(path, stack)
        folder = check_free(target)  # of a process that was killed
        there = [*shards_on_disk(target), *([] if folder is None else [folder])]
        if there and not resume and not overwrite:
            offer = "--resume goes on with it, " if can_resume else ""
            raise FileError(f"{there[0]} exists already: {offer}--overwrite replaces it")


def path_of(output: str | os.PathLike[str], stack: str | None) -> Path:
    """Return where the trace of a stack goes."""
    path = user_path(output, "the output")
    if stack is None or not path.name.endswith(_SUFFIX):
        return path
    return path.with_name(f"{path.name.removesuffix(_SUFFIX)}-{stack}{_SUFFIX}")


def _record_all(
    engine: Engine,
    names: Sequence[str],
    packed: Sequence[Sequences],
    writers: Sequence[tuple[Stack, TraceWriter]],
    samples: int,
    seed: int,
    options: TraceOptions,
    summary: RecordingSummary,
    progress: Callable[[int, int], None] | None,
) -> None:
    # Of two traces, one may have a sequence more than the other when Ctrl-C came between them.
    there = [writer.num_sequences for _, writer in writers]
    sequences_total = samples * len(names)
    number = 0
    tokens = 0
    for name, sequences in zip(names, packed, strict=True):
        first_number = number
        for token_ids in sequences:
            if tokens == 0:
                tokens = options.generate or len(token_ids)
                if progress is not None:
                    progress(min(there) * tokens, sequences_total * tokens)
            if number >= min(there):
                routings = engine.trace(token_ids, options, (seed + number) % _MAX_SEED)
                with interrupts_delayed():
                    for (_, writer), routing in zip(writers, routings, strict=True):
                        if writer.num_sequences == number:
                            writer.append(routing, name)
                            summary.num_new_tokens += routing.num_tokens
                    summary.num_new_sequences += 1
            number += 1
            summary.domains[name] = number - first_number
            if progress is not None and number > min(there):
                progress(number * tokens, sequences_total * tokens)
        sequences_total -= samples - (number - first_number)  # the domain ended early


def _close(writer: TraceWriter, stack: Stack, summary: RecordingSummary) -> None:
    with interrupts_delayed():
        summary.files[stack.name] = writer.close()


def _metadata(engine: Engine, stack: Stack, phase: str, settings: dict[str, Any]) -> dict[str, str]:
    # An encoder sees whole texts, whatever the decoder does.
    metadata = {
        "engine": engine.name,
        "phase": "prefill" if stack.name == "encoder" else phase,
        "expert_bytes": str(stack.expert_bytes),
        "recording": json.dumps(settings, sort_keys=True),
        "created_by": f"moerun {_moerun.__version__}",
    }
    if stack.name is not None:
        metadata["stack"] = stack.name
    return metadata
