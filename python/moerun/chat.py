"""Conversations to text, with the chat template of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from moerun.arguments import shown
from moerun.errors import FormatError, InvalidArgumentError
from moerun.model_text import read_model_text
from moerun.template_process import process
from moerun.tokenizer_files import TokenizerFiles, is_there

_MOST_BYTES = 1 << 20
_MOST_LEVELS = 50
# Names under which a message may have its reasoning; templates read the first, some the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


class ChatTemplate:
    """A chat template, rendered in a process of its own with bounded time and memory.

    It sees what transformers' `apply_chat_template` shows it, and cannot reach files.

    Args:
        source: the template, in Jinja as Hugging Face models write it.
        where: the file it comes from, for messages.
        variables: what the template may use beside the conversation: `bos_token` and the like.
        tool_source: the template for conversations with tools; None: `source`.

    Raises:
        FormatError: a template is not valid Jinja, or takes too much to compile.
    """

    def __init__(
        self,
        source: str,
        where: str,
        variables: dict[str, Any] | None = None,
        tool_source: str | None = None,
    ) -> None:
        self.source = source
        self.where = where
        self._tool_source = tool_source
        self._variables = _plain(dict(variables or {}))
        for each in (source, tool_source):
            if each is None:
                continue
            if len(each) > _MOST_BYTES:
                raise FormatError(f"{where}: a chat template of more than {_MOST_BYTES} characters")
            status, text = process.ask(each, None)
            if status == "invalid":
                raise FormatError(f"{where}, {text}")
            if status != "done":
                raise FormatError(f"{where}: the chat template cannot be compiled: {text}")

    @classmethod
    def from_directory(
        cls, directory: Path, special_tokens: dict[str, str] | None = None
    ) -> ChatTemplate | None:
        """Return the template of the model in `directory`, None where there is none.

        chat_template.jinja and additional_chat_templates/*.jinja are looked for first, then
        `chat_template` in tokenizer_config.json: one template, or several with names. Of several,
        "default" is taken, and "tool_use" for conversations with tools.

        Args:
            directory: of the model.
            special_tokens: texts by name; None: those of the tokenizer's files.

        Raises:
            FormatError: a file or a template cannot be understood.
            FileError: a file cannot be read.
        """
        files = TokenizerFiles(directory)
        named, where = _templates(directory, files)
        if not named:
            return None
        if "default" not in named:
            raise FormatError(
                f"{where}: chat_template has no template named 'default', only {sorted(named)}"
            )
        if special_tokens is None:
            special_tokens = files.special_tokens.texts
        return cls(named["default"], where, special_tokens, named.get("tool_use"))

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the text of a conversation, ready to be encoded without special tokens.

        Args:
            messages: the turns, oldest first.
            add_generation_prompt: end with what makes the model answer.
            tools: JSON schemas of functions that the model may call.
            documents: texts that the model may refer to, such as {"title": ..., "text": ...}.
            **variables: anything else that the template understands.

        Raises:
            InvalidArgumentError: the template refuses this conversation, or it is none.
            FormatError: the template fails, or takes too much time or memory.
        """
        turns = [_turn(message) for message in _mappings(messages)]
        if not turns:
            raise InvalidArgumentError("the conversation is empty; at least one message is needed")
        values = {
            **self._variables,
            **_plain(variables),
            "messages": turns,
            "tools": None if tools is None else _plain(_mappings(tools)),
            "documents": None if documents is None else _plain(_mappings(documents)),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        has_own = tools is not None and self._tool_source is not None
        source = self._tool_source if has_own and self._tool_source else self.source
        status, text = process.ask(source, values)
        if status == "done":
            return text
        if status == "refused":
            raise InvalidArgumentError(
                f"the model's chat template refuses this conversation: {text}"
            )
        raise FormatError(f"the chat template of {self.where} fails: {text}")


def _templates(directory: Path, files: TokenizerFiles) -> tuple[dict[str, str], str]:
    """Return the templates of a model by name, and the file that they come from."""
    named: dict[str, str] = {}
    file = directory / "chat_template.jinja"
    folder = directory / "additional_chat_templates"
    if is_there(file):
        named["default"] = read_model_text(file, _MOST_BYTES)
    if is_there(folder) and folder.is_dir():
        for path in sorted(folder.glob("*.jinja"))[:100]:
            named[path.name.removesuffix(".jinja")] = read_model_text(path, _MOST_BYTES)
    if named:
        return named, str(file if "default" in named else folder)
    return _configured(files.config.get("chat_template"), files.config_path), str(files.config_path)


def _configured(value: object, path: Path) -> dict[str, str]:
    """Return the templates that `chat_template` of tokenizer_config.json holds, by name."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict):
        value = [{"name": name, "template": template} for name, template in value.items()]
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
    return named or {"": ""}  # an empty list has no default


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as templates see it: without fields that are None."""
    turn = {name: value for name, value in _plain(message).items() if value is not None}
    reasoning = next((turn[name] for name in _REASONING if name in turn), None)
    if reasoning is not None:
        turn = {"thinking": reasoning, **turn, "reasoning_content": reasoning}
    return turn


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    if not isinstance(values, Iterable):
        raise InvalidArgumentError(
            f"messages, tools and documents must be lists, not {shown(values)}"
        )
    found = list(values)
    for value in found:
        if not isinstance(value, Mapping):
            raise InvalidArgumentError(
                f"each of messages, tools and documents must be a dict, not {shown(value)}"
            )
    return found


def _plain(value: Any, level: int = 0) -> Any:
    """Return a value made of plain Python types, which is all that a template sees."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if level > _MOST_LEVELS:
        raise InvalidArgumentError(f"a conversation nests more than {_MOST_LEVELS} levels")
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, level + 1): _plain(item, level + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, level + 1) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return f"<{type(value).__name__}>"
