"""Token ids of judge prompts, made piece by piece so that what prompts share is tokenized once.

A task's prefix occurs in every judgement of the task, each candidate in several. Pieces meet at line ends, where
tokenizers split anyway. Texts are encoded with special tokens switched off: no text can yield one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property, lru_cache
from typing import Any

from megatron_sip.data.continuation_text import Seam, ids_after
from megatron_sip.errors import UserError
from megatron_sip.judge.reasoning import CHANNEL, ReasoningStyle, style_of

CACHED_PIECES = 4096
_SENTINEL = "SIP-CONTENT-SENTINEL"


class EncodingError(UserError, ValueError):
    """A tokenizer that cannot be used as asked; the message says what would be right."""


class ChatEncoder:
    """Prompts and continuations of one tokenizer, as token ids.

    tokenizer: a transformers tokenizer. Raises EncodingError when it has no usable chat template and one is needed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._remembered = lru_cache(CACHED_PIECES)(self._encode)
        self._remembered_after = lru_cache(CACHED_PIECES)(self._encode_after)
        self.choices = cache(self._encode_choices)

    @classmethod
    def load(cls, name_or_path: str) -> ChatEncoder:
        """Raises EncodingError when there is no tokenizer at `name_or_path`."""
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(name_or_path))
        except (OSError, ValueError) as error:
            raise EncodingError(f"judge tokenizer '{name_or_path}' cannot be loaded: {error}") from error

    def text(self, text: str) -> list[int]:
        """Ids of plain text: no special tokens added, none recognised in it. Do not modify the list."""
        return self._remembered(text)

    def continuation(self, text: str, *, ended: bool = False) -> list[int]:
        """Ids of `text` where it goes on from other text: without the space that some tokenizers put before any.

        ended: with the token that ends a text.
        """
        ids = self._remembered_after(text)
        return [*ids, self.document_end()] if ended else ids

    def document_end(self) -> int:
        """The end-of-sequence id. Raises EncodingError when this tokenizer has none."""
        end = self._tokenizer.eos_token_id
        if end is None:
            raise EncodingError(
                "likelihood needs a judge whose tokenizer has an end-of-sequence token: set its eos_token"
            )
        return int(end)

    def document_start(self) -> list[int]:
        """The beginning-of-sequence id if this tokenizer puts one before plain text, else nothing."""
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenizer("a")["input_ids"][:1] == [bos] else []

    @cached_property
    def reasoning(self) -> ReasoningStyle:
        """How the model reasons, by its chat template and its tokens. Raises EncodingError without a chat template."""
        _, generation_prompt = self._chat_texts()
        special = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        harmony = CHANNEL in self._tokenizer.get_vocab() or CHANNEL in str(self._tokenizer.chat_template)
        return style_of(generation_prompt, special, harmony=harmony)

    def chat(self, prompt: Sequence[str], answer_prefix: str | None = None, start: str = "") -> list[int]:
        """Ids of a chat with one user message made of the pieces of `prompt`, up to where the model goes on.

        With `answer_prefix` (special tokens in it are recognised, "" is the model's own) or `start`, its answer is begun
        there, behind all reasoning.
        """
        head, tail = self._chat_frame
        ids = list(head)
        for piece in prompt:
            ids += self.text(piece)
        ids += tail
        if answer_prefix is None and not start:
            return ids
        if prefix := self.reasoning.answer_start(answer_prefix or ""):
            ids += self._tokenizer.encode(prefix, add_special_tokens=False)
        return ids + self.text(start) if start else ids

    def _encode_choices(self, start: str, labels: tuple[str, ...]) -> tuple[list[int], list[int]]:
        """`start` up to where the labels differ, and the id with which each label goes on from there.

        Raises EncodingError when two labels begin with the same token.
        """
        encoded = [self._encode(start + label) for label in labels]
        shared = 0
        while all(len(ids) > shared for ids in encoded) and len({ids[shared] for ids in encoded}) == 1:
            shared += 1
        firsts = [ids[shared] for ids in encoded if len(ids) > shared]
        if len(set(firsts)) < len(labels):
            raise EncodingError(f"soft verdicts impossible: the verdicts {list(labels)} do not differ in one token")
        return encoded[0][:shared], firsts

    def _encode_after(self, text: str) -> list[int]:
        ids = ids_after(self._tokenizer, Seam(self.text("\n"), "\n"), text)
        return self._encode(text) if ids is None else ids

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    @cached_property
    def _chat_frame(self) -> tuple[list[int], list[int]]:
        head, tail = (self._tokenizer.encode(text, add_special_tokens=False) for text in self._chat_texts())
        return head, tail

    def _chat_texts(self) -> tuple[str, str]:
        """What the template puts before and after the user's message."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise EncodingError("the judge's tokenizer has no chat template: serve a post-trained (chat) model")
        message = [{"role": "user", "content": _SENTINEL}]
        rendered = self._tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        head, found, tail = rendered.partition(_SENTINEL)
        if not found:
            raise EncodingError("the judge's chat template does not show the user's message")
        return head, tail
