"""The two protocols a judge's server may speak: requests from calls, answers from responses. Pure functions.

A response of an unexpected shape raises BadResponseError: it is retried, and never becomes a verdict.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from megatron_sip.judge.calls import Answer, Call, ChoiceCall, GenerateCall, LikelihoodCall
from megatron_sip.judge.dialect import TOP_LOGPROBS
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.openai_reply import choices_of, content_of, tokens_of, usage_of
from megatron_sip.judge.readings import Written, finish_of, read_vote, read_written
from megatron_sip.judge.reasoning import UNKNOWN, ReasoningStyle
from megatron_sip.judge.settings import Endpoint
from megatron_sip.judge.verdicts import VerdictRule
from megatron_sip.serving.failures import readable
from megatron_sip.serving.sglang_wire import Result, generate_body, logprob, read_results

OPENAI_PATH = "/v1/chat/completions"


def answer_tokens(call: Call, endpoint: Endpoint) -> int:
    """The most tokens that a server may generate for a call: its answer, and reasoning where there may be any."""
    if isinstance(call, LikelihoodCall):
        return 0
    if isinstance(call, ChoiceCall):
        if endpoint.kind == "sglang":
            return 1
        if endpoint.prefill:
            return 3  # the label may follow white space of its own
    begun = isinstance(call, GenerateCall) and call.start != "" and endpoint.continues_answers
    return call.max_tokens if begun else call.max_tokens + endpoint.reasoning_tokens


# ---- SGLang, native -------------------------------------------------------------------------------------------------


def sglang_body(calls: Sequence[Call], encoder: ChatEncoder, endpoint: Endpoint) -> dict[str, Any]:
    """One batch request for calls of one kind and the same sampling."""
    first = calls[0]
    if isinstance(first, LikelihoodCall):
        start = encoder.document_start()
        prefixes = [start + encoder.text(call.prompt[0]) for call in calls]
        prompts = [ids + likelihood_ids(call, encoder) for ids, call in zip(prefixes, calls, strict=True)]
        places = [max(len(ids) - 1, 0) for ids in prefixes]
        return generate_body(prompts, {"max_new_tokens": 0, "temperature": 0.0}, logprobs_from=places)
    if isinstance(first, ChoiceCall):
        _, label_ids = encoder.choices(first.rule.start, first.rule.labels)
        prompts = [prompt_ids(call, encoder, endpoint.answer_prefix) for call in calls]
        sampling = {"max_new_tokens": 1, "temperature": 1.0, "ignore_eos": True}
        return generate_body(prompts, sampling, logprobs_of=[label_ids] * len(calls))
    prompts = [prompt_ids(call, encoder, endpoint.answer_prefix) for call in calls]
    sampling = {
        "n": first.n,
        "max_new_tokens": answer_tokens(first, endpoint),
        "temperature": first.temperature,
        "top_p": first.top_p,
        # Marks of reasoning channels are special tokens; the parser needs to see them.
        "skip_special_tokens": not (endpoint.reasoning_tokens or encoder.reasoning.special_marks),
    }
    return generate_body(prompts, sampling)


def prompt_ids(call: Call, encoder: ChatEncoder, answer_prefix: str = "") -> list[int]:
    """What the model goes on from when it is asked for a judgement or a text: also what a judge in training is given."""
    assert not isinstance(call, LikelihoodCall)
    if isinstance(call, ChoiceCall):
        context, _ = encoder.choices(call.rule.start, call.rule.labels)
        return encoder.chat(call.prompt, answer_prefix) + context
    return encoder.chat(call.prompt, answer_prefix if call.start else None, call.start)


def likelihood_ids(call: Call, encoder: ChatEncoder) -> list[int]:
    """The tokens whose log-probs a likelihood call is about."""
    assert isinstance(call, LikelihoodCall)
    return encoder.continuation(call.prompt[1], ended=call.ended)


def sglang_answers(
    calls: Sequence[Call], encoder: ChatEncoder, response: Any, lost: Counter[str] | None = None
) -> tuple[list[Answer], int, int]:
    """Answers in the order of `calls`, prompt tokens, generated tokens; `lost` counts unreadable answers by reason.

    Raises BadResponseError.
    """
    copies = calls[0].n if isinstance(calls[0], GenerateCall) else 1
    answers: list[Answer] = []
    with readable():
        results = read_results(response, copies * len(calls))
        for place, call in enumerate(calls):
            own = results[place * copies : (place + 1) * copies]
            if isinstance(call, GenerateCall):
                answers.append(read_written(call, [_sglang_written(call, encoder, one) for one in own], lost))
            elif finish_of(own[0].finish_reason) == "aborted":
                answers.append(None)
                if lost is not None:
                    lost["aborted"] += 1
            elif isinstance(call, ChoiceCall):
                _, label_ids = encoder.choices(call.rule.start, call.rule.labels)
                answers.append(call.rule.expected_value(own[0].first_logprobs(label_ids)))
            else:
                answers.append(_sglang_likelihood(call, encoder, own[0]))
        usage = [usage_of({"usage": result.meta}) for result in results]
    return answers, sum(prompt for prompt, _ in usage), sum(generated for _, generated in usage)


def _sglang_written(call: GenerateCall, encoder: ChatEncoder, result: Result) -> Written:
    text, finish = result.text, finish_of(result.finish_reason)
    if not isinstance(text, str):
        text, finish = "", "aborted"
    return Written(text, finish, encoder.reasoning, begun=call.start != "")


def _sglang_likelihood(call: LikelihoodCall, encoder: ChatEncoder, result: Result) -> float | None:
    found = result.prompt_logprobs(likelihood_ids(call, encoder))
    values = [value for value in found if value is not None]
    return math.fsum(values) / len(values) if values else None


# ---- OpenAI-compatible ----------------------------------------------------------------------------------------------


def openai_body(call: GenerateCall | ChoiceCall, endpoint: Endpoint) -> dict[str, Any]:
    """One chat completion; a soft verdict is forced where the server continues a started answer, else generated.

    Parameters at their defaults are left out: some servers refuse them even so.
    """
    messages = [{"role": "user", "content": "".join(call.prompt)}]
    body: dict[str, Any] = {"model": endpoint.model, "messages": messages, "max_tokens": answer_tokens(call, endpoint)}
    if isinstance(call, ChoiceCall):
        start = call.rule.start
        body |= {"temperature": 1.0, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
    else:
        start = call.start
        body["temperature"] = call.temperature
        if call.top_p != 1:
            body["top_p"] = call.top_p
        if call.n != 1:
            body["n"] = call.n
    return body | _continued(messages, start) if start and endpoint.prefill else body


def _continued(messages: list[dict[str, str]], start: str) -> dict[str, Any]:
    return {
        "messages": [*messages, {"role": "assistant", "content": start.rstrip()}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }


def openai_answer(
    call: GenerateCall | ChoiceCall,
    endpoint: Endpoint,
    response: Any,
    style: ReasoningStyle = UNKNOWN,
    lost: Counter[str] | None = None,
    asked: int | None = None,
) -> tuple[Answer, int, int]:
    """Answer, prompt tokens, generated tokens. Fewer choices than `n` are missing votes. Raises BadResponseError.

    style: of the model's reasoning, where its tokenizer is known. lost: where unreadable answers are counted by reason.
    asked: choices that the request asked for, by default the call's `n`; what a server gives beyond them is not read.
    """
    with readable():
        choices, usage = choices_of(response)[:asked], usage_of(response)
        answer: Answer
        if isinstance(call, GenerateCall):
            answer = read_written(call, [_openai_written(call, endpoint, c, style) for c in choices], lost)
        else:
            answer = _openai_choice(call, endpoint, choices[0], style, lost)
    return answer, *usage


def _openai_written(
    call: GenerateCall | ChoiceCall, endpoint: Endpoint, choice: dict[str, Any], style: ReasoningStyle
) -> Written:
    """A choice's content; a server that has put the reasoning elsewhere leaves none in it."""
    message = choice["message"]
    apart = message.get("reasoning_content") or message.get("reasoning") or style.harmony
    begun = isinstance(call, GenerateCall) and call.start != "" and endpoint.prefill
    return Written(content_of(choice), finish_of(choice.get("finish_reason")), UNKNOWN if apart else style, begun)


def _openai_choice(
    call: ChoiceCall, endpoint: Endpoint, choice: dict[str, Any], style: ReasoningStyle, lost: Counter[str] | None
) -> float | None:
    tokens = tokens_of(choice)
    written = _openai_written(call, endpoint, choice, style)
    if not endpoint.prefill:
        return _generated_choice(call.rule, read_vote(written, call.rule, lost), tokens)
    if written.finish == "aborted":
        if lost is not None:
            lost["aborted"] += 1
        return None
    return _first_choice(call.rule, tokens) if tokens else call.rule.begun(written.text)


def _first_choice(rule: VerdictRule, tokens: Sequence[dict[str, Any]]) -> float | None:
    """The expected value at the first token that is more than white space."""
    token = next((token for token in tokens if token["token"].strip()), None)
    return None if token is None else rule.expected_value(label_logprobs(rule, token["top_logprobs"]))


def _generated_choice(rule: VerdictRule, hard: float | None, tokens: Sequence[dict[str, Any]]) -> float | None:
    """The expected value where the verdict that a generated answer ends with begins; without log-probs, its value `hard`."""
    if hard is None or not tokens:
        return hard
    ends = list(accumulate(len(token["token"]) for token in tokens))
    matches = list(rule.pattern.finditer("".join(token["token"] for token in tokens)))
    if not matches:
        return hard
    place = bisect_right(ends, matches[-1].start(1))
    soft = rule.expected_value(label_logprobs(rule, tokens[place]["top_logprobs"]))
    return hard if soft is None else soft


def label_logprobs(rule: VerdictRule, top: Sequence[dict[str, Any]]) -> list[float]:
    """Log-prob of each label: the probabilities of all listed tokens that begin it, added up; -inf when none does."""
    masses = dict.fromkeys(rule.labels, 0.0)
    for entry in top:
        token = entry["token"].strip().casefold()
        matching = [label for label in rule.labels if token and label.casefold().startswith(token)]
        if len(matching) == 1:
            masses[matching[0]] += math.exp(logprob(entry["logprob"]))
    return [math.log(mass) if mass > 0 else -math.inf for mass in masses.values()]
