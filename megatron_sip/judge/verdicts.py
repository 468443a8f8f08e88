"""Verdicts: what counts as a judge's decision, and how it is read from the judge's own output.

A verdict is read from the answer alone, never from the prompt or from reasoning, and only where the answer ends with it:
a phrase that is quoted or weighed on the way is none. None is a missing vote. Nothing here turns an error or an unreadable
answer into a number, and all of it takes time proportional to the answer's length, whatever stands in it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sip.judge.reasoning import own_answer

MIN_VERDICT_MASS = 1e-3
"""A soft verdict needs this much probability on the verdict tokens together; with less, the judge did not answer."""
_READ_CHARS = 32_000
"""Of a longer answer the end is read."""
_OBJECTS_TRIED = 16
"""Opening braces from which the JSON object at an answer's end is looked for, last first."""

_TAGS = re.compile(r"</?\w{1,30}>|<[|｜][^<>|｜\n]{1,60}[|｜]>")
_HESITATION = re.compile(r"\?|…|\.\.\.")
# What may follow a verdict on its line: what it is out of, a reason; then marks and punctuation.
_REST_OF_LINE = re.compile(
    r"(?:[^\w(/]|_)*+(?:(?:/|out of|of)\s*+\d{1,5}(?!\w)|points?|stars?|percent)?(?:[^\w(/]|_)*+"
    r"(?:\((?![^()\n]{0,300}\b(?:unless|maybe|perhaps|wait|rejected|tie with|(?:not |un)sure)\b)[^()\n]{1,300}\)"
    r"|(?:because|since|is (?:the |an? |clearly |slightly )*(?:better|best|stronger|superior|more|preferred))\b[^.!;\n]{0,500}"
    r"|(?<=[,:–—-] )"
    r"(?![^.!;\n]{0,300}\b(?:or|but|however|though|unless|if|wait|let|maybe|perhaps|would|could|should|must"
    r"|not (?:sure|certain|clear|quite|really|yet))\b|[^.!;\n]{0,300}\bnot\W*$)"
    r"[^.!;\n]{1,300})?[\W_]*+",
    re.IGNORECASE,
)
_FAREWELL = re.compile(
    r"(?:i )?hope (?:this|that|it) helps(?: you)?|thanks?(?: you)?|end(?: of (?:\w+ ){0,2}\w+)?|done"
    r"|(?:please )?let me know if .{1,80}|feel free to .{1,80}",
    re.IGNORECASE,
)
# A note below a verdict, under a title that says so, and words in it that take the verdict back.
_NOTE = re.compile(
    r"[\W_]*+(?:reason(?:s|ing)?|rationale|explanation|justification|notes?|confidence(?: level| score)?)[\s*_]*[:：]",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\b(?:wait|actually|sorry|correct(?:ion|ed)|hmm|on (?:second thought|reflection)|let me|re-?read|change)\b",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"[.!?:：;,()\[\]{}|>—–]| - ")
_WORD = re.compile(r"[^\W_](?:[^\W_]|['’])*")
_LEAD_IN = re.compile(
    r"therefore|thus|so|hence|then|and|accordingly|consequently|finally|overall|i|conclude|choose|pick|my|our|the|this"
    r"|final|answer|verdict|decision|choice|conclusion|judge?ment|rating|is",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"not|never|no|neither|nor|isn['’]t|cannot", re.IGNORECASE)
_CONNECTIVE = re.compile(r"or|and|nor|either|else|otherwise|versus|vs|then|with|\w", re.IGNORECASE)
"""Words between alternatives; one letter or digit counts them up ("2. ...", "b) ...")."""
_CORRECTION = re.compile(
    r"[.!?…]\s|\b(?:no|wait|actually|rather|instead|sorry|correction|corrected|hmm|thought|reflection)\b", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class VerdictRule:
    """How one criterion's verdicts look and what they are worth.

    `pattern` has one group, whose text (case ignored) is a key of `values`. `start` is what a soft verdict forces the
    answer to begin with; the keys of `values` are its possible continuations. `anywhere`: the last match counts wherever
    it stands, for judges that give their reasons after the verdict.
    """

    pattern: re.Pattern[str]
    values: Mapping[str, float]
    start: str = ""
    anywhere: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.values)

    def parse(self, output: str) -> float | None:
        """The value of the verdict that a judge's output ends with, None when it does not; of a model about which nothing
        is known (see `own_answer`)."""
        answer = own_answer(output)
        return None if answer is None else self.read(answer)

    def read(self, answer: str) -> float | None:
        """The value of the verdict that an answer, free of reasoning, ends with; None when it does not."""
        found = self._label(answer[-_READ_CHARS:])
        if found is None:
            return None
        return next((value for label, value in self.values.items() if label.casefold() == found.casefold()), None)

    def begun(self, continuation: str) -> float | None:
        """The value of the label that an answer begun with `start` goes on with, whatever comes then; None when with none."""
        text = continuation.lstrip(" \t\r\n\"'*_`").casefold()
        found = [
            value for label, value in self.values.items() if re.match(rf"{re.escape(label.casefold())}(?![^\W_])", text)
        ]
        return found[0] if len(found) == 1 else None

    def _label(self, answer: str) -> str | None:
        matches = list(self.pattern.finditer(answer))
        if not matches or self.anywhere:
            return matches[-1][1] if matches else None
        previous, last = (matches[-2] if len(matches) > 1 else None), matches[-1]
        since = previous.end() if previous else 0
        if previous and previous[1].casefold() != last[1].casefold() and _alternatives(answer[since : last.start()]):
            return None
        members = [label for member in _last_object(answer) for label in self.pattern.findall(member)]
        if members:
            return members[-1]
        ends = self._ends(answer, last) or _is_first_member(last, answer)
        return last[1] if ends and _is_stated(last, answer, since) else None

    def _ends(self, answer: str, verdict: re.Match[str]) -> bool:
        """Whether the answer ends with a verdict, and not with several: "1/2". On a scale, 4/5 and 4 out of 5 are 4."""
        tail = answer[verdict.end() :]
        scale = len(self.values) > 2 and all(label.isdigit() for label in self.values)
        return _is_end(tail) and (scale or not _names_another(tail, verdict, self.labels))

    def expected_value(self, label_logprobs: Sequence[float]) -> float | None:
        """Probability-weighted value of the labels (natural log-probs in the order of `labels`); None below
        `MIN_VERDICT_MASS`."""
        masses = [math.exp(logprob) for logprob in label_logprobs]
        total = sum(masses)
        if not math.isfinite(total) or total < MIN_VERDICT_MASS:
            return None
        return sum(mass * value for mass, value in zip(masses, self.values.values(), strict=True)) / total


def _is_end(tail: str) -> bool:
    """Whether nothing but an ending follows a verdict: punctuation, marks, a reason on its line, a polite formula, a note."""
    tail = _TAGS.sub("", tail)
    if _HESITATION.search(tail):
        return False
    line, _, rest = tail.partition("\n")
    if not _REST_OF_LINE.fullmatch(line):
        return False
    words = _WORD.findall(rest)
    if not words or _FAREWELL.fullmatch(" ".join(words[:20])):
        return True
    return bool(_NOTE.match(rest)) and not _TAKEN_BACK.search(rest)


def _names_another(tail: str, verdict: re.Match[str], labels: Sequence[str]) -> bool:
    """Whether what follows a verdict on its line is nothing but another one: "1/2", "1 (or 2)", "1, no, Option 2"."""
    others = {label.casefold() for label in labels} - {verdict[1].casefold()}
    known = set(_WORD.findall(verdict[0].casefold()))
    line = _WORD.findall(tail.partition("\n")[0].casefold())
    words = [w for w in line if w in others or not (w in known or w == "no" or _CONNECTIVE.fullmatch(w))]
    return bool(words) and others.issuperset(words)


def _is_first_member(verdict: re.Match[str], answer: str) -> bool:
    """Whether a verdict is the first member of a JSON object that ends the answer, perhaps with an error in it."""
    after = answer[verdict.end() :].strip("`\n\r\t ")
    return verdict[0].startswith('"') and after.startswith(",") and after.endswith("}")


def _is_stated(verdict: re.Match[str], answer: str, since: int) -> bool:
    """Whether a verdict with a mark ("Conclusion:") is said, not spoken about: it begins its line or its clause, but for a
    word or words such as "my answer is". Patterns without such a mark are meant to be found in running text."""
    if not re.search("[:：]", answer[verdict.start() : verdict.start(1)]) or verdict[0].startswith('"'):
        return True
    line_start = max(answer.rfind("\n", 0, verdict.start()) + 1, since)
    clause = _CLAUSE_END.split(answer[line_start : verdict.start()])[-1]
    words = _WORD.findall(clause)
    if any(map(_NEGATION.fullmatch, words)):
        return False
    return len(words) <= 1 or all(map(_LEAD_IN.fullmatch, words))


def _alternatives(between: str) -> bool:
    """Whether two different verdicts with this between them are a choice that is still open, not a change of mind."""
    if all(map(_CONNECTIVE.fullmatch, _WORD.findall(between))):
        return True
    return "\n" not in between and not _CORRECTION.search(between)


def _last_object(answer: str) -> list[str]:
    """The members of the JSON object that an answer ends with, each as `"name": value`; none when it ends otherwise."""
    end = answer.rfind("}") + 1
    if not end or _WORD.search(answer, end):
        return []
    start = end
    for _ in range(_OBJECTS_TRIED):
        start = answer.rfind("{", 0, start)
        if start < 0:
            break
        try:
            members, stop = _DECODER.raw_decode(answer, start)
        except (ValueError, RecursionError):
            continue
        if stop == end:
            return [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in members]
    return []


def _pairs(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return pairs


_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_pairs)


def unanimous(votes: Sequence[float | None], count: int = 8) -> float | None:
    """The common value of `count` votes when all of them agree, else None (paper section 3.1: data filtering)."""
    if len(votes) < count or any(vote is None or vote != votes[0] for vote in votes):
        return None
    return votes[0]
