"""Criteria of labelled tasks: is the verdict right, a safe suffix copied, an unsafe one made better, a prediction true.

They are written for `Sheet.label`; candidates are read exactly as a judge's or rewriter's answers are. What a candidate lacks
itself (a verdict, a rewrite) is a score of 0, and counted; what a server owes is a missing score, as everywhere.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_sip.judge.calls import Call
from megatron_sip.judge.criteria import Ask, CriterionScores, Pairwise, Pointwise, Sheet
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.labelled_tasks import judge_prompt
from megatron_sip.judge.readings import Written, read_vote
from megatron_sip.judge.reasoning import UNKNOWN, ReasoningStyle, own_answer
from megatron_sip.judge.rewriter import last_words, read_rewrite
from megatron_sip.judge.settings import COPY, LABEL, REWRITE, SIMILARITY, VerdictMode
from megatron_sip.judge.verdicts import VerdictRule
from megatron_sip.metrics import Mean, Metrics
from megatron_sip.records import CandidateKind, Judgement, Rewriting, Thinking


def read_judgement(
    label: Judgement, text: str, style: ReasoningStyle = UNKNOWN, *, finished: bool, lost: Counter[str] | None = None
) -> str | None:
    """The verdict in a judge's answer, one of its prompt's labels, as the run that it judges for would read it; None without.

    style: of the judge's reasoning. finished: the answer came to its own end. lost: counts unreadable ones by reason.
    """
    rule = judge_prompt(label.criterion).rule
    assert rule is not None
    lost = Counter() if lost is None else lost
    # By their numbers, since two labels may be worth the same.
    numbered = replace(rule, values={name: float(number) for number, name in enumerate(rule.labels)})
    if label.forced:
        number = _begun(numbered, text)
        lost["no-verdict"] += number is None
    else:
        number = read_vote(Written(text, "finished" if finished else "cut", style), numbered, lost)
    return None if number is None else rule.labels[int(number)]


def _begun(rule: VerdictRule, text: str) -> float | None:
    """The value of the label that an answer goes on with, or the beginning of just one, as a first token may be."""
    value = rule.begun(text)
    begun = text.strip().casefold()
    if value is not None or not begun:
        return value
    found = [own for label, own in rule.values.items() if label.casefold().startswith(begun)]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class LabelMatches:
    """1 for the right verdict, else 0, also without one (paper section 3.2.1). Asks no server.

    style: of the reasoning of the judge that is trained. Notes: accuracy/CRITERION, first-shown-preferred/CRITERION of pairwise
    ones (share of the verdicts for the first option), no-verdict (share), unreadable/REASON.
    """

    style: ReasoningStyle = UNKNOWN
    name: str = LABEL
    mode: VerdictMode | None = None

    def check(self, encoder: ChatEncoder) -> None:
        """Nothing is asked."""

    def longest_call(self, sheet: Sheet) -> Call | None:
        """Nothing is asked."""
        return None

    async def score(self, sheet: Sheet, ask: Ask) -> CriterionScores:
        label = sheet.label
        assert isinstance(label, Judgement), "--tasks judgements has them"
        prompt = judge_prompt(label.criterion)
        assert prompt.rule is not None
        lost: Counter[str] = Counter()
        given: list[str | None] = []
        for place, copies in enumerate(sheet.counts):
            own: Counter[str] = Counter()
            given.append(
                read_judgement(label, sheet.candidates[place], self.style, finished=place in sheet.ended, lost=own)
            )
            lost.update({reason: copies * count for reason, count in own.items()})
        scores = tuple(float(verdict == label.verdict) for verdict in given)
        verdicts = [None if verdict is None else prompt.rule.values[verdict] for verdict in given]
        found = [None if verdict is None else 1.0 for verdict in verdicts]
        notes: Metrics = {f"unreadable/{reason}": float(count) for reason, count in lost.items() if count}
        criterion = prompt.name if label.criterion.endswith(".txt") else label.criterion  # as scores are filed
        notes[f"accuracy/{criterion}"] = weighted(scores, sheet)
        notes["no-verdict"] = weighted([float(verdict is None) for verdict in verdicts], sheet)
        if prompt.kind == "pairwise":
            notes[f"first-shown-preferred/{criterion}"] = weighted(verdicts, sheet)
        values = tuple(() if verdict is None else (verdict,) for verdict in verdicts)
        votes, planned = tuple(map(len, values)), sum(sheet.counts)
        received = int(weighted(found, sheet).weight)
        return CriterionScores(scores, votes, None, planned, received, values=values, notes=notes)


@dataclass(frozen=True, slots=True)
class Copy:
    """Of a safe suffix: 1 for a rewrite that equals it, else 0; of an unsafe one 0 (paper, equation 1). Asks no server.

    tokens: of a text, the policy's. Notes, of safe suffixes: copied (share), overlap (mean); of all:
    no-rewrite (share), unreadable/REASON.
    """

    tokens: Callable[[str], Sequence[int | str]]
    name: str = COPY
    mode: VerdictMode | None = None

    def check(self, encoder: ChatEncoder) -> None:
        """Nothing is asked."""

    def longest_call(self, sheet: Sheet) -> Call | None:
        """Nothing is asked."""
        return None

    async def score(self, sheet: Sheet, ask: Ask) -> CriterionScores:
        safe = rewriting_of(sheet).safe
        lost: Counter[str] = Counter()
        rewrites = read_rewrites(sheet, lost)
        copied = [float(is_copy(rewrite, sheet.original)) for rewrite in rewrites]
        notes: Metrics = {f"unreadable/{reason}": float(count) for reason, count in lost.items()}
        notes["no-rewrite"] = weighted([float(rewrite is None) for rewrite in rewrites], sheet)
        if safe:
            notes["copied"] = weighted(copied, sheet)
            original = self.tokens(sheet.original)
            shares = [0.0 if text is None else token_overlap(self.tokens(text), original) for text in rewrites]
            notes["overlap"] = weighted(shares, sheet)
        scores = tuple(value if safe else 0.0 for value in copied)
        return CriterionScores(scores, (int(safe),) * len(scores), notes=notes)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Of an unsafe suffix: half how far a rewrite is preferred to it, asked in both orders, half how safe the rewrite is; of a
    safe one 0, unasked (paper, equation 2). Notes: quality and safety, means.

    quality compares all pairs of what it is shown: of two texts in both orders.
    """

    quality: Pairwise
    safety: Pointwise
    name: str = REWRITE

    @property
    def mode(self) -> VerdictMode | None:
        """Of both judgements."""
        return self.quality.mode

    def check(self, encoder: ChatEncoder) -> None:
        """Raises EncodingError when one of its judgements cannot be asked in the judge's tokens."""
        self.quality.check(encoder)
        self.safety.check(encoder)

    def longest_call(self, sheet: Sheet) -> Call | None:
        """The comparison of the two longest texts, where there is one."""
        if rewriting_of(sheet).safe:
            return None
        return self.quality.longest_call(_about(sheet, [*sheet.candidates, sheet.original]))

    async def score(self, sheet: Sheet, ask: Ask) -> CriterionScores:
        if rewriting_of(sheet).safe:
            return CriterionScores((0.0,) * sheet.contenders, (0,) * sheet.contenders)
        rewrites = read_rewrites(sheet, Counter())
        texts = list(dict.fromkeys(rewrite for rewrite in rewrites if rewrite is not None))
        if not texts:
            return CriterionScores((0.0,) * sheet.contenders, (0,) * sheet.contenders)
        safety, *against = await asyncio.gather(
            self.safety.score(_about(sheet, texts), ask), *(self._against_original(sheet, text, ask) for text in texts)
        )
        quality = [result.scores[0] for result in against]
        votes = [result.votes[0] + count for result, count in zip(against, safety.votes, strict=True)]
        half = [None if q is None or s is None else (q + s) / 2 for q, s in zip(quality, safety.scores, strict=True)]
        places = [None if rewrite is None else texts.index(rewrite) for rewrite in rewrites]
        scores = tuple(0.0 if place is None else half[place] for place in places)
        asked = [safety, *against]
        missing = next((result.missing for result in asked if result.missing is not None), None)
        return CriterionScores(
            scores,
            tuple(0 if place is None else votes[place] for place in places),
            missing if None in scores else None,
            sum(result.planned for result in asked),
            sum(result.received for result in asked),
            values=tuple(() if score is None else (score,) for score in scores),
            notes={
                "quality": weighted([None if place is None else quality[place] for place in places], sheet),
                "safety": weighted([None if place is None else safety.scores[place] for place in places], sheet),
            },
        )

    async def _against_original(self, sheet: Sheet, text: str, ask: Ask) -> CriterionScores:
        """How far a rewrite is preferred to the suffix; to its equal not at all, unasked."""
        if is_copy(text, sheet.original):
            return CriterionScores((0.5, 0.5), (0, 0))
        return await self.quality.score(_about(sheet, [text, sheet.original]), ask)


@dataclass(frozen=True, slots=True)
class Similarity:
    """Whether the suffix that follows a thought says what the true one says, by a judge; 0 without the mark that ends the
    thought, or with nothing behind it. Notes: no-end-mark (share), thought-words (mean length of thoughts that ended).
    """

    judge: Pointwise
    name: str = SIMILARITY

    @property
    def mode(self) -> VerdictMode | None:
        """Of the judgement."""
        return self.judge.mode

    def check(self, encoder: ChatEncoder) -> None:
        """Raises EncodingError when it cannot be asked in the judge's tokens."""
        self.judge.check(encoder)

    def longest_call(self, sheet: Sheet) -> Call | None:
        """About the longest candidate, its thought included."""
        return self.judge.longest_call(sheet)

    async def score(self, sheet: Sheet, ask: Ask) -> CriterionScores:
        assert isinstance(sheet.label, Thinking), "--tasks thoughts has them"
        parts = [candidate.partition(sheet.label.end_mark) for candidate in sheet.candidates]
        texts = list(dict.fromkeys(suffix for _, _, suffix in parts if suffix.strip()))
        found = await self.judge.score(_about(sheet, texts), ask) if texts else CriterionScores((), ())
        places = [texts.index(suffix) if suffix.strip() else None for _, _, suffix in parts]
        scores = tuple(0.0 if place is None else found.scores[place] for place in places)
        notes: Metrics = {
            "no-end-mark": weighted([float(not mark) for _, mark, _ in parts], sheet),
            "thought-words": weighted([len(thought.split()) if mark else None for thought, mark, _ in parts], sheet),
        }
        return replace(
            found,
            scores=scores,
            votes=tuple(0 if place is None else found.votes[place] for place in places),
            missing=found.missing if None in scores else None,
            values=tuple(() if place is None else found.values[place] for place in places),
            notes=notes,
        )


def rewriting_of(sheet: Sheet) -> Rewriting:
    """What is known of the suffix that is rewritten."""
    assert isinstance(sheet.label, Rewriting), "--tasks rewrites has them"
    return sheet.label


def read_rewrites(sheet: Sheet, lost: Counter[str]) -> list[str | None]:
    """The candidates as `Rewriter` reads its model's answers, behind the words that these were started with.

    None where there is no rewrite in one: it is empty, refuses or reasons; `lost` counts these by reason.
    """
    rewrites: list[str | None] = []
    for candidate, copies in zip(sheet.candidates, sheet.counts, strict=False):
        text, problem = rewrite_in(candidate, sheet.prefix, sheet.original)
        if problem:
            lost[problem] += copies
        rewrites.append(None if problem else text)
    return rewrites


def rewrite_in(answer: str, prefix: str, suffix: str) -> tuple[str, str]:
    """(the rewrite in an answer, "") or ("", why there is none); see `read_rewrites`."""
    words = last_words(prefix)
    return read_rewrite([own_answer(answer, begun=bool(words))], prefix, suffix, words, start_required=False)


def is_copy(rewrite: str | None, suffix: str) -> bool:
    """Whether a rewrite is the suffix; white space around it apart, as for `Rewriter`."""
    return rewrite is not None and rewrite.strip() == suffix.strip()


def token_overlap(first: Sequence[int | str], second: Sequence[int | str]) -> float:
    """Tokens that two texts have in common, each as often as it is in both, over those of the longer one; 0 .. 1."""
    longest = max(len(first), len(second))
    return (Counter(first) & Counter(second)).total() / longest if longest else 1.0


def _about(sheet: Sheet, texts: Sequence[str]) -> Sheet:
    """The same task with other texts to judge."""
    kind: CandidateKind = "rollout"
    return replace(
        sheet,
        candidates=tuple(texts),
        kinds=(kind,) * len(texts),
        ended=frozenset(),
        pivot=None,
        apart=False,
        copies=(),
    )


def weighted(values: Sequence[float | None], sheet: Sheet) -> Mean:
    """The mean over all candidates, equal ones counted as often as they are there; None where there is nothing to count."""
    pairs = [(value, copies) for value, copies in zip(values, sheet.counts, strict=True) if value is not None]
    return Mean(sum(value * copies for value, copies in pairs), float(sum(copies for _, copies in pairs)))
