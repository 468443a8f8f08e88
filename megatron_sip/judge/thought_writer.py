"""A teacher inserts thoughts into a text (the paper's later version, stage 1): where, and which.

    async with ThoughtWriter(settings) as writer:
        await writer.check()
        thoughts, problem = await writer.think(text)
        with_thoughts(text, thoughts, "<think>", "</think>")

What the teacher writes is only looked at for its thoughts and their places: the text around them stays the original, and an
answer that is not the original without its thoughts is dropped. In its answer thoughts stand between marks of their own, which
no chat template knows: a server or `own_answer` would take <think> for the teacher's reasoning.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sip.judge.base import AsksTeacher
from megatron_sip.judge.calls import Answer, GenerateCall
from megatron_sip.judge.prompts import break_marks, builtin_prompt, fence_code, valid_unicode
from megatron_sip.judge.refusals import is_refusal
from megatron_sip.judge.settings import ClientSettings, SettingsError
from megatron_sip.judge.teacher import CHECK_TIMEOUT_S

_THOUGHT = re.compile(r"\[\[thought\]\](.*?)\[\[/thought\]\]", re.DOTALL)
_MARK = re.compile(r"\[\[/?thought\]\]")


@dataclass(frozen=True, slots=True)
class Thought:
    """A thought behind the first `place` characters of its text, which do not end with white space."""

    place: int
    text: str


@dataclass(frozen=True, slots=True)
class ThoughtSettings:
    """client: servers and cache. max_tokens: of an answer, which repeats the text. deadline_s: for one answer."""

    client: ClientSettings
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 8192
    deadline_s: float = 600.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise SettingsError(
                "--think-temperature must be at least 0, --think-top-p above 0 and at most 1, --think-max-tokens at least 1; "
                f"they are {self.temperature}, {self.top_p} and {self.max_tokens}"
            )


class ThoughtWriter(AsksTeacher):
    """See the module."""

    def __init__(self, settings: ThoughtSettings) -> None:
        super().__init__(settings.client)
        self._settings = settings
        self._prompt = builtin_prompt("thoughts")

    async def check(self, timeout_s: float = CHECK_TIMEOUT_S) -> None:
        """Raises EndpointError naming an endpoint that does not answer within `timeout_s`, and settings mistakes."""
        await super().check(timeout_s)
        self._check_reasoning("thoughts")

    async def think(self, text: str) -> tuple[list[Thought], str]:
        """(thoughts in order, "") or ([], why there are none: see `read_thoughts`; marks-in-text, context-too-short)."""
        if _MARK.search(text) or break_marks(text) != text or valid_unicode(text) != text:
            return [], "marks-in-text"  # the teacher would be shown, and copy, another text
        call = self._call(text)
        room = self._client.window(0).context
        if room is not None and self._client.request_tokens(call) > room:
            return [], "context-too-short"
        deadline = asyncio.get_running_loop().time() + self._settings.deadline_s
        [answer] = await self._client.ask([call], None, deadline)
        return read_thoughts(answer, text)

    def flush(self) -> None:
        """Commit what the cache waits with."""
        self._client.flush()

    def _call(self, text: str) -> GenerateCall:
        settings = self._settings
        code = fence_code(settings.seed, text, [])
        return GenerateCall(
            self._prompt.identity,
            self._prompt.fill({"text": text}, code),
            n=1,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )


def read_thoughts(answer: Answer, text: str) -> tuple[list[Thought], str]:
    """(the thoughts in an answer, "") or ([], why they cannot be used).

    failed, unfinished, refused, unpaired-marks, no-thought, empty-thought, text-changed: without them it is not `text`, but for
    white space next to a thought and around the whole, of which the text's own is kept.
    """
    if not isinstance(answer, list) or not answer:
        return [], "failed"
    if not isinstance(answer[0], str):
        return [], "unfinished"
    pieces = _THOUGHT.split(answer[0])
    if any(map(_MARK.search, pieces)):
        return [], "unpaired-marks"
    if len(pieces) == 1:
        return [], "refused" if is_refusal(answer[0]) else "no-thought"
    if not all(thought.strip() for thought in pieces[1::2]):
        return [], "empty-thought"
    places = places_of(pieces[::2], text)
    if places is None:
        return [], "text-changed"
    return [Thought(place, thought.strip()) for place, thought in zip(places, pieces[1::2], strict=True)], ""


def places_of(pieces: Sequence[str], text: str) -> list[int] | None:
    """Where in `text` the pieces but the last end, which together are the text but for white space at their ends; or None.

    A place is behind the last letter before it; 0 where there is none.
    """
    places, place = [], 0
    for piece in pieces:
        body = piece.strip()
        if body:
            start = len(text) - len(text[place:].lstrip())
            if not text.startswith(body, start):
                return None
            place = start + len(body)
        places.append(place)
    return places[:-1] if not text[place:].strip() else None


def with_thoughts(text: str, thoughts: Sequence[Thought], start_mark: str, end_mark: str) -> str:
    """`text` with its thoughts, each between the marks; without them it is `text` again."""
    pieces, done = [], 0
    for thought in thoughts:
        pieces += [text[done : thought.place], start_mark, thought.text, end_mark]
        done = thought.place
    return "".join([*pieces, text[done:]])
