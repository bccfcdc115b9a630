"""Text to token ids and back, with the tokenizer files of a model."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from moerun.arguments import shown
from moerun.chat import ChatTemplate
from moerun.detokenizer import Detokenizer
from moerun.errors import InvalidArgumentError, MissingFileError, UnsupportedModelError
from moerun.tokenizer_backend import TokenizerBackend, type_of_model
from moerun.tokenizer_files import TokenizerFiles

_MOST_ID = 2**32 - 1  # of the tokenizers library


class Tokenizer:
    """The tokenizer of a model: tokenizer.json and what the files beside it say of its tokens.

    Ids and texts are those of transformers' AutoTokenizer: `truncation` and `padding` of
    tokenizer.json are off, and tokens that only tokenizer_config.json, added_tokens.json or
    special_tokens_map.json name are tokens too.

    Args:
        directory: the model's directory.

    Raises:
        InvalidArgumentError: `directory` is no path.
        MissingFileError: there is no tokenizer.json in the directory.
        FileError: a file cannot be read.
        FormatError: a file cannot be understood, does not work, or contradicts another one.
        UnsupportedModelError: transformers reads the files by rules that are not known here.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        if not isinstance(directory, (str, os.PathLike)):
            raise InvalidArgumentError(f"directory must be a path, not {shown(directory)}")
        self.directory = Path(directory)
        files = TokenizerFiles(self.directory)
        if files.text is None:
            raise MissingFileError(
                f"{self.directory} has no tokenizer.json, so text cannot be turned into tokens. "
                "A model that only has another tokenizer file can be converted with transformers: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        self._backend = TokenizerBackend(files)
        if _cleans_up(files):
            raise UnsupportedModelError(
                f"{files.config_path} has clean_up_tokenization_spaces, which removes spaces from "
                "decoded text; moerun does not. Set it to false to see the text as it is"
            )
        self._special_tokens = files.special_tokens.texts  # the files' objects are large

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included; a model's table may be larger."""
        return self._backend.library.get_vocab_size()

    @cached_property
    def longest_token_bytes(self) -> int:
        """Most bytes of text that one token stands for, or a little more."""
        return max((len(token.encode()) for token in self._backend.library.get_vocab()), default=1)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template, None where it has none.

        Raises:
            FormatError: the template, or the file that holds it, cannot be understood.
        """
        return ChatTemplate.from_directory(self.directory, self._special_tokens)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`.

        Args:
            text: any text; "" gives no tokens but those that the model always adds.
            add_special_tokens: also add what the model expects around every text, such as a
                token that begins it. Leave it out for text that a chat template made.

        Raises:
            InvalidArgumentError: `text` is no str, or has half a character (a lone surrogate).
            FormatError: tokenizer.json does not work for this text.
        """
        if not isinstance(text, str):
            raise InvalidArgumentError(f"text must be a str, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(
                f"the text is not valid Unicode: character {error.start} is a lone surrogate"
            ) from None
        return self._backend.encode(text, bool(add_special_tokens))

    def decode(
        self,
        token_ids: Iterable[int],
        skip_special_tokens: bool = True,
        *,
        after: Iterable[int] = (),
    ) -> str:
        """Return the text of `token_ids`; bytes that are not UTF-8 become U+FFFD.

        Args:
            token_ids: ids; those outside the vocabulary have no text.
            skip_special_tokens: leave out tokens such as the one that ends a text.
            after: ids of the tokens to the left, such as a prompt. Many tokenizers leave out the
                space of the first word of a text, which the first word of an answer is not.

        Raises:
            InvalidArgumentError: an id is no integer, below 0 or above 2**32 - 1.
            FormatError: tokenizer.json does not work for these tokens.
        """
        ids = _checked_ids(token_ids)
        before = _checked_ids(after)
        if before:
            stream = Detokenizer(self._backend, skip_special_tokens, before)
            return "".join([*map(stream.push, ids), stream.finish()])
        return self._backend.decode(ids, skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True, *, after: Iterable[int] = ()) -> Detokenizer:
        """Return a `Detokenizer`, which gives the text of tokens one by one.

        Args:
            skip_special_tokens: as for `decode`.
            after: as for `decode`.

        Raises:
            InvalidArgumentError: an id of `after` is no integer, below 0 or above 2**32 - 1.
        """
        return Detokenizer(self._backend, skip_special_tokens, _checked_ids(after))

    def __repr__(self) -> str:
        return f"<moerun.Tokenizer {self.directory} vocab_size={self.vocab_size}>"


def _checked_ids(token_ids: Iterable[int]) -> list[int]:
    if isinstance(token_ids, (str, bytes)) or not isinstance(token_ids, Iterable):
        raise InvalidArgumentError(f"token_ids must be integers, not {shown(token_ids)}")
    ids: list[int] = []
    for token_id in token_ids:
        try:
            number = operator.index(token_id)
        except TypeError:
            raise InvalidArgumentError(
                f"token_ids must be integers; position {len(ids)} holds {shown(token_id)}"
            ) from None
        if not 0 <= number <= _MOST_ID:
            raise InvalidArgumentError(
                f"a token id is at least 0 and at most {_MOST_ID}, not {shown(token_id)}"
            )
        ids.append(number)
    return ids


def _cleans_up(files: TokenizerFiles) -> bool:
    """Tell whether transformers removes spaces from decoded text: not for BPE, unless forced."""
    is_forced = files.config.get(
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    )
    is_bpe = type_of_model(files) == "BPE" or files.kind.build is not None
    return bool(files.config.get("clean_up_tokenization_spaces")) and not (is_bpe and not is_forced)
