"""Prompts to tokens: one prompt, or the turns of a chat."""

from __future__ import annotations

from moerun import Model
from moerun.chat import Message
from moerun.errors import InvalidArgumentError, MissingFileError


class Conversation:
    """Makes the tokens that a model continues, with its chat template or without.

    With `chat`, every answer is remembered and the whole conversation is the next prompt. Without,
    each prompt stands alone.
    """

    def __init__(self, model: Model, chat: bool, system: str | None = None) -> None:
        self._tokenizer = model.tokenizer
        self._template = self._tokenizer.chat_template if chat else None
        self._messages: list[Message] = []
        if chat and self._template is None:
            raise MissingFileError(
                f"the model {model.path} has no chat template: neither chat_template.jinja nor "
                "`chat_template` in tokenizer_config.json. Leave out --chat to let it continue text"
            )
        if system is not None:
            self._messages.append({"role": "system", "content": system})

    def ask(self, text: str) -> list[int]:
        """Return the tokens of the prompt that ends with what the user says."""
        if self._template is None:
            token_ids = self._tokenizer.encode(text)
        else:
            self._messages.append({"role": "user", "content": text})
            try:
                rendered = self._template.render(self._messages)
            except Exception:
                self.forget()
                raise
            token_ids = self._tokenizer.encode(rendered, add_special_tokens=False)
        if not token_ids:
            raise InvalidArgumentError("the prompt is empty: the tokenizer makes no tokens of it")
        return token_ids

    def remember(self, answer: str) -> None:
        """Add what the model answered to the conversation, special tokens inside it too."""
        if self._template is not None:
            self._messages.append({"role": "assistant", "content": answer})

    def forget(self) -> None:
        """Take back the last `ask`, which got no answer."""
        if self._template is not None:
            self._messages.pop()
