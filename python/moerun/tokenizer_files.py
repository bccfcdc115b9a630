"""The files of a tokenizer, and which of them decides where several state a fact.

Order of precedence and ids are those of transformers 5 (`_from_pretrained`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from moerun.errors import FormatError
from moerun.json_text import parse_json_object, read_json_object
from moerun.model_text import read_model_text
from moerun.tokenizer_class import TokenizerClass, choose_class

# Names of special tokens that every tokenizer may have, in the order in which they are added.
NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_MOST_BYTES = 256 << 20
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = str | AddedToken


@dataclass
class SpecialTokens:
    """Special and added tokens of all files together.

    Attributes:
        named: by name, such as `bos_token`.
        extra: those without a name.
        added: tokens that a file gives an id, by that id.
        file_of: the file that gives a token its id, by id.
    """

    named: dict[str, Token] = field(default_factory=dict)
    extra: list[Token] = field(default_factory=list)
    added: dict[int, AddedToken] = field(default_factory=dict)
    file_of: dict[int, Path] = field(default_factory=dict)

    @property
    def texts(self) -> dict[str, str]:
        """Text of each named token, as chat templates see it."""
        return {name: str_of(token) for name, token in self.named.items()}


class TokenizerFiles:
    """The files of the tokenizer in a model's directory, read when they are first needed.

    Every property raises FormatError where a file is wrong, naming it, and FileError where one
    cannot be read. All files but tokenizer.json may be missing.

    Args:
        directory: the model's directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "tokenizer.json"
        self.config_path = directory / "tokenizer_config.json"

    @cached_property
    def text(self) -> str | None:
        """tokenizer.json; None: there is none."""
        return read_model_text(self.path, _MOST_BYTES) if is_there(self.path) else None

    @cached_property
    def state(self) -> dict[str, Any]:
        """The object in tokenizer.json; empty: there is none."""
        return {} if self.text is None else parse_json_object(self.text, str(self.path))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The object in tokenizer_config.json; empty: there is none."""
        config = _object(self.config_path)
        versions = config.get("fast_tokenizer_files")
        if isinstance(versions, list) and any(version != self.path.name for version in versions):
            raise FormatError(
                f"{self.config_path} names several files of one tokenizer (fast_tokenizer_files), "
                f"of which moerun reads only {self.path}; remove that field if it is the right one"
            )
        return config

    @cached_property
    def kind(self) -> TokenizerClass:
        """The class that transformers takes."""
        model_config = _object(self.directory / "config.json")
        is_byte_level = self.text is not None and '"ByteLevel"' in self.text
        return choose_class(model_config, self.config, is_byte_level, str(self.config_path))

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """Special and added tokens of all files together."""
        return _Reading(self).result


class _Reading:
    """Puts the tokens of all files together, in the order of transformers."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._files = files
        self._where = str(files.config_path)
        self._fields: dict[str, Any] = dict(files.config)
        self._of_model: dict[str, Any] = {}
        self._tokens = SpecialTokens()
        self._by_text: dict[str, AddedToken] = {}
        self._read_config()
        if self._fields.get("added_tokens_decoder") is not None:
            self._read_added_tokens_decoder()
        else:
            self._read_special_tokens_map()
            self._read_added_tokens()
            self._read_tokenizer_json()
        self._name()

    @property
    def result(self) -> SpecialTokens:
        return self._tokens

    def _read_config(self) -> None:
        fields = self._fields
        if "additional_special_tokens" in fields and not fields.get("extra_special_tokens"):
            fields["extra_special_tokens"] = fields.pop("additional_special_tokens")
        explicit = fields.pop("model_specific_special_tokens", None)
        own = {
            name: fields.pop(name)
            for name in list(fields)
            if name not in NAMES and name.endswith("_token") and isinstance(fields[name], str)
        }
        self._take_named_extras(own)
        self._of_model = own or (explicit if isinstance(explicit, dict) else {})

    def _take_named_extras(self, into: dict[str, Any]) -> None:
        """Move `extra_special_tokens` into `into` where it is an object: name to token."""
        if isinstance(self._fields.get("extra_special_tokens"), dict):
            into.update(self._fields.pop("extra_special_tokens"))

    def _read_added_tokens_decoder(self) -> None:
        added = self._fields["added_tokens_decoder"]
        if not isinstance(added, dict):
            raise FormatError(f"{self._where}: added_tokens_decoder must be an object")
        for text, value in added.items():
            token = as_token(value, f"{self._where}: added_tokens_decoder[{text!r}]")
            if isinstance(token, str):
                raise FormatError(f"{self._where}: added_tokens_decoder[{text!r}] is no object")
            self._add(_number(text, self._where), token, self._files.config_path)

    def _read_special_tokens_map(self) -> None:
        path = self._files.directory / "special_tokens_map.json"
        for name, value in _object(path).items():
            if isinstance(value, dict) and name != "extra_special_tokens":
                value = as_token({**value, "special": True}, f"{path}: {name}")
            elif isinstance(value, list) and name == "extra_special_tokens":
                there = self._fields.get("extra_special_tokens")
                have = as_tokens(there, self._where) if isinstance(there, list) else []
                for token in as_tokens(value, f"{path}: {name}"):
                    if str_of(token) not in map(str_of, have):
                        have.append(token)
                value = have
            self._fields[name] = value
        self._take_named_extras(self._of_model)

    def _read_added_tokens(self) -> None:
        path = self._files.directory / "added_tokens.json"
        special = {
            str_of(self._fields[name])
            for name in NAMES
            if isinstance(self._fields.get(name), (str, AddedToken))
        }
        extra = self._fields.get("extra_special_tokens")
        if isinstance(extra, list):  # as in transformers, objects do not count here
            special |= {str_of(token) for token in extra if isinstance(token, (str, AddedToken))}
        for text, number in _object(path).items():
            is_special = text in special
            token = AddedToken(
                text, rstrip=False, lstrip=False, normalized=not is_special, special=is_special
            )
            self._add(_number(number, f"{path}: {text!r}"), token, path)

    def _read_tokenizer_json(self) -> None:
        path = self._files.path
        added = self._files.state.get("added_tokens")
        if added is None:
            return
        if not isinstance(added, list):
            raise FormatError(f"{path}: added_tokens must be a list")
        for value in added:
            token = as_token(value, f"{path}: added_tokens")
            if isinstance(token, str):
                raise FormatError(f"{path}: added_tokens has an entry that is no object")
            self._add(_number(value.get("id"), f"{path}: added_tokens"), token, path)

    def _add(self, number: int, token: AddedToken, path: Path) -> None:
        self._tokens.added[number] = token
        self._tokens.file_of[number] = path
        self._by_text[token.content] = token

    def _name(self) -> None:
        """Fill `named` and `extra`: first the usual names, then those of this model."""
        fields, tokens = self._fields, self._tokens
        defaults = dict(self._files.kind.special_tokens)
        padding = self._files.state.get("padding")
        if isinstance(padding, dict) and isinstance(padding.get("pad_token"), str):
            defaults.setdefault("pad_token", padding["pad_token"])
        for name in NAMES:
            value = fields[name] if name in fields else defaults.get(name)
            if value is None:
                continue
            token = as_token(value, f"{self._where}: {name}")
            named = self._by_text.get(str_of(token), token) if name in fields else token
            tokens.named[name] = named
        if "additional_special_tokens" in fields and "extra_special_tokens" not in fields:
            fields["extra_special_tokens"] = fields.pop("additional_special_tokens")
        tokens.extra = as_tokens(fields.get("extra_special_tokens"), self._where)
        others = {
            name: value
            for name, value in fields.items()
            if name not in NAMES and name.endswith("_token") and _is_token(value)
        }
        for name, value in {**others, **self._of_model}.items():
            tokens.named[name] = as_token(value, f"{self._where}: {name}")


def str_of(token: Token) -> str:
    """Return the text of a token."""
    return token if isinstance(token, str) else token.content


def as_token(value: Any, where: str) -> Token:
    """Return a token of a file: a text, or an object with `content` and flags.

    Raises:
        FormatError: it is something else.
    """
    if isinstance(value, (str, AddedToken)):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise FormatError(f"{where} must be a text, or an object with a text `content`")
    flags = {name: value[name] for name in _FLAGS if name in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise FormatError(f"{where}: {', '.join(_FLAGS)} must be true or false")
    return AddedToken(value["content"], **flags)


def as_tokens(value: Any, where: str) -> list[Token]:
    """Return the tokens of a list; none for null."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise FormatError(f"{where}: special tokens must be a list, not {type(value).__name__}")
    return [as_token(each, f"{where}: a special token") for each in value]


def _is_token(value: Any) -> bool:
    is_typed = isinstance(value, dict) and value.get("__type") == "AddedToken"
    return is_typed or isinstance(value, (str, AddedToken))


def _number(value: Any, where: str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise FormatError(f"{where}: the id of a token must be a number from 0, not {value!r:.40}")
    return value


def is_there(path: Path) -> bool:
    """Tell whether a name is taken; reading the file says what is wrong with it."""
    try:
        return path.exists()
    except OSError:
        return True


def _object(path: Path) -> dict[str, Any]:
    return read_json_object(path) if is_there(path) else {}
