"""The folder of a trace that is being written: its lock, its shards, and their way to their names.

A file `moving` is there while shards go from the folder to their names or back; it says how many
there are. After a crash it tells the files of this trace from those of a trace that is replaced.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from moerun.trace.header import SUFFIX, partial_folder, shard_path
from moerun.trace.shard_file import sync_folder
from moerun.write_lock import WriteLock, check_unlocked

_LOCK = "lock"


def check_free(path: Path) -> Path | None:
    """Refuse a trace that another process writes now.

    Args:
        path: where the trace is to go.

    Returns:
        The folder of an unfinished recording, None if there is none.

    Raises:
        FileError: another process writes it.
    """
    folder = partial_folder(path)
    check_unlocked(folder / _LOCK, path)
    try:
        names = os.listdir(folder)
    except OSError:
        return None
    return folder if any(name != _LOCK and not name.endswith(".tmp") for name in names) else None


class WorkFolder:
    """The folder `<path>.partial`, locked until `leave` or until the process ends.

    Args:
        path: where the trace goes.

    Raises:
        FileError: another process writes to this name, or the folder cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = partial_folder(path)
        self._lock = WriteLock(self._folder / _LOCK, path)
        self._moving = self._folder / "moving"
        self.journal = self._folder / "journal"

    def __str__(self) -> str:
        return str(self._folder)

    def shards(self) -> list[Path]:
        """Return the shards that are there, in order."""
        return sorted(self._folder.glob(f"[0-9]*{SUFFIX}"))

    def shard(self, index: int) -> Path:
        """Return the name of a shard, counted from 1."""
        return self._folder / f"{index:05d}{SUFFIX}"

    def files(self) -> list[Path]:
        """Return all that another writer has left."""
        own = (self.journal, self._moving)
        return [*self.shards(), *(file for file in own if file.exists())]

    def clean(self) -> None:
        """Remove files that were never complete."""
        for file in self._folder.glob("*.tmp"):
            file.unlink()

    @property
    def is_moving(self) -> bool:
        """Whether a process ended while it moved files."""
        return self._moving.exists()

    def move_out(self, shards: Sequence[Path], replaced: Sequence[Path]) -> list[Path]:
        """Give shards their names and remove the folder.

        Args:
            shards: all of the trace, in order.
            replaced: files of an older trace of this name.

        Returns:
            The new names.
        """
        targets = [shard_path(self._path, i, len(shards)) for i in range(1, len(shards) + 1)]
        if len(targets) == 1:  # there is always one trace of this name
            replaced = [file for file in replaced if file not in targets]
        # All is in the shards; a journal beside a finished trace would look like its successor.
        self.journal.unlink(missing_ok=True)
        for file in replaced:
            file.unlink(missing_ok=True)
        if len(targets) > 1:
            sync_folder(self._path.parent)
            self._mark_moving(len(targets))
        for file, target in zip(shards, targets, strict=True):
            os.replace(file, target)
        sync_folder(self._path.parent)
        self.remove()
        return targets

    def take_in(self, count: int) -> None:
        """Move the `count` files of a finished trace into the folder."""
        self._mark_moving(count)
        self.finish_moving()

    def _mark_moving(self, count: int) -> None:
        temporary = self._moving.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(str(count).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._moving)
        sync_folder(self._folder)

    def finish_moving(self) -> None:
        """Take the files of a trace in that were on their way, whichever way it was."""
        text = self._moving.read_bytes()
        count = int(text) if text.isdigit() and len(text) < 6 else 0
        for index in range(1, count + 1):
            file = shard_path(self._path, index, count)
            if file.exists() and not self.shard(index).exists():
                os.replace(file, self.shard(index))
        sync_folder(self._folder)
        self._moving.unlink()

    def remove(self) -> None:
        """Remove the folder with what is left in it, and let others write."""
        self.clean()
        for file in self.files():
            file.unlink()
        self.leave()

    def leave(self) -> None:
        """Let others write; the folder stays if something is in it, perhaps the next lock."""
        self._lock.release()
        with contextlib.suppress(OSError):
            self._folder.rmdir()
