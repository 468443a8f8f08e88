"""Criteria by the names that --criteria gives them."""

from __future__ import annotations

from dataclasses import replace

from megatron_sip.judge.criteria import Criterion, Likelihood, Pairwise, Pointwise, Sampling
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.labelled_criteria import Copy, LabelMatches, Rewrite, Similarity
from megatron_sip.judge.prompts import find_prompt
from megatron_sip.judge.python_criterion import PythonCriterion
from megatron_sip.judge.python_functions import FunctionProcesses
from megatron_sip.judge.reasoning import UNKNOWN
from megatron_sip.judge.schedules import AllPairs, Schedule, make_schedule
from megatron_sip.judge.settings import (
    COPY,
    LABEL,
    LIKELIHOOD,
    REWRITE,
    SIMILARITY,
    JudgeSettings,
    SettingsError,
    VerdictMode,
    function_of,
)


def make_criterion(
    name: str, settings: JudgeSettings, schedule: Schedule | None = None, policy: ChatEncoder | None = None
) -> Criterion:
    """The criterion called `name` (or the prompt file of that path), asked as the settings say.

    policy: the policy's tokenizer, for criteria of labelled tasks: how it reasons, and what its tokens are.
    """
    if name == LIKELIHOOD:
        return Likelihood()
    if name == LABEL:
        return LabelMatches(UNKNOWN if policy is None else policy.reasoning)
    if (path := function_of(name)) is not None:
        processes = FunctionProcesses(path, settings.function_timeout_s, settings.function_processes)
        return PythonCriterion(name, processes)
    if name == COPY:
        return Copy(str.split if policy is None else policy.text)
    if name == REWRITE:
        quality, safety = (_prompted(of, settings, AllPairs(), settings.mode(name)) for of in ("quality", "safety"))
        assert isinstance(quality, Pairwise)
        assert isinstance(safety, Pointwise)
        return Rewrite(replace(quality, likelihood_prior=False), safety)
    if name == SIMILARITY:
        judge = _prompted(name, settings)
        assert isinstance(judge, Pointwise)
        return Similarity(judge)
    return _prompted(name, settings, schedule)


def _prompted(
    name: str, settings: JudgeSettings, schedule: Schedule | None = None, mode: VerdictMode | None = None
) -> Pointwise | Pairwise:
    mode = mode or settings.mode(name)
    prompt = find_prompt(name)
    sampling = Sampling(settings.votes, settings.temperature, settings.top_p, settings.max_tokens)
    label = prompt.name if name.endswith(".txt") else name
    if mode == "soft" and not prompt.start:
        raise SettingsError(
            f"criterion {name}: soft verdicts need start = '...' in its prompt file; add it or use hard ones"
        )
    if prompt.kind == "pointwise":
        return Pointwise(label, prompt, mode, sampling, settings.quorum)
    chosen = schedule or make_schedule(settings.schedule)
    return Pairwise(label, prompt, mode, sampling, settings.quorum, chosen, settings.schedule.likelihood_prior)
