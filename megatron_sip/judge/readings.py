"""What a model wrote, read as what a call asked for: votes or texts. An unfinished answer is neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sip.judge.calls import Answer, GenerateCall
from megatron_sip.judge.reasoning import UNKNOWN, ReasoningStyle, own_answer
from megatron_sip.judge.verdicts import VerdictRule

Finish = Literal["finished", "cut", "aborted"]
"""How an answer ended: by itself, at its limit of tokens, or otherwise (aborted, filtered, a tool called)."""
_FINISHED = frozenset({"", "stop", "eos", "eos_token", "end_turn", "stop_sequence"})
_CUT = frozenset({"length", "max_tokens", "max_output_tokens", "model_length"})


@dataclass(frozen=True, slots=True)
class Written:
    """One text that a model wrote, and how it ended. `style`: of its reasoning; `begun`: we began the answer."""

    text: str
    finish: Finish = "finished"
    style: ReasoningStyle = UNKNOWN
    begun: bool = False


def finish_of(reason: Any) -> Finish:
    """From `finish_reason` as either protocol gives it: a word, a dict with a "type", or nothing, which is believed."""
    word = reason.get("type") if isinstance(reason, dict) else reason
    word = "" if word is None else str(word).casefold()
    return "finished" if word in _FINISHED else "cut" if word in _CUT else "aborted"


def read_written(call: GenerateCall, written: Sequence[Written], lost: Counter[str] | None = None) -> Answer:
    """Texts as the call wants them: verdict values, padded with missing votes up to n, or the answers' texts.

    None for an answer that cannot be read so; None instead of all when the server aborted all. `lost`, when given, is where
    these are also counted by reason.
    """
    lost = Counter() if lost is None else lost
    written = written[: call.n]
    if call.rule is None:
        texts = [_text(one, call.start != "", lost) for one in written]
        return None if _all_aborted(written) else texts
    votes = [read_vote(one, call.rule, lost) for one in written]
    return None if _all_aborted(written) else votes + [None] * (call.n - len(votes))


def read_vote(one: Written, rule: VerdictRule, lost: Counter[str] | None = None) -> float | None:
    """The value of the verdict that an answer ends with, if it came to its own end; see `read_written` on `lost`."""
    lost = Counter() if lost is None else lost
    answer = _answer(one, lost)
    if answer is None:
        return None
    if one.finish == "cut":  # what it would have said next is not known
        lost["cut"] += 1
        return None
    vote = rule.read(answer)
    if vote is None:
        lost["verdict-not-last" if rule.pattern.search(answer) else "no-verdict"] += 1
    return vote


def _all_aborted(written: Sequence[Written]) -> bool:
    return bool(written) and all(one.finish == "aborted" for one in written)


def _text(one: Written, start_known: bool, lost: Counter[str]) -> str | None:
    """The answer, also one that was cut if its start shows that it is no reasoning: only its beginning is used."""
    answer = _answer(one, lost)
    if answer is not None and one.finish == "cut" and not start_known:
        lost["cut"] += 1
        return None
    return answer


def _answer(one: Written, lost: Counter[str]) -> str | None:
    if one.finish == "aborted":
        lost["aborted"] += 1
        return None
    answer = own_answer(one.text, one.style, begun=one.begun)
    if answer is None:
        lost["in-reasoning"] += 1
    return answer
