"""Criteria: small objects with one interface, texts in, scores with vote counts out.

Scales, so that weighted sums mean something (paper section 3.2.1 adds quality and safety):
- pairwise (quality): win rate against the group's other candidates, 0 .. 1, whatever the schedule;
- pointwise (safety, factuality, prompt files): mean value of the votes, or expected value of a soft verdict, 0 .. 1;
- likelihood: mean log-prob in nats a token. Alone it is the score as it is. Added to others it is first turned into the
  win rate that strengths of log-prob / `likelihood_scale` give in the group, so that it also lies in 0 .. 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_sip.judge.bradley_terry import FloatArray, expected_win_rates
from megatron_sip.judge.calls import Answer, Call, ChoiceCall, GenerateCall, LikelihoodCall
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.prompts import PromptFile, builtin_prompt, read_prompt_file
from megatron_sip.judge.schedules import Comparisons, Field, Pair, Schedule, is_connected, make_schedule
from megatron_sip.judge.settings import LIKELIHOOD, JudgeSettings, Objective, SettingsError, VerdictMode
from megatron_sip.samples import CandidateKind

Ask = Callable[[Sequence[Call]], Awaitable[list[Answer]]]
"""Answers in the order of the calls; None for a call without one."""

LIKELIHOOD_IDENTITY = "likelihood@2"
PRIOR_LIMIT = 1.5
"""Logits by which a likelihood prior may move a candidate before any verdict."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """One task as the criteria see it: texts, all different. `code` marks its fences, `seed` its random draws."""

    prefix: str
    reference: str
    candidates: tuple[str, ...]
    kinds: tuple[CandidateKind, ...]
    code: str
    seed: tuple[int, ...]
    objective: Objective


@dataclass(frozen=True, slots=True)
class CriterionScores:
    """Scores [candidates] and how many verdicts are behind each, or `missing`: why there are no scores.

    history: pairwise verdicts; values: those about single candidates [candidates][verdicts].
    """

    scores: tuple[float, ...] = ()
    votes: tuple[int, ...] = ()
    missing: str | None = None
    planned: int = 0
    received: int = 0
    history: Comparisons | None = field(default=None, compare=False)
    values: tuple[tuple[float, ...], ...] = ()

    def verdicts(self, places: Sequence[int]) -> list[list[float]]:
        """Each verdict in the order it was given, with the order of the options shown; see Group.verdicts.

        places: where a text stands among the group's candidates.
        """
        if self.history is not None:
            shown = zip(self.history.first, self.history.second, self.history.outcome, strict=True)
            return [[places[first], places[second], round(float(outcome), 6)] for first, second, outcome in shown]
        return [[places[i], round(value, 6)] for i, own in enumerate(self.values) for value in own]


class Criterion(Protocol):
    """`name` is what scores, votes and metrics are filed under."""

    @property
    def name(self) -> str: ...

    async def score(self, sheet: Sheet, ask: Ask) -> CriterionScores: ...

    def longest_call(self, sheet: Sheet) -> Call:
        """The call about a sheet that takes most tokens: what must fit into the judge's context."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How hard verdicts are sampled; `votes` answers a judgement."""

    votes: int
    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Pointwise:
    """One judgement a candidate (paper: safety, factuality). Soft: one forward pass instead of sampled votes."""

    name: str
    prompt: PromptFile
    mode: VerdictMode
    sampling: Sampling
    quorum: float

    def check(self, encoder: ChatEncoder) -> None:
        """Raises EncodingError when this criterion cannot be asked in the judge's tokens."""
        check_encodable(self.prompt, self.mode, encoder)

    async def score(self, sheet: Sheet, ask: Ask) -> CriterionScores:
        calls = [self._call(sheet, candidate) for candidate in sheet.candidates]
        answers = await ask(calls)
        votes = [valid_votes(answer) for answer in answers]
        planned = 1 if self.mode == "soft" else self.sampling.votes
        received = sum(map(len, votes))
        if any(len(own) < max(1.0, self.quorum * planned) for own in votes):
            return CriterionScores(missing="too-few-verdicts", planned=planned * len(calls), received=received)
        means = tuple(float(np.mean(own)) for own in votes)
        values = tuple(map(tuple, votes))
        return CriterionScores(means, tuple(map(len, votes)), None, planned * len(calls), received, values=values)

    def longest_call(self, sheet: Sheet) -> Call:
        return self._call(sheet, max(sheet.candidates, key=len))

    def _call(self, sheet: Sheet, candidate: str) -> Call:
        texts = {"prefix": sheet.prefix, "reference": sheet.reference, "candidate": candidate}
        return judgement(self.prompt, texts, sheet.code, self.mode, self.sampling, self.sampling.votes)


@dataclass(frozen=True, slots=True)
class Pairwise:
    """Judgements of pairs that a schedule chooses (paper: quality)."""

    name: str
    prompt: PromptFile
    mode: VerdictMode
    sampling: Sampling
    quorum: float
    schedule: Schedule
    prior_scale: float | None = None

    def check(self, encoder: ChatEncoder) -> None:
        """Raises EncodingError when this criterion cannot be asked in the judge's tokens."""
        check_encodable(self.prompt, self.mode, encoder)

    async def score(self, sheet: Sheet, ask: Ask) -> CriterionScores:
        if len(sheet.candidates) == 1:
            return CriterionScores((0.5,), (0,))  # it can only draw with itself
        prior = await self._prior(sheet, ask)
        rng = np.random.default_rng(sheet.seed)
        players = Field(sheet.kinds, sheet.objective, rng, prior, repeatable=self.mode == "hard")
        history, planned = Comparisons.empty(), Comparisons.empty()
        asked: Counter[Pair] = Counter()
        round_index = 0
        while pairs := self.schedule.next_pairs(round_index, players, history):
            shown = self._shown(pairs)
            calls = []
            for first, second, votes in shown:
                calls.append(self._call(sheet, first, second, votes, salt=asked[first, second]))
                asked[first, second] += 1
            answers = await ask(calls)
            verdicts = [
                (first, second, vote)
                for (first, second, _), answer in zip(shown, answers, strict=True)
                for vote in valid_votes(answer)
            ]
            history = history.plus(verdicts)
            planned = planned.plus([(first, second, 0.5) for first, second, votes in shown for _ in range(votes)])
            round_index += 1
        got, wanted = history.appearances(players.count), planned.appearances(players.count)
        counts = len(planned.first), len(history.first)
        if np.any(got < np.maximum(1.0, self.quorum * wanted)) or not is_connected(players.count, history):
            return CriterionScores((), (), "too-few-verdicts", *counts, history)
        scores = tuple(map(float, self.schedule.scores(players, history)))
        return CriterionScores(scores, tuple(map(int, got)), None, *counts, history)

    def longest_call(self, sheet: Sheet) -> Call:
        by_length = sorted(range(len(sheet.candidates)), key=lambda i: len(sheet.candidates[i]))
        return self._call(sheet, by_length[-1], by_length[-2:][0], self.sampling.votes, 0)

    def _shown(self, pairs: Sequence[Pair]) -> list[tuple[int, int, int]]:
        """(first, second, votes): votes are spread over both orders; which one gets the odd vote the schedule drew."""
        if self.mode == "soft":
            both, votes = not self.schedule.balanced, 1
        else:
            both, votes = self.schedule.both_orders, self.sampling.votes
        if both:
            return [shown for a, b in pairs for shown in ((a, b, votes), (b, a, votes))]
        halves = (votes + 1) // 2, votes // 2
        return [(x, y, half) for a, b in pairs for x, y, half in ((a, b, halves[0]), (b, a, halves[1])) if half]

    def _call(self, sheet: Sheet, first: int, second: int, votes: int, salt: int) -> Call:
        texts = {
            "prefix": sheet.prefix,
            "reference": sheet.reference,
            "option_1": sheet.candidates[first],
            "option_2": sheet.candidates[second],
        }
        return judgement(self.prompt, texts, sheet.code, self.mode, self.sampling, votes, salt)

    async def _prior(self, sheet: Sheet, ask: Ask) -> FloatArray | None:
        """Strengths in logits from the likelihood, where asked for and known for all candidates."""
        if self.prior_scale is None:
            return None
        answers = await ask([LikelihoodCall(LIKELIHOOD_IDENTITY, (sheet.prefix, text)) for text in sheet.candidates])
        known = [answer for answer in answers if isinstance(answer, float)]
        if len(known) < len(answers):
            return None
        strengths = np.array(known)
        return np.clip((strengths - strengths.mean()) / self.prior_scale, -PRIOR_LIMIT, PRIOR_LIMIT)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Mean token log-prob of a candidate after the prefix under the judge's model, nats; one prefill a candidate."""

    name: str = LIKELIHOOD

    async def score(self, sheet: Sheet, ask: Ask) -> CriterionScores:
        calls = [LikelihoodCall(LIKELIHOOD_IDENTITY, (sheet.prefix, text)) for text in sheet.candidates]
        answers = await ask(calls)
        known = tuple(answer for answer in answers if isinstance(answer, float))
        if len(known) < len(calls):
            reason = "empty-candidate" if not all(sheet.candidates) else "too-few-verdicts"
            return CriterionScores(missing=reason, planned=len(calls), received=len(known))
        values = tuple((value,) for value in known)
        return CriterionScores(known, (1,) * len(known), None, len(calls), len(known), values=values)

    def longest_call(self, sheet: Sheet) -> Call:
        return LikelihoodCall(LIKELIHOOD_IDENTITY, (sheet.prefix, max(sheet.candidates, key=len)))


def judgement(
    prompt: PromptFile,
    texts: dict[str, str],
    code: str,
    mode: VerdictMode,
    sampling: Sampling,
    votes: int,
    salt: int = 0,
) -> Call:
    """The call that asks `prompt` about `texts`; a sampled one with another `salt` is another draw."""
    assert prompt.rule is not None
    pieces = prompt.fill(texts, code)
    if mode == "soft":
        return ChoiceCall(prompt.identity, pieces, prompt.rule, sampling.max_tokens)
    return GenerateCall(
        prompt.identity,
        pieces,
        votes,
        sampling.max_tokens,
        sampling.temperature,
        sampling.top_p,
        prompt.rule,
        salt=salt,
    )


def check_encodable(prompt: PromptFile, mode: VerdictMode, encoder: ChatEncoder) -> None:
    """Raises EncodingError without a chat template, or when soft verdicts do not differ in their first token."""
    encoder.chat(prompt.body)
    if mode == "soft" and prompt.rule is not None:
        encoder.choices(prompt.rule.start, prompt.rule.labels)


def valid_votes(answer: Answer) -> list[float]:
    """The votes in an answer; a failed call and an answer without verdict give none."""
    if isinstance(answer, list):
        return [vote for vote in answer if isinstance(vote, float)]
    return [] if answer is None else [answer]


def make_criterion(name: str, settings: JudgeSettings, schedule: Schedule | None = None) -> Criterion:
    """The criterion called `name` (or the prompt file of that path), asked as the settings say."""
    if name == LIKELIHOOD:
        return Likelihood()
    prompt = read_prompt_file(Path(name)) if name.endswith(".txt") else builtin_prompt(name)
    sampling = Sampling(settings.votes, settings.temperature, settings.top_p, settings.max_tokens)
    label = prompt.name if name.endswith(".txt") else name
    if settings.mode(name) == "soft" and not prompt.start:
        raise SettingsError(
            f"criterion {name}: soft verdicts need start = '...' in its prompt file; add it or use hard ones"
        )
    if prompt.kind == "pointwise":
        return Pointwise(label, prompt, settings.mode(name), sampling, settings.quorum)
    prior_scale = settings.likelihood_scale if settings.schedule.likelihood_prior else None
    chosen = schedule or make_schedule(settings.schedule)
    return Pairwise(label, prompt, settings.mode(name), sampling, settings.quorum, chosen, prior_scale)


def comparable(name: str, scores: Sequence[float], alone: bool, likelihood_scale: float) -> FloatArray:
    """Scores as they enter the weighted sum; see the module on scales."""
    values = np.array(scores, np.float64)
    return expected_win_rates(values / likelihood_scale) if name == LIKELIHOOD and not alone else values
