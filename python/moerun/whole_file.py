"""A file that is complete under its name, or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from moerun.errors import FileError

_START_BYTES = 100  # of a name, in that of its temporary file


def replace_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside `path`, then give it its name.

    Raises:
        FileError: it cannot be written.
    """
    target = Path(os.path.realpath(path))  # what a link names, not the link
    temporary = None
    try:
        # Short enough for a name that has all the bytes which a file system allows.
        start = os.fsdecode(os.fsencode(target.name)[:_START_BYTES])
        handle, temporary = tempfile.mkstemp(prefix=f".{start}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp lets nobody else read
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
