"""Labelled questions to a judge, one by one as they stand: what its accuracy and its use of labels are measured by.

They are asked as in training (prompt files, fences, verdict rules, client), but each in its own order, once: no verdict is
asked for again, and one that cannot be read stays unread.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_sip.judge.base import UNKNOWN_CODE, AsksTeacher
from megatron_sip.judge.calls import Answer, Call
from megatron_sip.judge.criteria import Sampling, check_encodable, judgement
from megatron_sip.judge.labelled_tasks import judge_prompt
from megatron_sip.judge.prompts import PromptFile, fence_code, find_prompt, valid_unicode
from megatron_sip.judge.settings import ClientSettings, SettingsError, VerdictMode
from megatron_sip.judge.teacher import CHECK_TIMEOUT_S
from megatron_sip.judge.verdicts import VerdictRule


@dataclass(frozen=True, slots=True)
class ExamSettings:
    """client: servers and cache. mode: written (hard) or one-token (soft) verdicts; votes: of a written one, to a question."""

    client: ClientSettings
    mode: VerdictMode = "soft"
    votes: int = 1
    temperature: float = 1.0
    top_p: float = 0.6
    max_tokens: int = 512
    deadline_s: float = 24 * 3600.0
    prefix_chars: int = 16_000

    def __post_init__(self) -> None:
        if self.votes < 1:
            raise SettingsError(f"--judge-votes {self.votes}: at least 1 is needed")


@dataclass(frozen=True, slots=True)
class Question:
    """texts: by slot of the criterion's prompt, prefix and reference among them."""

    criterion: str
    texts: Mapping[str, str]

    @property
    def rule(self) -> VerdictRule:
        """How its verdicts are read. Raises ValueError for a criterion that has none."""
        rule = judge_prompt(self.criterion).rule
        assert rule is not None
        return rule


@dataclass(frozen=True, slots=True)
class Reply:
    """values: of the verdicts that could be read; unread: how many could not. failed: why the judge did not answer at all."""

    values: tuple[float, ...] = ()
    unread: int = 0
    failed: str | None = None


class Exam(AsksTeacher):
    """See the module."""

    def __init__(self, settings: ExamSettings, criteria: Sequence[str]) -> None:
        """Raises SettingsError for a criterion without verdicts, or that has more than two in soft mode."""
        super().__init__(settings.client)
        self._settings = settings
        self._prompts = {name: _prompt(name, settings.mode) for name in criteria}

    @property
    def model(self) -> str:
        """Which model answers, as far as it is known; after `check`."""
        return self._client.model

    async def check(self, timeout_s: float = CHECK_TIMEOUT_S) -> None:
        """Raises EndpointError naming an endpoint that does not answer within `timeout_s`, and settings mistakes."""
        await super().check(timeout_s)
        endpoint = self._settings.client.endpoint
        for name, prompt in self._prompts.items():
            if endpoint.kind == "sglang":
                check_encodable(prompt, self._settings.mode, self._client.encoder)
            if self._settings.mode == "hard" or not endpoint.continues_answers:
                self._check_reasoning(f"criterion {name}")

    async def ask(self, questions: Sequence[Question], progress: Callable[[], object] = lambda: None) -> list[Reply]:
        """The judge's reply to each question, in order. progress: called after each."""
        gate = asyncio.Semaphore(self._settings.client.in_flight)

        numbers: dict[
            str | int, int
        ] = {}  # of prefixes, whose questions share a server, or of questions that have none
        prompts = [
            numbers.setdefault(question.texts.get("prefix") or place, len(numbers))
            for place, question in enumerate(questions)
        ]

        async def one(question: Question, number: int) -> Reply:
            async with gate:
                reply = await self._ask(question, number)
                progress()
                return reply

        replies = list(await asyncio.gather(*map(one, questions, prompts)))
        self._client.flush()
        return replies

    async def _ask(self, question: Question, number: int) -> Reply:
        texts = {name: valid_unicode(text) for name, text in question.texts.items()}
        window = self._client.window(self._settings.prefix_chars)
        bare = self._call(question, {**texts, "prefix": ""}, UNKNOWN_CODE)
        prefix = window.shown(texts.get("prefix", ""), lambda: self._client.request_tokens(bare))
        if prefix is None:
            return Reply(failed="context-too-short")
        self._counts["prefixes-cut"] += prefix != texts.get("prefix", "")
        others = [text for name, text in texts.items() if name != "prefix"]
        code = fence_code(self._settings.client.seed, prefix, others)
        call = self._call(question, {**texts, "prefix": prefix}, code)
        failures: Counter[str] = Counter()
        deadline = asyncio.get_running_loop().time() + self._settings.deadline_s
        [answer] = await self._client.ask([call], number, deadline, failures)
        return _reply(answer, failures, 1 if self._settings.mode == "soft" else self._settings.votes)

    def _call(self, question: Question, texts: dict[str, str], code: str) -> Call:
        settings = self._settings
        sampling = Sampling(settings.votes, settings.temperature, settings.top_p, settings.max_tokens)
        return judgement(self._prompts[question.criterion], texts, code, settings.mode, sampling, settings.votes)


def _reply(answer: Answer, failures: Counter[str], asked: int) -> Reply:
    if failures:
        return Reply(failed=failures.most_common(1)[0][0])
    votes = answer if isinstance(answer, list) else [answer]
    values = tuple(vote for vote in votes if isinstance(vote, float))
    return Reply(values, asked - len(values))


def _prompt(name: str, mode: VerdictMode) -> PromptFile:
    prompt = find_prompt(name)
    if prompt.rule is None:
        raise SettingsError(f"criterion {name}: its prompt asks for a text, not for a verdict")
    if mode == "soft" and len(prompt.rule.labels) > 2:
        raise SettingsError(
            f"criterion {name} has {len(prompt.rule.labels)} verdicts, of which a soft one gives a mean, not one: give "
            "--judge-verdict hard"
        )
    if mode == "soft" and not prompt.start:
        raise SettingsError(f"criterion {name}: soft verdicts need start = '...' in its prompt file; or hard ones")
    return prompt
