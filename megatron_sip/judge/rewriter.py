"""The rewriter: a post-trained model's better version of a suffix, as a candidate (paper sections 2.2 and 3.2.1).

    async with Rewriter(settings, policy_tokenizer, max_tokens=128) as rewriter:
        await rewriter.check()
        rewrites = await rewriter.rewrite(tasks)

The model sees the prefix and the suffix, the latter with the prefix's last five words (60 characters at most) before it,
and has to start its answer with these words, which are cut off again: so the rewrite continues the prefix smoothly. It
needs no rollouts, so it can run ahead of the policy, or offline for a whole corpus (tools/rewrite_corpus.py fills the
same cache).
"""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sip.data.continuation_text import find_seam, ids_after, text_after
from megatron_sip.judge.base import UNKNOWN_CODE, AsksTeacher
from megatron_sip.judge.calls import Answer, GenerateCall
from megatron_sip.judge.prompts import (
    PromptError,
    PromptFile,
    builtin_prompt,
    fence_code,
    read_prompt_file,
    valid_unicode,
)
from megatron_sip.judge.refusals import is_refusal
from megatron_sip.judge.settings import ClientSettings, SettingsError
from megatron_sip.judge.teacher import CHECK_TIMEOUT_S
from megatron_sip.records import Candidate, Task
from megatron_sip.serving.patience import longest_wait

REWRITE_NEEDS = {"continuation", "first_words"}
"""Slots of a rewriter's prompt; {{prefix}} and {{code}} may be left out."""
START_WORDS = 5
REWRITE_ROOM = 2
"""Tokens that the model may write, in suffix lengths: its tokenizer may need more of them than the policy's."""
START_CHARS = 60
"""The start words take no more: a "word" of Chinese, Japanese, Thai or minified code may be the whole prefix."""
START_BYTES = 128
"""Nor more than this in UTF-8, and so in tokens: no tokenizer makes more tokens than there are bytes."""
PIECE_CHARS = 24
"""Of a last word that is too long by itself."""
_SURE_CHARS = 12
"""Words that a model repeats by chance are shorter than this, or fewer than three."""


@dataclass(frozen=True, slots=True)
class RewriterSettings:
    """client: servers and cache. temperature 0 is greedy. prompt_file: of the instructions, None: this package's own.
    max_tokens: of the rewriter's own tokens, None: twice the suffix length. deadline_s: for one `rewrite` call,
    or from the servers' last answer.
    prefix_chars: how much of the prefix's end is shown."""

    client: ClientSettings
    temperature: float = 0.0
    top_p: float = 1.0
    prompt_file: Path | None = None
    max_tokens: int | None = None
    deadline_s: float = 600.0
    prefix_chars: int = 16_000
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise SettingsError(f"--rewrite-temperature {self.temperature}: a number of at least 0 is needed")
        _ = self.prompt  # a mistake in it is told now

    @property
    def prompt(self) -> PromptFile:
        """The instructions. Raises SettingsError naming a file that is none of a rewriter's."""
        return builtin_prompt("rewrite") if self.prompt_file is None else read_rewrite_prompt(self.prompt_file)


class Rewriter(AsksTeacher):
    """See the module. Counters: rewrites, copies, dropped by reason, calls, tokens, failures, latency.

    policy_tokenizer: transformers tokenizer of the policy; max_tokens: its tokens per rewrite."""

    def __init__(self, settings: RewriterSettings, policy_tokenizer: Any, max_tokens: int) -> None:
        super().__init__(settings.client, settings.deadline_s)
        self._settings = settings
        self._tokenizer = policy_tokenizer
        self._max_tokens = max_tokens
        self._prompt = settings.prompt

    async def check(self, timeout_s: float = CHECK_TIMEOUT_S) -> None:
        """Raises EndpointError naming an endpoint that does not answer within `timeout_s`, and settings mistakes."""
        await super().check(timeout_s)
        if not self._settings.client.endpoint.continues_answers:
            self._check_reasoning("rewrites")

    async def rewrite(self, tasks: Sequence[Task]) -> list[Candidate | None]:
        """One rewrite per task, in order; None where there is none, counted by reason.

        A rewrite that copies the suffix is the suffix's own ids and text, so that the two merge in selection.
        """
        return list(await asyncio.gather(*self.begin(tasks)))

    def begin(self, tasks: Sequence[Task]) -> list[asyncio.Task[Candidate | None]]:
        """As `rewrite`, without waiting: a task for each rewrite, under way on the running event loop."""
        deadline = longest_wait(asyncio.get_running_loop().time(), self._settings.deadline_s)
        gate, missing = asyncio.Semaphore(self._settings.client.in_flight), len(tasks)

        async def bounded(task: Task) -> Candidate | None:
            nonlocal missing
            async with gate:
                rewrite = await self._rewrite_task(task, deadline)
            missing -= 1
            if not missing:
                self._client.flush()
            return rewrite

        return [asyncio.create_task(bounded(task)) for task in tasks]

    async def _rewrite_task(self, task: Task, deadline: float) -> Candidate | None:
        words = last_words(task.prefix_text)
        prefix = self._shown_prefix(task, words)
        if prefix is None:
            self._counts["dropped/context-too-short"] += 1
            return None
        call = self._call(task, words, prefix)
        [answer] = await self._client.ask([call], task.index, deadline)
        forced = self._settings.client.endpoint.continues_answers
        text, problem = read_rewrite(answer, task.prefix_text, task.suffix_text, words, start_required=not forced)
        if problem:
            self._counts[f"dropped/{problem}"] += 1
            return None
        return self._candidate(task, text)

    def _candidate(self, task: Task, text: str) -> Candidate | None:
        seam = find_seam(self._tokenizer, task.prefix_ids, task.prefix_text)
        ids = ids_after(self._tokenizer, seam, text)
        if ids is None:
            self._counts["dropped/seam-in-character"] += 1
            return None
        ids = ids[: self._max_tokens]
        cut = text_after(self._tokenizer, seam, ids)
        if ids == task.suffix_ids or cut.strip() == task.suffix_text.strip():
            self._counts["copies"] += 1
            return Candidate("rewrite", list(task.suffix_ids), task.suffix_text)
        self._counts["rewrites"] += 1
        return Candidate("rewrite", ids, cut)

    def _shown_prefix(self, task: Task, words: str) -> str | None:
        """The end of the prefix that the rewriter's context holds; None when it holds next to nothing of it."""
        whole = valid_unicode(task.prefix_text)
        bare = self._call(task, words, "", UNKNOWN_CODE)
        window = self._client.window(self._settings.prefix_chars)
        prefix = window.shown(whole, lambda: self._client.request_tokens(bare))
        self._counts["prefixes-cut"] += prefix is not None and prefix != whole
        return prefix

    def _call(self, task: Task, words: str, prefix: str, code: str | None = None) -> GenerateCall:
        settings = self._settings
        call = rewrite_call(self._prompt, prefix, task.suffix_text, words, settings.seed, code)
        return replace(
            call,
            max_tokens=settings.max_tokens or REWRITE_ROOM * self._max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )


def read_rewrite_prompt(path: Path) -> PromptFile:
    """A rewriter's instructions of one's own. Raises SettingsError that names the file and what would be right.

    The answer as a whole is the rewrite, begun with the words before it: so there is no pattern, and both have to be shown.
    """
    try:
        prompt = read_prompt_file(path)
    except PromptError as error:
        raise SettingsError(f"--rewrite-prompt: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--rewrite-prompt {path}: {getattr(error, 'strerror', None) or error}") from error
    problem = ""
    if prompt.kind != "text" or prompt.text_pattern is not None or prompt.start:
        problem = (
            "a rewriter's prompt has kind = 'text', and neither pattern nor start: its whole answer is the rewrite"
        )
    elif missing := REWRITE_NEEDS - prompt.slots:
        problem = f"it must contain {' and '.join('{{' + slot + '}}' for slot in sorted(missing))}"
    elif foreign := prompt.slots - REWRITE_NEEDS - {"prefix", "code"}:
        problem = f"a rewriter knows no {' and '.join('{{' + slot + '}}' for slot in sorted(foreign))}"
    if problem:
        raise SettingsError(f"--rewrite-prompt {path}: {problem}")
    return prompt


def rewrite_call(
    prompt: PromptFile, prefix: str, suffix: str, words: str, seed: int, code: str | None = None
) -> GenerateCall:
    """What asks for a greedy rewrite of a suffix; `prefix` is as much as is shown of what ends with `words`."""
    start = valid_unicode(words.strip())
    texts = {"prefix": prefix, "continuation": valid_unicode(words + suffix)}
    code = code or fence_code(seed, prefix, [texts["continuation"]])
    return GenerateCall(prompt.identity, prompt.fill(texts, code, start), 1, 0, 0.0, 1.0, start=start)


def read_rewrite(answer: Answer, prefix: str, suffix: str, words: str, *, start_required: bool) -> tuple[str, str]:
    """(text, "") or ("", why there is no rewrite: failed, unfinished, wrong-start, empty, refused)."""
    if not isinstance(answer, list) or not answer:
        return "", "failed"
    if not isinstance(answer[0], str):
        return "", "unfinished"
    text = without_start(answer[0], words, required=start_required)
    if text is None:
        return "", "refused" if is_refusal(answer[0]) else "wrong-start"
    text = fit_whitespace(text, prefix)
    if not text.strip():
        return "", "empty"
    if is_refusal(text) and not is_refusal(suffix):
        return "", "refused"
    return text, ""


def last_words(prefix: str, count: int = START_WORDS) -> str:
    """The last `count` words of a text with the white space that follows them; a cut-off word counts as one.

    Fewer where they exceed START_CHARS or START_BYTES, and where even the last one does, its last PIECE_CHARS characters.
    """
    body = prefix.rstrip()
    if not body:
        return ""
    after = prefix[len(body) :][:START_CHARS]
    near = body[
        -START_CHARS - 1 :
    ]  # with the character before the longest start, which tells whether a word begins there
    cut = len(near) > START_CHARS
    starts = [word.start() for word in re.finditer(r"\S+", near) if word.start() or not cut]
    fitting = (near[start:] for start in starts[-count:])
    return (
        next((words for words in fitting if len(words.encode(errors="replace")) <= START_BYTES), _piece(near)) + after
    )


def _piece(word: str) -> str:
    """The end of a long word, from a boundary inside it when one is near, else from the beginning of a character."""
    piece = word[-PIECE_CHARS:]
    if boundary := re.search(r"(?<=\W)\w", piece[: PIECE_CHARS // 2]):
        return piece[boundary.start() :]
    while len(piece) > 1 and (unicodedata.category(piece[0])[0] == "M" or piece[0] == "\u200d"):
        piece = piece[1:]
    return piece


def without_start(answer: str, words: str, *, required: bool) -> str | None:
    """`answer` after the words it had to start with; None when they are `required` and missing.

    Where the server forced them they are not part of the answer, but some models repeat them: that is only believed of
    three words or as many characters, since a rewrite may begin with the same word by chance.
    """
    wanted = words.split()
    if not wanted or (not required and len(wanted) < 3 and len(words.strip()) < _SURE_CHARS):
        return answer
    pattern = r"[\s\"'“”*_]*" + r"\s+".join(map(re.escape, wanted))
    match = re.match(pattern, answer, re.IGNORECASE)
    if match:
        return answer[match.end() :]
    return None if required else answer


def fit_whitespace(text: str, prefix: str) -> str:
    """`text` without leading white space where the prefix already ends with some, and without any trailing."""
    return text.rstrip() if not prefix or not prefix[-1].isspace() else text.strip()
