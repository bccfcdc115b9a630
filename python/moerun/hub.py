"""From what a user calls a model to the directory that holds it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from moerun.errors import FileError, InvalidArgumentError, MissingFileError
from moerun.user_files import user_path

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# What a checkpoint needs, at the top of the repository only: folders below hold other formats, and
# consolidated*.safetensors repeats all weights under other names.
_ALLOW_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
_IGNORE_PATTERNS = ["*/*", "consolidated*"]


def default_model() -> Path:
    """Return the directory of the small trained model that is installed with moerun."""
    return Path(__file__).resolve().parent / "models" / "tiny-olmoe"


def resolve_model(path: str | os.PathLike[str] | None) -> Path:
    """Return the directory of a model, downloading it if `path` is a Hugging Face repository.

    Args:
        path: a directory; or a repository id `organisation/name`, taken from the local Hugging
            Face files or downloaded; or None for `default_model()`.

    Raises:
        MissingFileError: there is no such directory, or no such repository.
        FileError: the repository cannot be downloaded, or `path` is not a directory.
    """
    if path is None:
        return default_model()
    name = os.fspath(path)
    if not isinstance(name, str) or not name:
        raise InvalidArgumentError(f"a model is a path or a repository id, not {path!r}")
    directory = user_path(name)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise FileError(
            f"{directory} is a file, not a model: name the directory that holds config.json and "
            "the *.safetensors files"
        )
    if isinstance(path, str) and _REPO_ID.fullmatch(name):
        return _download(name)
    raise MissingFileError(
        f"there is no directory {name}. A model is a directory with config.json and *.safetensors "
        "files, or a Hugging Face repository id such as allenai/OLMoE-1B-7B-0924"
    )


def check_repository(repo_id: str) -> None:
    """Find out in one request whether a repository is on this machine or can be downloaded.

    Raises:
        MissingFileError: there is none of that name, or it is out of reach.
        FileError: it cannot be downloaded.
    """
    _download(repo_id, ["config.json"])


def _download(repo_id: str, patterns: list[str] = _ALLOW_PATTERNS) -> Path:
    import huggingface_hub

    try:
        directory = huggingface_hub.snapshot_download(
            repo_id, allow_patterns=patterns, ignore_patterns=_IGNORE_PATTERNS
        )
    except Exception as error:  # its errors are of many classes, and of several libraries
        raise _explain(repo_id, error) from error
    return Path(directory)


def _explain(repo_id: str, error: Exception) -> FileError:
    # By name: the classes have moved between modules of huggingface_hub.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    nowhere = f"there is no directory {repo_id}, and"
    if "GatedRepoError" in kinds:
        return FileError(
            f"the Hugging Face repository {repo_id} asks for a licence to be accepted first: open "
            f"https://huggingface.co/{repo_id}, accept it, then run `hf auth login`"
        )
    if "RepositoryNotFoundError" in kinds:
        return MissingFileError(
            f"{nowhere} Hugging Face has no public model {repo_id}. Check the name; for a private "
            "model run `hf auth login` first"
        )
    if "LocalEntryNotFoundError" in kinds:
        return MissingFileError(
            f"{nowhere} the Hugging Face model {repo_id} is neither on this machine nor in reach: "
            f"{_why_offline(error)}. On a machine with a connection run `hf download {repo_id} "
            f"--local-dir DIRECTORY`, copy DIRECTORY here and pass its path as the model"
        )
    return FileError(
        f"the Hugging Face model {repo_id} could not be downloaded: {_first_line(error)}"
    )


def _why_offline(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "downloads are switched off by the environment variable HF_HUB_OFFLINE"
    return f"{constants.ENDPOINT} does not answer ({_first_line(error.__cause__ or error)})"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
