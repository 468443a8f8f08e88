"""What a run does and what it will cost, from its flags alone: `python -m megatron_sip.train ... --dry-run`.

All figures are upper bounds: full prefixes, full-length continuations, no identical candidates, no cached verdict,
answers as long as allowed; but neither missing verdicts, which are asked for once more, nor audits are foreseen.
Judgements are counted as the paper counts them: one verdict about one candidate or pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from megatron_sip.config.needs import branch_count, branches_in_a_row, candidate_count, contender_count
from megatron_sip.config.settings import Settings
from megatron_sip.judge.prompts import PromptFile, builtin_prompt, read_prompt_file
from megatron_sip.judge.rewriter import REWRITE_ROOM
from megatron_sip.judge.schedules import SMALL_GROUP, make_schedule, planned_pairs, votes_in_orders
from megatron_sip.judge.settings import LIKELIHOOD, REWRITE, JudgeSettings, ScheduleSettings, asks_server, is_pairwise
from megatron_sip.records import CandidateKind

CHARACTERS_PER_TOKEN = 4
"""Of the instructions in prompt files; texts are counted in the policy's tokens."""

REWRITE_START_TOKENS = 8
"""About the five words that a rewrite's answer is started with, shown twice in its prompt."""

Cost = dict[str, int]
"""Name of a quantity, with its unit, -> how much of it; adds up."""


def describe(settings: Settings) -> str:
    """The text that --dry-run prints."""
    judge = _judge(settings, settings.judge) if settings.judge is not None and settings.needs.scores else ["none"]
    facts = [
        *(("tasks", line) for line in _labelled(settings)),
        ("objective", _objective(settings)),
        ("candidates", "; ".join(filter(None, (_candidates(settings), _ends(settings))))),
        *(("judge", line) for line in judge),
        ("schedule", _schedule(settings)),
        ("rows", _rows(settings)),
    ]
    if settings.held_out.prompts:
        facts.append(
            ("at the end", f"{settings.held_out.prompts:,} held-out prefixes: trained against initial policy, judged")
        )
    if settings.judge is not None and (limit := _rate_limit(settings, settings.judge)):
        facts.append(("at least", limit))
    lines = ["What this run does", *(f"  {name:<11} {text}" for name, text in facts)]
    lines += ["", "What it costs at most", *_table(settings)]
    return "\n".join(lines) + "\n"


def prompt_cost(settings: Settings, present: Sequence[CandidateKind] | None = None) -> Cost:
    """What one prompt (task) costs with candidates of the kinds that are `present`, by default all of the run; of one that
    is replayed nothing is made or judged."""
    needs, rollouts = settings.needs, settings.experience.sampling.n
    kinds = () if needs.replays else needs.kinds if present is None else present
    prefix, suffix = _lengths(settings)
    cost: Cost = {}
    if "rollout" in kinds:
        cost["rollout tokens, prefilled"] = prefix
        cost["rollout tokens, generated"] = rollouts * suffix
    if "rewrite" in kinds:
        cost["rewriter calls"] = 1
        assert settings.rewriter is not None
        instructions = _instruction_tokens(settings.rewriter.prompt)
        cost["rewriter tokens, prompt"] = instructions + prefix + suffix + 3 * REWRITE_START_TOKENS
        cost["rewriter tokens, answer"] = REWRITE_ROOM * suffix + _rewriter_reasoning(settings)
    if needs.scores and not needs.replays and settings.judge is not None:
        judge = settings.judge
        count = contender_count(kinds, rollouts if "rollout" in kinds else 0, judge.schedule)
        costs = add_costs(criterion_cost(name, judge, count, prefix, suffix) for name in judge.criteria)
        cost |= dict(sorted(costs.items(), key=lambda item: not item[0].endswith("judgements")))
    branches = branch_count(settings.objective.objective, rollouts)
    rows = -(-branches // _branches_in_a_row(settings))
    examples, control = _control(settings)
    packed = examples * (rows * (control + prefix) + branches * suffix)
    cost["training tokens, packed"] = packed
    cost["training tokens, unpacked"] = examples * branches * (control + prefix + suffix)
    if settings.objective.needs_reference:
        cost["reference tokens, packed"] = packed
    return cost


def _lengths(settings: Settings) -> tuple[int, int]:
    """Tokens of the longest prefix, and of its suffix."""
    tasks, labelled = settings.data.tasks, settings.data.labelled
    longest = tasks.seq_length - tasks.suffix_length if labelled is None else labelled.max_prompt
    return longest, tasks.suffix_length


def _control(settings: Settings) -> tuple[int, int]:
    """(examples of a prompt at most, tokens of the control text before each)"""
    control = settings.experience.selection.control
    return (1, 0) if control is None else (2, -(-control.room // CHARACTERS_PER_TOKEN))


def _branches_in_a_row(settings: Settings) -> int:
    rollouts = settings.experience.sampling.n
    return branches_in_a_row(settings.objective.objective, rollouts, settings.branches_per_row)


def _rewriter_reasoning(settings: Settings) -> int:
    """Tokens for reasoning before a rewrite; none where the server goes on from the start that we give."""
    assert settings.rewriter is not None
    endpoint = settings.rewriter.client.endpoint
    return 0 if endpoint.continues_answers else endpoint.reasoning_tokens


def criterion_cost(name: str, settings: JudgeSettings, count: int, prefix: int, suffix: int) -> Cost:
    """What one criterion asks about `count` candidates that compete, of `suffix` tokens after `prefix` tokens.

    Requests are HTTP calls, which ask for all votes of a judgement at once; with a warm prefix cache the server computes the
    instructions and the prefix only once a prompt.
    """
    if not asks_server(name):
        return {}
    if name == REWRITE:
        return _rewrite_cost(settings, count, prefix, suffix)
    if name == LIKELIHOOD:
        requests, kind = count, "likelihood judgements"
        judgements, answer, shown, once = count, 0, suffix, prefix
    else:
        prompt = read_prompt_file(Path(name)) if name.endswith(".txt") else builtin_prompt(name)
        pairwise = prompt.kind == "pairwise"
        kind = "pair judgements" if pairwise else "point judgements"
        judgements, requests = (_pairwise if pairwise else _pointwise)(settings, name, count)
        answer = judgements * _written_tokens(settings, name)
        shown = 2 * suffix if pairwise else suffix
        once = (
            _instruction_tokens(prompt) + prefix * ("prefix" in prompt.slots) + suffix * ("reference" in prompt.slots)
        )
    return {
        kind: judgements,
        "judge requests": requests,
        "judge tokens, prompts": requests * (once + shown),
        "judge tokens, uncached": (once if requests else 0) + requests * shown,
        "judge tokens, answers": answer,
    }


def _rewrite_cost(settings: JudgeSettings, count: int, prefix: int, suffix: int) -> Cost:
    """Of rewrites of an unsafe suffix: each is compared with it in both orders, and is it safe?"""
    mode = settings.mode(REWRITE)
    judge = replace(
        settings,
        criteria={"quality": 1.0, "safety": 1.0},
        schedule=ScheduleSettings("all_pairs"),
        verdicts={"quality": mode, "safety": mode},
    )
    compared = _times(criterion_cost("quality", judge, 2, prefix, suffix), count)
    return add_costs([compared, criterion_cost("safety", judge, count, prefix, suffix)])


def _pairwise(settings: JudgeSettings, name: str, count: int) -> tuple[int, int]:
    """(judgements, requests); each order of the two options is a request of its own."""
    texts = count + settings.schedule.pivot_apart
    orders = votes_in_orders(
        make_schedule(settings.schedule), texts, soft=settings.mode(name) == "soft", votes=settings.votes
    )
    pairs = planned_pairs(settings.schedule, texts)
    return pairs * sum(orders), pairs * sum(votes > 0 for votes in orders)


def _pointwise(settings: JudgeSettings, name: str, count: int) -> tuple[int, int]:
    """(judgements, requests)"""
    return count * (settings.votes if settings.mode(name) == "hard" else 1), count


def _written_tokens(settings: JudgeSettings, name: str) -> int:
    """The most that a judge writes for one verdict; 0 where the verdict's probability is read without an answer."""
    assert settings.client is not None
    endpoint = settings.client.endpoint
    if settings.mode(name) == "soft" and endpoint.continues_answers:
        return 0
    return settings.max_tokens + endpoint.reasoning_tokens


def _instruction_tokens(prompt: PromptFile) -> int:
    return sum(map(len, prompt.body[::2])) // CHARACTERS_PER_TOKEN


def add_costs(costs: Iterable[Cost]) -> Cost:
    """The quantities of several costs together."""
    total: Cost = {}
    for cost in costs:
        for name, value in cost.items():
            total[name] = total.get(name, 0) + value
    return total


def run_cost(settings: Settings) -> Cost:
    """What the whole run costs: each of its phases has its own kinds of candidates."""
    run, steps = settings.run, settings.experience.kind_steps
    phases = pairwise([*(step for step in steps.phases() if step < run.steps), run.steps])
    return add_costs(
        _times(step_cost(settings, prompt_cost(settings, settings.experience.kinds_at(first))), end - first)
        for first, end in phases
    )


def step_cost(settings: Settings, prompt: Cost) -> Cost:
    """What a step costs of prompts that cost `prompt`: rounds asked for beyond the first are made and judged, not trained."""
    prompts, rounds = settings.run.prompts, settings.run.oversample
    return {
        name: value * prompts * (1 if name.startswith(("training", "reference")) else rounds)
        for name, value in prompt.items()
    }


def _times(cost: Mapping[str, int], factor: int) -> Cost:
    return {name: factor * value for name, value in cost.items()}


def _table(settings: Settings) -> list[str]:
    prompt, run = prompt_cost(settings), run_cost(settings)
    step = step_cost(settings, prompt)
    width = max(map(len, run))
    columns = [("a prompt", prompt), ("a step", step), (f"{settings.run.steps:,} steps", run)]
    lines = ["  " + " " * width + "".join(f"{title:>20}" for title, _ in columns)]
    lines += [f"  {name:<{width}}" + "".join(f"{cost.get(name, 0):>20,}" for _, cost in columns) for name in prompt]
    ratio = prompt["training tokens, packed"] / prompt["training tokens, unpacked"]
    if ratio < 1:
        lines.append(f"  Packed, with the prefix shared by its branches, training takes {ratio:.0%} of the tokens.")
    return lines


def _labelled(settings: Settings) -> list[str]:
    """What labelled tasks the run has."""
    labelled = settings.data.labelled
    if labelled is None:
        return []
    text = f"labelled {labelled.kind}, prompts of up to {labelled.max_prompt:,} tokens"
    if labelled.kind == "judgements":
        modes = {"": labelled.default_verdict, **labelled.verdicts}
        ways = {"soft": "begun up to the verdict's first token", "hard": "written"}
        text += "; answers " + ", ".join(f"{ways[mode]}{f' for {name}' * bool(name)}" for name, mode in modes.items())
    return [text]


def _objective(settings: Settings) -> str:
    objective, selection = settings.objective, settings.experience.selection
    if objective.objective == "sft":
        document = selection.sft_target == "document"
        return "NLL of every token" if document else f"NLL of the {selection.sft_target}"
    if objective.objective == "rf-nll":
        control = selection.control
        if control is None:
            return "RF-NLL: NLL of the best-judged candidate"
        return (
            f"RF-NLL: NLL of the best candidate with {control.criterion} >= {control.threshold:g} behind {control.good!r}, "
            f"and of the worst below behind {control.bad!r}"
        )
    if objective.objective == "grpo":
        return _grpo(settings)
    roles = "best against worst candidate"
    if selection.fixed_roles is not None:
        roles = f"chosen {selection.fixed_roles[0]}, rejected {selection.fixed_roles[1]}"
    return f"online DPO, {roles}; beta {objective.beta:g}, reference {_reference(settings)}"


def _grpo(settings: Settings) -> str:
    objective, selection = settings.objective, settings.experience.selection
    lengths = {
        "token": "mean over all tokens",
        "sequence": "mean over each rollout's tokens, then over rollouts",
        "constant": f"sum over each rollout's tokens / {objective.grpo_constant}, then mean over rollouts",
    }
    facts = [
        "GRPO: score minus mean of its group" + (", divided by its spread" if selection.spread_normalization else ""),
        lengths[objective.grpo_length],
        f"KL {objective.kl_coef:g}, reference {_reference(settings)}" if objective.needs_reference else "no KL",
        f"mismatch correction {objective.mismatch_correction}",
        f"rollouts cut at {settings.experience.sampling.max_new_tokens} tokens: {selection.truncated}",
    ]
    if settings.run.oversample > 1:
        facts.append(f"up to {settings.run.oversample} rounds of tasks a step until all groups have a spread")
    return "; ".join(facts)


def _reference(settings: Settings) -> str:
    interval = settings.reference.update_interval
    return f"refreshed every {interval} steps" if interval else "frozen"


def _candidates(settings: Settings) -> str:
    kinds, sampling = settings.needs.kinds, settings.experience.sampling
    if settings.experience.selection.sft_target == "document" and settings.objective.objective == "sft":
        return f"the documents themselves, up to {settings.data.tasks.seq_length:,} tokens of one"
    rollouts = "1 rollout" if sampling.n == 1 else f"{sampling.n} rollouts"
    names = [rollouts if kind == "rollout" else kind for kind in kinds]
    text = f"{' + '.join(names)} = {candidate_count(kinds, sampling.n)} a prompt, {sampling.max_new_tokens} tokens each"
    if "rollout" not in kinds:
        return text
    first = settings.experience.kind_steps.rollout_start
    start = f", from step {first}" if first else ""
    start += ", by the weights before the last update" if settings.run.max_staleness else ""
    return f"{text}; rollouts at T={sampling.temperature:g}, top-p {sampling.top_p:g}{start}"


def _ends(settings: Settings) -> str:
    """Up to which step suffix and rewrite take part, where that is not for ever."""
    steps, kinds = settings.experience.kind_steps, settings.needs.kinds
    ends = (("suffix", steps.suffix_end), ("rewrite", steps.rewrite_end))
    return "; ".join(f"{kind} before step {end} only" for kind, end in ends if kind in kinds and end is not None)


def _judge(run: Settings, settings: JudgeSettings) -> list[str]:
    count = contender_count(run.needs.kinds, run.experience.sampling.n, settings.schedule)
    lines = []
    for name, weight in settings.criteria.items():
        cost = criterion_cost(name, settings, count, 0, 0)
        if not cost:
            lines.append(f"{name} (weight {weight:g}): asks no server")
            continue
        if name == REWRITE:
            asked = ", ".join(f"{cost[kind]} {kind}" for kind in ("pair judgements", "point judgements"))
            lines.append(f"{name} (weight {weight:g}): {settings.mode(name)} verdicts; {asked} of an unsafe suffix")
            continue
        kind, judgements = next(iter(cost.items()))
        how = "mean token log-prob" if name == LIKELIHOOD else f"{settings.mode(name)} verdicts"
        if kind == "pair judgements":
            how += f", {_pairs(settings, count)}"
        if name != LIKELIHOOD and settings.mode(name) == "hard":
            how += f", {settings.votes} votes at T={settings.temperature:g}, top-p {settings.top_p:g}"
        if name != LIKELIHOOD and (tokens := _written_tokens(settings, name)):
            how += f", up to {tokens} tokens each"
        lines.append(f"{name} (weight {weight:g}): {how}; {judgements} {kind} a prompt")
    if settings.audit_rate and settings.schedule.is_sparse and any(map(is_pairwise, settings.criteria)):
        lines.append(
            f"audit: in {settings.audit_rate:.2%} of the groups all pairs as well, beyond what is counted below"
        )
    return lines


def _pairs(settings: JudgeSettings, count: int) -> str:
    """Which pairs of `count` candidates are compared, in words."""
    schedule = settings.schedule
    texts = count + schedule.pivot_apart
    pairs = planned_pairs(schedule, texts)
    text = f"{schedule.name}: {pairs} of {texts * (texts - 1) // 2} pairs"
    if schedule.pivot_apart:
        text = f"pivot: {pairs} pairs with the {schedule.pivot}, for comparison only"
    return text + (", as many votes in either order" if texts <= SMALL_GROUP else "")


def _rate_limit(settings: Settings, judge: JudgeSettings) -> str:
    """What the rate limit makes of a step; nothing without one."""
    rate = sum(endpoint.requests_per_s for endpoint in judge.client.endpoints) if judge.client is not None else 0.0
    if not rate:
        return ""
    cost = prompt_cost(settings)
    requests = settings.run.prompts * (cost.get("judge requests", 0) + cost.get("rewriter calls", 0))
    return f"{requests / rate:,.0f} s a step for {requests:,} teacher requests at {rate:g} a second"


def _schedule(settings: Settings) -> str:
    run, learning = settings.run, settings.learning_rate
    prompts = run.steps * run.prompts
    rate = f"lr {learning.peak:g} {learning.decay} to {learning.end:g}, warm-up {learning.warmup:,} steps"
    return f"{run.steps:,} steps x {run.prompts} prompts = {prompts:,} prompts; {rate}"


def _rows(settings: Settings) -> str:
    prefix, suffix = _lengths(settings)
    branches, control = _branches_in_a_row(settings), _control(settings)[1]
    example = control + prefix + branches * suffix
    whole = branch_count(settings.objective.objective, settings.experience.sampling.n)
    longer = "" if settings.row_length_given else ", on GPUs of more groups where memory has room"
    what = "an example has" if branches == whole else f"an example's {whole} branches are split, a part has"
    return (
        f"micro-batches of up to {settings.row_length:,} tokens{longer}; {what} up to {example:,} "
        f"({f'{control} of control text, ' if control else ''}{prefix:,} of prefix, {branches} x {suffix})"
    )
