"""Objectives against plain PyTorch written from full logits in float64: values and gradients, whatever the packing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_sip.metrics import flatten, loss_metrics
from megatron_sip.model.packing import PackedRow, build_row
from megatron_sip.records import Example
from megatron_sip.training.objective_settings import METRIC_COUNTS, ObjectiveSettings
from megatron_sip.training.objectives import LossTerms, dpo, grpo, row_loss

VOCAB = 13


def make_examples(roles: list[str], kinds: list[str], seed: int, count: int = 3) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(VOCAB, (length,), generator=generator).tolist()

    examples = []
    for task in range(count):
        branches = [ids(1, 7) for _ in roles]
        engine = [
            [-0.5 - 0.1 * i for i in range(len(b))] if k == "rollout" else None
            for b, k in zip(branches, kinds, strict=True)
        ]
        examples.append(
            Example(task, ids(1, 9), branches, list(roles), list(kinds), weight=0.5 + task, engine_logprobs=engine)
        )
    return examples


def branch_logits(examples: list[Example], seed: int) -> dict[tuple[int, int], Tensor]:
    """Float64 logits [length, VOCAB] a branch: leaves, as if a model had produced them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (e, b): torch.randn(len(ids), VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
        for e, example in enumerate(examples)
        for b, ids in enumerate(example.branches)
    }


def selected(logits: Tensor, ids: list[int]) -> Tensor:
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def of_row(examples: list[Example], row: PackedRow, logits: dict[tuple[int, int], Tensor]) -> tuple[Tensor, Tensor]:
    parts = [
        selected(logits[key], examples[key[0]].branches[key[1]]) for key in zip(row.examples, row.branches, strict=True)
    ]
    if not parts:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    return torch.cat(parts), torch.stack([part.sum() for part in parts])


def over_rows(settings: ObjectiveSettings, examples: list[Example], groups: list[list[int]], **inputs) -> LossTerms:
    """Sum the terms of several rows, as the trainer does."""
    policy, reference = inputs["policy"], inputs.get("reference")
    total: list[LossTerms] = []
    for indices in groups:
        row = build_row(examples, indices, 200, 0)
        tokens, branches = of_row(examples, row, policy)
        extra = {}
        if reference is not None:
            reference_tokens, reference_branches = of_row(examples, row, reference)
            extra = {"reference_token_logprobs": reference_tokens, "reference_branch_logprobs": reference_branches}
        if "old" in inputs:
            extra["old_token_logprobs"] = of_row(examples, row, inputs["old"])[0]
        if "advantages" in inputs:
            extra["advantages"] = torch.tensor(
                [inputs["advantages"][e][b] for e, b in zip(row.examples, row.branches, strict=True)],
                dtype=torch.float64,
            )
        total.append(row_loss(settings, examples, row, tokens, branches, **extra))
    names = total[0].metrics.keys()
    assert all(terms.metrics.keys() == names for terms in total)
    metrics = {name: sum(float(terms.metrics[name]) for terms in total) for name in names}
    return LossTerms(torch.stack([t.sum for t in total]).sum(), sum(t.count for t in total), metrics)


def gradients(loss: Tensor, logits: dict[tuple[int, int], Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(logits.values()), materialize_grads=True))


def assert_same(terms: LossTerms, expected: Tensor, count: int, logits: dict[tuple[int, int], Tensor]) -> None:
    assert terms.count == count
    assert abs((terms.sum - expected).item()) <= 1e-9 * max(1.0, abs(expected.item()))
    for ours, theirs in zip(gradients(terms.sum, logits), gradients(expected, logits), strict=True):
        assert (ours - theirs).abs().max() <= 1e-9


PACKINGS = [[[0, 1, 2]], [[0], [1], [2]], [[2, 0], [1], []]]


@pytest.mark.parametrize("groups", PACKINGS)
@pytest.mark.parametrize("objective", ["sft", "rf-nll"])
def test_nll_equals_cross_entropy(objective, groups):
    examples = make_examples(["target"], ["rollout"], seed=1)
    logits = branch_logits(examples, seed=2)
    expected = sum(
        example.weight
        * torch.nn.functional.cross_entropy(logits[e, 0], torch.tensor(example.branches[0]), reduction="sum")
        for e, example in enumerate(examples)
    )
    terms = over_rows(ObjectiveSettings(objective), examples, groups, policy=logits)
    assert_same(terms, expected, sum(len(e.branches[0]) for e in examples), logits)


def plain_dpo(example: Example, policy: list[Tensor], reference: list[Tensor], settings: ObjectiveSettings) -> Tensor:
    """One pair's loss, from full logits, with none of the code under test."""
    sums = [
        [model[b].log_softmax(-1)[torch.arange(len(ids)), ids].sum() for b, ids in enumerate(example.branches)]
        for model in (policy, reference)
    ]
    best = example.roles.index("chosen")
    h = (sums[0][best] - sums[0][1 - best]) - (sums[1][best] - sums[1][1 - best]).detach()
    if settings.dpo_loss == "ipo":
        loss = (h - 0.5 / settings.beta) ** 2
    else:
        p = torch.sigmoid(settings.beta * h)
        loss = -(1 - settings.label_smoothing) * p.log() - settings.label_smoothing * (1 - p).log()
    return example.weight * (loss - settings.nll_coef * sums[0][best] / len(example.branches[best]))


@pytest.mark.parametrize("groups", PACKINGS)
@pytest.mark.parametrize("roles", [["chosen", "rejected"], ["rejected", "chosen"]])
@pytest.mark.parametrize(
    "settings",
    [
        ObjectiveSettings("dpo"),
        ObjectiveSettings("dpo", beta=0.7, label_smoothing=0.15),
        ObjectiveSettings("dpo", beta=0.3, nll_coef=0.25),
        ObjectiveSettings("dpo", beta=0.2, dpo_loss="ipo", nll_coef=1.0),
    ],
    ids=["plain", "smoothed", "nll", "ipo"],
)
def test_dpo_equals_plain_pytorch(settings, roles, groups):
    examples = make_examples(roles, ["suffix", "rollout"], seed=3)
    policy, reference = branch_logits(examples, seed=4), branch_logits(examples, seed=5)
    expected = sum(
        plain_dpo(example, [policy[e, 0], policy[e, 1]], [reference[e, 0], reference[e, 1]], settings)
        for e, example in enumerate(examples)
    )
    terms = over_rows(settings, examples, groups, policy=policy, reference=reference)
    assert_same(terms, expected, len(examples), policy)
    assert all(not grad.any() for grad in gradients(terms.sum, reference))


def test_dpo_metrics_are_sums_that_their_counts_divide():
    examples = make_examples(["chosen", "rejected"], ["rollout", "suffix"], seed=6)
    policy, reference = branch_logits(examples, seed=7), branch_logits(examples, seed=8)
    settings = ObjectiveSettings("dpo", beta=0.4)
    terms = over_rows(settings, examples, [[0, 1], [2]], policy=policy, reference=reference)
    means = flatten(loss_metrics(terms))
    policy, reference = ({k: v.detach() for k, v in m.items()} for m in (policy, reference))
    chosen = [
        float(selected(policy[e, 0], x.branches[0]).sum() - selected(reference[e, 0], x.branches[0]).sum())
        for e, x in enumerate(examples)
    ]
    rejected = [
        float(selected(policy[e, 1], x.branches[1]).sum() - selected(reference[e, 1], x.branches[1]).sum())
        for e, x in enumerate(examples)
    ]
    tokens = sum(len(x.branches[0]) for x in examples)
    engine = sum(
        float((selected(policy[e, 0], x.branches[0]) - torch.tensor(x.engine_logprobs[0])).abs().sum())
        for e, x in enumerate(examples)
    )
    expected = {
        "chosen_reward": 0.4 * sum(chosen) / 3,
        "rejected_reward": 0.4 * sum(rejected) / 3,
        "reward_margin": 0.4 * (sum(chosen) - sum(rejected)) / 3,
        "reward_accuracy": sum(c > r for c, r in zip(chosen, rejected, strict=True)) / 3,
        "rollout_logratio": sum(chosen) / tokens,
        "engine_logprob_abs_diff": engine / tokens,
        "rollout_tokens": tokens,
        "pairs": 3,
        "dpo_loss": sum(-math.log(1 / (1 + math.exp(-0.4 * (c - r)))) for c, r in zip(chosen, rejected, strict=True))
        / 3,
        "chosen_nll": -sum(float(selected(policy[e, 0], x.branches[0]).sum()) for e, x in enumerate(examples)) / tokens,
    }
    assert {name: means[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_dpo_accuracy_counts_the_untrained_policy_as_a_half():
    same = torch.tensor([-3.0, -4.0])
    terms = dpo(same, same - 1, same, same - 1, torch.ones(2), torch.ones(2))
    assert float(terms.metrics["reward_accuracy"]) == 1.0
    assert float(terms.sum) == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("noise", [0.0, 1e-4, -1e-4])
def test_dpo_accuracy_is_the_same_whatever_the_order_of_addition(noise):
    """Log-probs of 512 tokens in float32 are off by this much under another parallel layout."""
    reference = torch.tensor([-1500.0, -300.0, -2.0])
    policy = reference + noise + torch.tensor([0.0, 0.0, 0.01])
    terms = dpo(policy, reference, reference, reference, torch.ones(3), torch.ones(3), beta=5.0)
    assert float(terms.metrics["reward_accuracy"]) == 0.5 + 0.5 + 1.0


def plain_grpo(examples, policy, old, reference, advantages, settings) -> tuple[Tensor, int]:
    """Token by token, as the papers write it."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for (e, b), logits in policy.items():
        ids = examples[e].branches[b]
        branch = torch.zeros((), dtype=torch.float64)
        for t, token in enumerate(ids):
            logp = logits[t].log_softmax(-1)[token]
            ratio = (logp - old[e, b][t].detach().log_softmax(-1)[token]).exp()
            bounded = min(max(float(ratio), 1 - settings.clip_low), 1 + settings.clip_high)
            clipped = ratio if bounded == float(ratio) else torch.tensor(bounded, dtype=torch.float64)
            gain = torch.minimum(ratio * advantages[e][b], clipped * advantages[e][b])
            gap = reference[e, b][t].detach().log_softmax(-1)[token] - logp
            branch = branch - gain + settings.kl_coef * (gap.exp() - gap - 1)
        by_sequence = settings.grpo_average == "sequence"
        total = total + examples[e].weight * branch / (len(ids) if by_sequence else 1)
        count += 1 if by_sequence else len(ids)
    return total, count


@pytest.mark.parametrize("groups", PACKINGS)
@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_grpo_equals_the_formula_token_by_token(kl_coef, average, groups):
    examples = make_examples(["target"] * 4, ["rollout"] * 4, seed=9)
    policy, reference = branch_logits(examples, seed=10), branch_logits(examples, seed=12)
    # Old log-probs close to the policy's: some ratios are inside the clip range, some outside.
    old = {key: (value.detach() + 0.2 * torch.randn(value.shape, dtype=torch.float64)) for key, value in policy.items()}
    advantages = [[1.2, -0.7, 0.4, -0.9], [0.1, 0.5, -1.0, 0.4], [0.0, -2.0, 1.0, 1.0]]
    settings = ObjectiveSettings("grpo", clip_low=0.1, clip_high=0.15, kl_coef=kl_coef, grpo_average=average)
    expected, count = plain_grpo(examples, policy, old, reference, advantages, settings)
    terms = over_rows(settings, examples, groups, policy=policy, reference=reference, old=old, advantages=advantages)
    assert_same(terms, expected, count, policy)
    assert 0 < flatten(loss_metrics(terms))["clipped_fraction"] < 1


def test_grpo_without_old_logprobs_is_the_plain_policy_gradient():
    examples = make_examples(["target"] * 2, ["rollout"] * 2, seed=13, count=1)
    policy = branch_logits(examples, seed=14)
    terms = over_rows(
        ObjectiveSettings("grpo", grpo_average="token"), examples, [[0]], policy=policy, advantages=[[1.5, -0.5]]
    )
    plain = (
        -sum(a * selected(policy[0, b], examples[0].branches[b]).sum() for b, a in enumerate((1.5, -0.5)))
        * examples[0].weight
    )
    for ours, theirs in zip(gradients(terms.sum, policy), gradients(plain, policy), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize(("policy", "old"), [(-1.0, -200.0), (-200.0, -1.0)])
def test_grpo_stays_finite_where_policy_and_old_or_reference_are_far_apart(policy, old, advantage):
    logprobs = torch.tensor([policy, -2.0], requires_grad=True)
    others = torch.tensor([old, -2.0])
    one = torch.ones(1)
    terms = grpo(logprobs, others, others, advantage * one, torch.tensor([2]), one, kl_coef=0.1)
    terms.sum.backward()
    assert torch.isfinite(terms.sum)
    assert torch.isfinite(logprobs.grad).all()


def test_grpo_pulls_back_to_the_reference_from_far_above_it():
    logprobs, one = torch.tensor([-1.0], requires_grad=True), torch.ones(1)
    grpo(logprobs, logprobs, torch.tensor([-60.0]), 0 * one, torch.tensor([1]), one, kl_coef=0.5).sum.backward()
    assert logprobs.grad.item() == pytest.approx(0.5)


@pytest.mark.parametrize("settings", [ObjectiveSettings("sft"), ObjectiveSettings("dpo"), ObjectiveSettings("grpo")])
def test_filler_row_is_a_differentiable_zero(settings):
    row = build_row([], [], 8, 0)
    tokens, branches = torch.zeros(0, requires_grad=True), torch.zeros(0, requires_grad=True)
    terms = row_loss(settings, [], row, tokens, branches, torch.zeros(0), advantages=torch.zeros(0))
    assert float(terms.sum.detach()) == 0.0
    assert terms.count == 0
    terms.sum.backward()
    assert (branches if settings.objective == "dpo" else tokens).grad is not None
    means = flatten(loss_metrics(terms))
    assert set(means) <= set(METRIC_COUNTS.values())
    assert not any(means.values())


def test_every_mean_has_its_count():
    examples = make_examples(["chosen", "rejected"], ["rollout", "rollout"], seed=15)
    policy = branch_logits(examples, seed=16)
    terms = over_rows(ObjectiveSettings("dpo"), examples, [[0, 1, 2]], policy=policy, reference=policy)
    counts = set(METRIC_COUNTS.values())
    for name in terms.metrics:
        assert name in counts or METRIC_COUNTS[name] in terms.metrics


def test_non_finite_log_probs_stay_visible():
    nan = torch.tensor([float("nan")])
    terms = dpo(nan, nan, nan, nan, torch.ones(1), torch.ones(1))
    assert torch.isnan(terms.sum)


def test_bad_inputs_name_the_value():
    pair = make_examples(["chosen", "rejected"], ["suffix", "rollout"], seed=17, count=1)
    row = build_row(pair, [0], 64, 0)
    tokens, branches = torch.zeros(len(row.targets)), torch.zeros(2)
    with pytest.raises(ValueError, match="reference"):
        row_loss(ObjectiveSettings("dpo"), pair, row, tokens, branches)
    with pytest.raises(ValueError, match=r"task 0: .* role target, got chosen"):
        row_loss(ObjectiveSettings("sft"), pair, row, tokens, branches)
    with pytest.raises(ValueError, match=r"branch_logprobs has shape \(3,\), the row needs \(2,\)"):
        row_loss(ObjectiveSettings("dpo"), pair, row, tokens, torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="advantages"):
        row_loss(ObjectiveSettings("grpo"), pair, row, tokens, branches)
    with pytest.raises(ValueError, match="token log-probs"):
        row_loss(ObjectiveSettings("grpo", kl_coef=0.1), pair, row, tokens, branches, advantages=torch.zeros(2))
    odd = make_examples(["chosen", "rejected", "rejected"], ["suffix"] * 3, seed=18, count=1)
    row = build_row(odd, [0], 64, 0)
    with pytest.raises(ValueError, match=r"one chosen and one rejected, got \['chosen', 'rejected', 'rejected'\]"):
        row_loss(ObjectiveSettings("dpo"), odd, row, torch.zeros(len(row.targets)), torch.zeros(3), torch.zeros(3))
    short = Example(4, [1], [[2, 3]], ["target"], ["rollout"], engine_logprobs=[[-1.0]])
    row = build_row([short], [0], 8, 0)
    with pytest.raises(ValueError, match="task 4: 1 engine log-probs for a branch of 2 tokens"):
        row_loss(ObjectiveSettings("sft"), [short], row, torch.zeros(2), torch.zeros(1))


@pytest.mark.parametrize(
    ("constants", "named"),
    [
        ({"objective": "ppo"}, "objective is ppo"),
        ({"objective": "dpo", "beta": 0.0}, "beta is 0.0"),
        ({"objective": "dpo", "label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"objective": "dpo", "dpo_loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is 0.1, must be 0 with ipo"),
        ({"objective": "grpo", "kl_coef": -1.0}, "kl_coef is -1.0"),
        ({"objective": "grpo", "clip_high": math.inf}, "clip_high is inf"),
    ],
)
def test_settings_refuse_bad_constants(constants, named):
    with pytest.raises(ValueError, match=named):
        ObjectiveSettings(**constants)
