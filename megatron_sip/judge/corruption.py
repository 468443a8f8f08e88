"""The corruptor: a post-trained model's spoilt version of a suffix, for a judge to tell from it (paper section 3.1).

    async with Corruptor(settings) as corruptor:
        await corruptor.check()
        spoilt = await corruptor.corrupt(prefix, suffix)

The model plans its changes, then writes the spoilt version after a mark (judge/prompts/corruption.txt).
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from megatron_sip.judge.base import UNKNOWN_CODE, AsksTeacher
from megatron_sip.judge.calls import Answer, GenerateCall
from megatron_sip.judge.prompts import PromptFile, break_marks, builtin_prompt, fence_code, valid_unicode
from megatron_sip.judge.refusals import is_refusal
from megatron_sip.judge.settings import ClientSettings, SettingsError
from megatron_sip.judge.teacher import CHECK_TIMEOUT_S

_NOTE = re.compile(
    r"^[^\w\n]*+(?:notes?|changes?(?: made)?|modifications?|explanations?|(?:factual )?errors?(?: introduced)?)[\s*_]*[:：]",
    re.IGNORECASE | re.MULTILINE,
)
"""Begins a line in which a model says what it has done."""
LENGTHS = (0.5, 2.0)
"""Least and greatest length of a spoilt version, in lengths of the suffix: a judge is not to go by it."""


@dataclass(frozen=True, slots=True)
class CorruptorSettings:
    """client: servers and cache. max_tokens: of an answer, plan and all. deadline_s: for one answer. prefix_chars: how much of
    the prefix's end is shown."""

    client: ClientSettings
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    deadline_s: float = 600.0
    prefix_chars: int = 16_000
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise SettingsError(
                "--corrupt-temperature must be at least 0, --corrupt-top-p above 0 and at most 1, --corrupt-max-tokens at "
                f"least 1; they are {self.temperature}, {self.top_p} and {self.max_tokens}"
            )


class Corruptor(AsksTeacher):
    """See the module."""

    def __init__(self, settings: CorruptorSettings) -> None:
        super().__init__(settings.client)
        self._settings = settings
        self._prompt = builtin_prompt("corruption")

    async def check(self, timeout_s: float = CHECK_TIMEOUT_S) -> None:
        """Raises EndpointError naming an endpoint that does not answer within `timeout_s`, and settings mistakes."""
        await super().check(timeout_s)
        self._check_reasoning("corruptions")

    async def corrupt(self, prefix: str, suffix: str) -> tuple[str, str]:
        """(spoilt suffix, "") or ("", why there is none: see `read_corruption`, or context-too-short)."""
        shown = self._shown_prefix(prefix, suffix)
        if shown is None:
            return "", "context-too-short"
        deadline = asyncio.get_running_loop().time() + self._settings.deadline_s
        code = fence_code(self._settings.seed, shown, [valid_unicode(suffix)])
        call = self._call(shown, suffix, code)
        [answer] = await self._client.ask([call], None, deadline)
        return read_corruption(answer, self._prompt, suffix, code)

    def flush(self) -> None:
        """Commit what the cache waits with."""
        self._client.flush()

    def _shown_prefix(self, prefix: str, suffix: str) -> str | None:
        bare = self._call("", suffix, UNKNOWN_CODE)
        window = self._client.window(self._settings.prefix_chars)
        return window.shown(valid_unicode(prefix), lambda: self._client.request_tokens(bare))

    def _call(self, prefix: str, suffix: str, code: str) -> GenerateCall:
        settings = self._settings
        texts = {"prefix": prefix, "continuation": valid_unicode(suffix)}
        return GenerateCall(
            self._prompt.identity,
            self._prompt.fill(texts, code),
            n=1,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )


def read_corruption(answer: Answer, prompt: PromptFile, suffix: str, code: str) -> tuple[str, str]:
    """(spoilt suffix, "") or ("", why there is none).

    failed, unfinished, refused, no-mark, other-length, unchanged; fenced: it repeats the marks around texts, with their `code`;
    note: it speaks about itself.

    It begins with the suffix's own white space, so that it continues the prefix in the same way.
    """
    if not isinstance(answer, list) or not answer:
        return "", "failed"
    if not isinstance(answer[0], str):
        return "", "unfinished"
    found = prompt.text_of(answer[0])
    if found is None or not found.strip():
        return "", "refused" if is_refusal(answer[0]) else "no-mark"
    if is_refusal(found) and not is_refusal(suffix):
        return "", "refused"
    if code in found:
        return "", "fenced"
    if _NOTE.search(found) and not _NOTE.search(suffix):
        return "", "note"
    if break_marks(found).split() == break_marks(suffix).split():  # template marks were shown broken, and may be mended
        return "", "unchanged"
    text = suffix[: len(suffix) - len(suffix.lstrip())] + found.strip()
    least, most = (share * len(suffix) for share in LENGTHS)
    return (text, "") if least <= len(text) <= most else ("", "other-length")
