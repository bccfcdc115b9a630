"""The exceptions that moerun raises, each also a builtin exception that callers may expect.

The native module raises the same classes. Every message says what was found, what was expected,
and which file, tensor, field or argument is meant.
"""


class MoerunError(Exception):
    """Anything that moerun reports; the base of all classes below."""


class InvalidArgumentError(MoerunError, ValueError):
    """An argument of a call has the wrong type or is out of its documented range."""


class FormatError(MoerunError, ValueError):
    """A file was read, but its content is wrong: a lying header, a missing tensor, broken JSON."""


class UnsupportedModelError(MoerunError, ValueError):
    """A well-formed model that this version of moerun cannot run."""


class OutOfMemoryError(MoerunError, MemoryError):
    """The memory of a tier ran out."""


class DeviceError(MoerunError, RuntimeError):
    """A device failed in the middle of its work, and what was on it is lost.

    The first error says what failed. From then on every call that computes with the model raises
    this class: load the model again, or, where the message says so, start the process again.
    """


class ForkError(MoerunError, RuntimeError):
    """A forked process cannot use a model or predictor that its parent loaded.

    This happens where the parent was at work at the moment of the fork, and with device "cuda".
    Load the model in the new process, or start processes with the method "spawn".
    """


class FileError(MoerunError, OSError):
    """A file or a repository cannot be opened, read, downloaded or written."""


class MissingFileError(FileError, FileNotFoundError):
    """A file, a directory or a repository that is needed does not exist."""


class MoerunWarning(UserWarning):
    """Something was left out or done otherwise than asked, and the result says less for it."""
