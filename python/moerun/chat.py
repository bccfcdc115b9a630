"""Conversations to text, with the chat template of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from moerun.errors import FileError, FormatError, InvalidArgumentError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


class _RefusedError(Exception):
    """The template itself called raise_exception."""


class _GenerationTag(jinja2.ext.Extension):
    """Accepts {% generation %} ... {% endgeneration %}, which only marks text for training."""

    tags = {"generation"}  # noqa: RUF012 (declared by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the body of the tag as it stands."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A chat template, run in a sandbox: it cannot reach files or change its arguments.

    Args:
        source: the template, in Jinja as Hugging Face models write it.
        where: the file it comes from, for messages.
        variables: what the template may use beside the conversation: `bos_token` and the like.

    Raises:
        FormatError: the template is not valid Jinja.
    """

    def __init__(self, source: str, where: str, variables: dict[str, Any] | None = None) -> None:
        self.source = source
        self.where = where
        self._variables = dict(variables or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise FormatError(
                f"{where}, line {error.lineno} of the chat template: {error}"
            ) from None

    @classmethod
    def from_directory(cls, directory: Path) -> ChatTemplate | None:
        """Return the template of the model in `directory`, None where there is none.

        chat_template.jinja is looked for first, then `chat_template` in tokenizer_config.json:
        one template, or a list of named ones, of which "default" is taken.
        """
        path = directory / "tokenizer_config.json"
        config = _read_json_object(path) if path.is_file() else {}
        texts = {name: _token_text(config.get(name)) for name in _SPECIAL_TOKENS}
        variables = {name: text for name, text in texts.items() if text is not None}
        file = directory / "chat_template.jinja"
        if file.is_file():
            return cls(_read_text(file), str(file), variables)
        source = _choose_template(config.get("chat_template"), path)
        return None if source is None else cls(source, str(path), variables)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the text of a conversation, ready to be encoded without special tokens.

        Args:
            messages: the turns, oldest first.
            add_generation_prompt: end with what makes the model answer.
            **variables: anything else that the template understands.

        Raises:
            InvalidArgumentError: the template refuses this conversation.
            FormatError: the template fails.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **{**self._variables, **variables},
            )
        except _RefusedError as error:
            raise InvalidArgumentError(
                f"the model's chat template refuses this conversation: {error}"
            ) from None
        except Exception as error:  # a template is a program: it can fail in any way
            raise FormatError(
                f"the chat template of {self.where} fails: {type(error).__name__}: {error}"
            ) from error


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationTag],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes characters of HTML, which a model has not seen in training.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _choose_template(value: object, path: Path) -> str | None:
    """Return the template that `chat_template` of tokenizer_config.json means."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise FormatError(
            f"{path}: chat_template must be a string or a list of named templates, "
            f"not {type(value).__name__}"
        )
    named: dict[str, str] = {}
    for entry in value:
        name, template = (
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        )
        if not isinstance(name, str) or not isinstance(template, str):
            raise FormatError(f"{path}: chat_template has an entry without `name` and `template`")
        named[name] = template
    if "default" not in named:
        raise FormatError(
            f"{path}: chat_template has no template named 'default', only {sorted(named)}"
        )
    return named["default"]


def _token_text(value: Any) -> str | None:
    """Return the text of a special token, which is a string or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not valid UTF-8: byte {error.start}") from None


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
