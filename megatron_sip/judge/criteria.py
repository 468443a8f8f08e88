"""Criteria: small objects with one interface, texts in, scores with vote counts out.

Scales, so that weighted sums mean something (paper section 3.2.1 adds quality and safety):
- pairwise (quality): win rate against the group's other candidates, 0 .. 1, whatever the schedule;
- pointwise (safety, factuality, prompt files): mean value of the votes, or expected value of a soft verdict, 0 .. 1;
- likelihood: mean log-prob in nats a token. Alone it is the score as it is. Added to others it is first turned into the
  win rate that strengths of log-prob / LIKELIHOOD_SCALE give in the group, so that it also lies in 0 .. 1.

Verdicts that are missing are asked for once more. A candidate that then still lacks them has no score; the others keep theirs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from megatron_sip.judge.bradley_terry import FloatArray, IntArray, expected_win_rates
from megatron_sip.judge.calls import Answer, Call, ChoiceCall, GenerateCall, LikelihoodCall
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.prompts import PromptFile
from megatron_sip.judge.schedules import (
    Comparisons,
    Field,
    Pair,
    Pivot,
    Schedule,
    largest_linked,
    votes_in_orders,
)
from megatron_sip.judge.settings import LIKELIHOOD, Objective, VerdictMode
from megatron_sip.metrics import Metrics
from megatron_sip.records import CandidateKind, Label

Ask = Callable[[Sequence[Call]], Awaitable[list[Answer]]]
"""Answers in the order of the calls; None for a call without one."""

LIKELIHOOD_IDENTITY = "likelihood@3"
LIKELIHOOD_SCALE = 0.25
"""Nats a token that count as a logit of strength."""
PRIOR_LIMIT = 1.5
"""Logits by which a likelihood prior may move a candidate before any verdict."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """One task as the criteria see it: texts, all different; `original` is the suffix. `code` marks fences, `seed` the draws.

    ended: the places of the candidates whose document ends with them; of equal texts one may have ended and one been cut.
    pivot: the place of the text that all others meet, if that was chosen beforehand; apart: it stands last and is compared
    only, without a score of its own. copies: how many candidates have each text. label: of a labelled task, of which `ended`
    are the candidates that came to their own end. number: the task's, which chooses the server. deadline: loop time at which
    answers come too late, silence_s: without any they do before, see serving.patience.
    """

    prefix: str
    original: str
    candidates: tuple[str, ...]
    kinds: tuple[CandidateKind, ...]
    code: str
    seed: tuple[int, ...]
    objective: Objective
    ended: frozenset[int] = frozenset()
    pivot: int | None = None
    apart: bool = False
    copies: tuple[int, ...] = ()
    label: Label | None = None
    number: int = 0
    deadline: float = math.inf
    silence_s: float = math.inf

    @property
    def counts(self) -> tuple[int, ...]:
        """How many candidates each contender stands for."""
        return self.copies or (1,) * self.contenders

    @property
    def contenders(self) -> int:
        """How many of the candidates, the first ones, are scored."""
        return len(self.candidates) - self.apart

    def likelihood_calls(self) -> list[LikelihoodCall]:
        """One per contender."""
        texts = self.candidates[: self.contenders]
        return [
            LikelihoodCall(LIKELIHOOD_IDENTITY, (self.prefix, text), i in self.ended) for i, text in enumerate(texts)
        ]


@dataclass(frozen=True, slots=True)
class CriterionScores:
    """Scores [contenders] and how many verdicts are behind each. None: it has no score; `missing` says why.

    history: pairwise verdicts; values: those about single candidates [contenders][verdicts]. notes: what else was found, for
    the metrics.
    """

    scores: tuple[float | None, ...]
    votes: tuple[int, ...]
    missing: str | None = None
    planned: int = 0
    received: int = 0
    history: Comparisons | None = field(default=None, compare=False)
    values: tuple[tuple[float, ...], ...] = ()
    notes: Metrics = field(default_factory=dict)

    def verdicts(self, places: Mapping[int, int]) -> list[list[float]]:
        """Each verdict in the order it was given, with the order of the options shown; see Group.verdicts.

        places: where a text stands among the group's candidates; verdicts about others are left out.
        """
        if self.history is not None:
            shown = zip(self.history.first.tolist(), self.history.second.tolist(), self.history.outcome, strict=True)
            return [
                [places[first], places[second], round(float(outcome), 6)]
                for first, second, outcome in shown
                if first in places and second in places
            ]
        return [[places[i], round(value, 6)] for i, own in enumerate(self.values) if i in places for value in own]


class Criterion(Protocol):
    """`name` is what scores, votes and metrics are filed under."""

    @property
    def name(self) -> str: ...

    @property
    def mode(self) -> VerdictMode | None:
        """How verdicts are asked for; None: none are."""
        ...

    def check(self, encoder: ChatEncoder) -> None:
        """Raises EncodingError when this criterion cannot be asked in the judge's tokens."""
        ...

    async def score(self, sheet: Sheet, ask: Ask) -> CriterionScores: ...

    def longest_call(self, sheet: Sheet) -> Call | None:
        """The call about a sheet that takes most tokens: what must fit into the judge's context; None: no server is asked."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How hard verdicts are sampled; `votes` answers per judgement."""

    votes: int
    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Pointwise:
    """One judgement per candidate (paper: safety, factuality). Soft: one forward pass instead of sampled votes."""

    name: str
    prompt: PromptFile
    mode: VerdictMode
    sampling: Sampling
    quorum: float

    def check(self, encoder: ChatEncoder) -> None:
        """Raises EncodingError when this criterion cannot be asked in the judge's tokens."""
        check_encodable(self.prompt, self.mode, encoder)

    async def score(self, sheet: Sheet, ask: Ask) -> CriterionScores:
        calls = [self._call(sheet, candidate) for candidate in sheet.candidates[: sheet.contenders]]
        votes = await ask_until_there(ask, calls)
        planned = 1 if self.mode == "soft" else self.sampling.votes
        enough = max(1.0, self.quorum * planned)
        scores = tuple(float(np.mean(own)) if len(own) >= enough else None for own in votes)
        missing = "too-few-verdicts" if None in scores else None
        counts, values = tuple(map(len, votes)), tuple(map(tuple, votes))
        return CriterionScores(scores, counts, missing, planned * len(calls), sum(counts), values=values)

    def longest_call(self, sheet: Sheet) -> Call:
        return self._call(sheet, max(sheet.candidates, key=len))

    def _call(self, sheet: Sheet, candidate: str) -> Call:
        texts = {"prefix": sheet.prefix, "reference": sheet.original, "candidate": candidate}
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
    likelihood_prior: bool = False

    def check(self, encoder: ChatEncoder) -> None:
        """Raises EncodingError when this criterion cannot be asked in the judge's tokens."""
        check_encodable(self.prompt, self.mode, encoder)

    async def score(self, sheet: Sheet, ask: Ask) -> CriterionScores:
        if sheet.contenders == 1:
            return CriterionScores((0.5,), (0,))  # it can only draw with itself
        with_pivot = isinstance(self.schedule, Pivot)  # an audit's schedule needs none
        count = len(sheet.candidates) if with_pivot else sheet.contenders
        players = Field(
            sheet.kinds[:count],
            sheet.objective,
            np.random.default_rng(sheet.seed),
            prior=None if with_pivot else await self._prior(sheet, ask),
            repeatable=self.mode == "hard",
            pivot=sheet.pivot if with_pivot else None,
        )
        history, planned = Comparisons.empty(), Comparisons.empty()
        asked: Counter[Pair] = Counter()
        round_index = 0
        while pairs := self.schedule.next_pairs(round_index, players, history):
            shown = self._shown(pairs, count)
            calls = []
            for first, second, votes in shown:
                calls.append(self._call(sheet, first, second, votes, salt=asked[first, second]))
                asked[first, second] += 1
            answers = zip(shown, await ask_until_there(ask, calls), strict=True)
            history = history.plus([(first, second, vote) for (first, second, _), own in answers for vote in own])
            planned = planned.plus([(first, second, 0.5) for first, second, votes in shown for _ in range(votes)])
            round_index += 1
        return self._scored(players, history, planned, sheet.contenders)

    def _scored(self, players: Field, history: Comparisons, planned: Comparisons, contenders: int) -> CriterionScores:
        """Scores of the candidates that have their share of verdicts and that these link; of others, None."""
        kept = with_quorum(players.count, history, planned, self.quorum)
        kept = kept[largest_linked(kept.size, history.among(kept, players.count))]
        scored = [int(i) for i in kept if i < contenders]
        scores: list[float | None] = [None] * contenders
        if len(scored) >= 2:
            found = history.among(kept, players.count)
            complete = kept.size == players.count and orders(history) == orders(planned)
            values = self.schedule.scores(players.among(kept), found, complete=complete)
            for i, value in zip(kept, values, strict=True):
                if i < contenders:
                    scores[i] = float(value)
        missing = "too-few-verdicts" if None in scores else None
        got = history.appearances(players.count)[:contenders]
        counts = len(planned.first), len(history.first)
        return CriterionScores(tuple(scores), tuple(map(int, got)), missing, *counts, history)

    def longest_call(self, sheet: Sheet) -> Call:
        by_length = sorted(range(len(sheet.candidates)), key=lambda i: len(sheet.candidates[i]))
        return self._call(sheet, by_length[-1], by_length[-2:][0], self.sampling.votes, 0)

    def _shown(self, pairs: Sequence[Pair], count: int) -> list[tuple[int, int, int]]:
        """(first, second, votes): votes are spread over both orders; the schedule says which one gets an odd vote."""
        given, swapped = votes_in_orders(self.schedule, count, soft=self.mode == "soft", votes=self.sampling.votes)
        return [(x, y, votes) for a, b in pairs for x, y, votes in ((a, b, given), (b, a, swapped)) if votes]

    def _call(self, sheet: Sheet, first: int, second: int, votes: int, salt: int) -> Call:
        texts = {
            "prefix": sheet.prefix,
            "reference": sheet.original,
            "option_1": sheet.candidates[first],
            "option_2": sheet.candidates[second],
        }
        return judgement(self.prompt, texts, sheet.code, self.mode, self.sampling, votes, salt)

    async def _prior(self, sheet: Sheet, ask: Ask) -> FloatArray | None:
        """Strengths in logits from the likelihood, where asked for and known for all candidates."""
        if not self.likelihood_prior:
            return None
        known = await ask_until_there(ask, sheet.likelihood_calls())
        if not all(known):
            return None
        strengths = np.concatenate(known)
        return np.clip((strengths - strengths.mean()) / LIKELIHOOD_SCALE, -PRIOR_LIMIT, PRIOR_LIMIT)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Mean token log-prob of a candidate after the prefix under the judge's model, nats; one prefill a candidate.

    The end of a candidate that ended is one of its tokens: a beginning alone is more likely than what it costs to stop there.
    """

    name: str = LIKELIHOOD
    mode: VerdictMode | None = None

    def check(self, encoder: ChatEncoder) -> None:
        """Raises EncodingError when the judge's tokenizer has no token that ends a text."""
        encoder.document_end()

    async def score(self, sheet: Sheet, ask: Ask) -> CriterionScores:
        calls = sheet.likelihood_calls()
        known = await ask_until_there(ask, calls)
        lost = [call for call, own in zip(calls, known, strict=True) if not own]
        empty = all(not call.prompt[1] for call in lost)
        missing = None if not lost else "empty-candidate" if empty else "too-few-verdicts"
        counts, values = tuple(map(len, known)), tuple(map(tuple, known))
        scores = tuple(own[0] if own else None for own in known)
        return CriterionScores(scores, counts, missing, len(calls), sum(counts), values=values)

    def longest_call(self, sheet: Sheet) -> Call:
        return max(sheet.likelihood_calls(), key=lambda call: len(call.prompt[1]))


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


async def ask_until_there(ask: Ask, calls: Sequence[Call]) -> list[list[float]]:
    """The votes in the answer to each call; those that are missing are asked for once more, as new draws."""
    votes = [valid_votes(answer) for answer in await ask(calls)]
    missing = [
        (call.n if isinstance(call, GenerateCall) else 1) - len(own) for call, own in zip(calls, votes, strict=True)
    ]
    again = [i for i, count in enumerate(missing) if count > 0]
    if again:
        for i, answer in zip(again, await ask([_once_more(calls[i], missing[i]) for i in again]), strict=True):
            votes[i] += valid_votes(answer)
    return votes


def _once_more(call: Call, missing: int) -> Call:
    return replace(call, n=missing, again=True) if isinstance(call, GenerateCall) else call


def with_quorum(count: int, history: Comparisons, planned: Comparisons, quorum: float) -> IntArray:
    """The candidates with their share of the verdicts that were planned about two of them, in order.

    One by one, the one with the least share first: others are not to go for what they lost with it.
    """
    kept = np.arange(count)
    while kept.size:
        got, wanted = (part.among(kept, count).appearances(kept.size) for part in (history, planned))
        lacking = got < np.maximum(1.0, quorum * wanted)
        if not lacking.any():
            break
        kept = np.delete(kept, np.argmin(np.where(lacking, got / np.maximum(wanted, 1), np.inf)))
    return kept


def orders(history: Comparisons) -> set[Pair]:
    """The pairs with verdicts, each as it was shown."""
    return set(zip(history.first.tolist(), history.second.tolist(), strict=True))


def valid_votes(answer: Answer) -> list[float]:
    """The votes in an answer; a failed call and an answer without verdict give none."""
    if isinstance(answer, list):
        return [vote for vote in answer if isinstance(vote, float)]
    return [] if answer is None else [answer]


def comparable(name: str, scores: Sequence[float], alone: bool) -> FloatArray:
    """Scores as they enter the weighted sum; see the module on scales."""
    values = np.array(scores, np.float64)
    return expected_win_rates(values / LIKELIHOOD_SCALE) if name == LIKELIHOOD and not alone else values
