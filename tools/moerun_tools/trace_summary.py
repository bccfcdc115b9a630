"""How the end of a recording is reported."""

from __future__ import annotations

from pathlib import Path

from moerun.recording import RecordingSummary
from moerun_tools.report import json_line
from moerun_tools.units import as_rate, counted


def closing_lines(summary: RecordingSummary, notes: list[str], is_interrupted: bool) -> list[str]:
    """Return what is said at the end: what was written, then what to know about it."""
    written = [_name_of(files) for files in summary.files.values() if files]
    if is_interrupted and not written:
        return ["interrupted before the first sequence was done; nothing was written"]
    if summary.num_new_sequences == 0 and not is_interrupted:
        verb = "is" if len(written) == 1 else "are"
        return [f"nothing to do: {' and '.join(written)} {verb} complete"]
    counts = counted(summary.num_new_sequences, "sequence")
    counts += f" ({counted(summary.num_new_tokens, 'token')})"
    if summary.num_sequences > summary.num_new_sequences:
        counts += f", {summary.num_sequences:,} in all,"
    rate = as_rate(_tokens_per_s(summary))
    lines = [f"recorded {counts} of {summary.model} at {rate} tok/s: {' and '.join(written)}"]
    lines += [f"note: {note}" for note in notes]
    if is_interrupted:
        lines.append("interrupted: this is a valid trace; the same command with --resume goes on")
    return lines


def failure_line(summary: RecordingSummary) -> str:
    """Return what is said before the error that ended a recording in the middle."""
    written = [_name_of(files) for files in summary.files.values() if files]
    if not written:  # the files could not be written; those that were full are kept
        return "stopped by an error: the same command with --resume goes on with what was written"
    return (
        f"stopped by an error: {counted(summary.num_sequences, 'sequence')} of {summary.model}: "
        f"{' and '.join(written)}; the same command with --resume goes on"
    )


def summary_object(summary: RecordingSummary, notes: list[str], is_interrupted: bool) -> str:
    """Return what --json prints."""
    return json_line(
        {
            "model": summary.model,
            "engine": summary.engine,
            "phase": summary.phase,
            "traces": [
                {"stack": stack, "files": [str(file) for file in files]}
                for stack, files in summary.files.items()
            ],
            "num_sequences": summary.num_sequences,
            "num_new_sequences": summary.num_new_sequences,
            "num_new_tokens": summary.num_new_tokens,
            "domains": summary.domains,
            "seconds": summary.seconds,
            "tokens_per_s": _tokens_per_s(summary),
            "notes": notes,
            "interrupted": is_interrupted,
        }
    )


def _tokens_per_s(summary: RecordingSummary) -> float | None:
    return summary.num_new_tokens / summary.seconds if summary.seconds > 0 else None


def _name_of(files: list[Path]) -> str:
    """Return one name for the files of a trace: the only one, or the first and how many."""
    if len(files) == 1:
        return str(files[0])
    return f"{files[0]} and {len(files) - 1} more"
