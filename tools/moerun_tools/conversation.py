"""Prompts to tokens: one prompt, or the turns of a chat."""

from __future__ import annotations

from moerun.chat import Message
from moerun.errors import MissingFileError
from moerun_tools.prompt_model import PromptModel


class Conversation:
    """Makes the tokens that a model continues, with its chat template or without.

    With `chat`, every answer is remembered and the whole conversation is the next prompt. Without,
    each prompt stands alone.
    """

    def __init__(self, model: PromptModel, chat: bool, system: str | None = None) -> None:
        self._model = model
        self._template = model.tokenizer.chat_template if chat else None
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
            return self._model.encode(text, add_special_tokens=True)
        self._messages.append({"role": "user", "content": text})
        try:
            rendered = self._template.render(self._messages)
            return self._model.encode(rendered, add_special_tokens=False)
        except Exception:
            self.forget()
            raise

    def remember(self, answer: str) -> None:
        """Add what the model answered to the conversation, special tokens inside it too."""
        if self._template is not None:
            self._messages.append({"role": "assistant", "content": answer})

    def clear(self) -> None:
        """Begin anew, with the system message alone."""
        self._messages = [each for each in self._messages if each["role"] == "system"]

    def forget(self) -> None:
        """Take back the last `ask`, which got no answer."""
        if self._template is not None:
            self._messages.pop()
