"""Objectives against plain PyTorch written from full logits in float64: values and gradients, whatever the packing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_sip.metrics import flatten
from megatron_sip.model.packing import build_row
from megatron_sip.records import Branch, Example
from megatron_sip.training.objectives.dpo import branch_sums, dpo
from megatron_sip.training.objectives.grpo import grpo
from megatron_sip.training.objectives.mismatch import correction
from megatron_sip.training.objectives.row_loss import METRIC_COUNTS, loss_metrics, row_loss
from megatron_sip.training.objectives.settings import ObjectiveSettings
from megatron_sip.training.objectives.terms import LossTerms

VOCAB = 13


def make_examples(roles: list[str], kinds: list[str], seed: int, count: int = 3) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(VOCAB, (length,), generator=generator).tolist()

    examples = []
    for task in range(count):
        made = [ids(1, 7) for _ in roles]
        branches = [
            Branch(b, r, k, engine_logprobs=[-0.5 - 0.1 * i for i in range(len(b))] if k == "rollout" else None)  # type: ignore[arg-type]
            for b, r, k in zip(made, roles, kinds, strict=True)
        ]
        examples.append(Example(task, ids(1, 9), branches))
    return examples


def branch_logits(examples: list[Example], seed: int) -> dict[tuple[int, int], Tensor]:
    """Float64 logits [length, VOCAB] a branch: leaves, as if a model had produced them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (e, b): torch.randn(len(branch.ids), VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
        for e, example in enumerate(examples)
        for b, branch in enumerate(example.branches)
    }


def selected(logits: Tensor, ids: list[int]) -> Tensor:
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def of_row(examples: list[Example], indices: list[int], logits: dict[tuple[int, int], Tensor]) -> Tensor:
    parts = [selected(logits[e, b], branch.ids) for e in indices for b, branch in enumerate(examples[e].branches)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def with_advantages(examples: list[Example], advantages: list[list[float]]) -> list[Example]:
    return [
        replace(
            example,
            branches=[replace(branch, advantage=a) for branch, a in zip(example.branches, own, strict=True)],
        )
        for example, own in zip(examples, advantages, strict=True)
    ]


def over_rows(settings: ObjectiveSettings, examples: list[Example], groups: list[list[int]], **inputs) -> LossTerms:
    """Sum the terms of several rows, as the trainer does."""
    total: list[LossTerms] = []
    for indices in groups:
        row = build_row(examples, indices, 200, 0)
        logprobs = {name: of_row(examples, indices, logits) for name, logits in inputs.items()}
        total.append(row_loss(settings, row, logprobs["policy"], logprobs.get("reference"), logprobs.get("old")))
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
        torch.nn.functional.cross_entropy(logits[e, 0], torch.tensor(example.branches[0].ids), reduction="sum")
        for e, example in enumerate(examples)
    )
    terms = over_rows(ObjectiveSettings(objective), examples, groups, policy=logits)
    assert_same(terms, expected, sum(len(e.branches[0].ids) for e in examples), logits)


def plain_dpo(example: Example, policy: list[Tensor], reference: list[Tensor], settings: ObjectiveSettings) -> Tensor:
    """One pair's loss, from full logits, with none of the code under test."""
    sums = [
        [selected(model[b], branch.ids).sum() for b, branch in enumerate(example.branches)]
        for model in (policy, reference)
    ]
    best = [branch.role for branch in example.branches].index("chosen")
    h = (sums[0][best] - sums[0][1 - best]) - (sums[1][best] - sums[1][1 - best]).detach()
    if settings.dpo_loss == "ipo":
        loss = (h - 0.5 / settings.beta) ** 2
    else:
        p = torch.sigmoid(settings.beta * h)
        loss = -(1 - settings.label_smoothing) * p.log() - settings.label_smoothing * (1 - p).log()
    return loss - settings.nll_coef * sums[0][best] / len(example.branches[best].ids)


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
    means = flatten(loss_metrics([terms]))
    policy, reference = ({k: v.detach() for k, v in m.items()} for m in (policy, reference))
    chosen = [
        float(selected(policy[e, 0], x.branches[0].ids).sum() - selected(reference[e, 0], x.branches[0].ids).sum())
        for e, x in enumerate(examples)
    ]
    rejected = [
        float(selected(policy[e, 1], x.branches[1].ids).sum() - selected(reference[e, 1], x.branches[1].ids).sum())
        for e, x in enumerate(examples)
    ]
    tokens = sum(len(x.branches[0].ids) for x in examples)
    engine = sum(
        float((selected(policy[e, 0], x.branches[0].ids) - torch.tensor(x.branches[0].engine_logprobs)).abs().sum())
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
        "chosen_nll": -sum(float(selected(policy[e, 0], x.branches[0].ids).sum()) for e, x in enumerate(examples))
        / tokens,
    }
    assert {name: means[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_dpo_accuracy_counts_the_untrained_policy_as_a_half():
    same = torch.tensor([-3.0, -4.0])
    terms = dpo(same, same - 1, same, same - 1, torch.ones(2))
    assert float(terms.metrics["reward_accuracy"]) == 1.0
    assert float(terms.sum) == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("noise", [0.0, 1e-4, -1e-4])
def test_dpo_accuracy_is_the_same_whatever_the_order_of_addition(noise):
    """Log-probs of 512 tokens in float32 are off by this much under another parallel layout."""
    reference = torch.tensor([-1500.0, -300.0, -2.0])
    policy = reference + noise + torch.tensor([0.0, 0.0, 0.01])
    terms = dpo(policy, reference, reference, reference, torch.ones(3), beta=5.0)
    assert float(terms.metrics["reward_accuracy"]) == 0.5 + 0.5 + 1.0


TRUNCATED_AT, MASKED_BELOW, MASKED_ABOVE = 2.0, 0.5, 5.0


def plain_correction(mode: str, ratio: float) -> float:
    if mode == "truncate":
        return min(ratio, TRUNCATED_AT)
    if mode == "mask":
        return ratio if MASKED_BELOW <= ratio <= MASKED_ABOVE else 0.0
    return 1.0


def plain_grpo(examples, policy, old, reference, settings) -> tuple[Tensor, int]:
    """Token by token, as the papers write it."""
    total, branches, tokens = torch.zeros((), dtype=torch.float64), 0, 0
    for (e, b), logits in policy.items():
        made = examples[e].branches[b]
        branch = torch.zeros((), dtype=torch.float64)
        for t, token in enumerate(made.ids):
            logp = logits[t].log_softmax(-1)[token]
            ratio = (logp - old[e, b][t].detach().log_softmax(-1)[token]).exp()
            bounded = min(max(float(ratio), 1 - settings.clip_low), 1 + settings.clip_high)
            clipped = ratio if bounded == float(ratio) else torch.tensor(bounded, dtype=torch.float64)
            gain = torch.minimum(ratio * made.advantage, clipped * made.advantage)
            if made.engine_logprobs is not None:
                engine = math.exp(float(logp) - made.engine_logprobs[t])
                gain = gain * plain_correction(settings.mismatch_correction, engine)
            gap = reference[e, b][t].detach().log_softmax(-1)[token] - logp
            branch = branch - gain + settings.kl_coef * (gap.exp() - gap - 1)
        length = {"token": 1, "sequence": len(made.ids), "constant": settings.grpo_constant}[settings.grpo_length]
        total = total + branch / length
        branches, tokens = branches + 1, tokens + len(made.ids)
    return total, tokens if settings.grpo_length == "token" else branches


def grpo_problem(seed: int) -> tuple[list[Example], dict[tuple[int, int], Tensor]]:
    """Groups of 4, one branch without engine log-probs, the others' from near the policy's to far from them."""
    kinds = ["rollout", "rollout", "suffix", "rollout"]
    advantages = [[1.2, -0.7, 0.4, -0.9], [0.1, 0.5, -1.0, 0.4], [0.0, -2.0, 1.0, 1.0]]
    examples = with_advantages(make_examples(["sampled"] * 4, kinds, seed), advantages)
    policy = branch_logits(examples, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)

    def near(e: int, b: int, branch: Branch) -> Branch:
        if branch.engine_logprobs is None:
            return branch
        noise = torch.randn(len(branch.ids), generator=generator, dtype=torch.float64)
        return replace(branch, engine_logprobs=(selected(policy[e, b], branch.ids).detach() + noise).tolist())

    return [
        replace(example, branches=[near(e, b, branch) for b, branch in enumerate(example.branches)])
        for e, example in enumerate(examples)
    ], policy


@pytest.mark.parametrize("groups", PACKINGS)
@pytest.mark.parametrize("mode", ["none", "truncate", "mask"])
@pytest.mark.parametrize("length", ["token", "sequence", "constant"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_grpo_equals_the_formula_token_by_token(kl_coef, length, mode, groups):
    examples, policy = grpo_problem(seed=9)
    reference = branch_logits(examples, seed=12)
    # Old log-probs close to the policy's: some ratios are inside the clip range, some outside.
    old = {key: (value.detach() + 0.2 * torch.randn(value.shape, dtype=torch.float64)) for key, value in policy.items()}
    settings = ObjectiveSettings(
        "grpo",
        clip_low=0.1,
        clip_high=0.15,
        kl_coef=kl_coef,
        grpo_length=length,
        grpo_constant=11,
        mismatch_correction=mode,
    )
    expected, count = plain_grpo(examples, policy, old, reference, settings)
    terms = over_rows(settings, examples, groups, policy=policy, reference=reference, old=old)
    assert_same(terms, expected, count, policy)
    means = flatten(loss_metrics([terms]))
    assert 0 < means["grpo/clipped_fraction"] < 1
    assert (0 < means["grpo/corrected_share"] < 1) == (mode != "none")


def test_grpo_metrics_are_means_over_tokens():
    examples, policy = grpo_problem(seed=20)
    reference = branch_logits(examples, seed=22)
    settings = ObjectiveSettings("grpo", kl_coef=0.3, mismatch_correction="mask")
    means = flatten(loss_metrics([over_rows(settings, examples, [[2, 0], [1]], policy=policy, reference=reference)]))
    ours, gaps, kl = [], [], []
    for (e, b), logits in policy.items():
        branch = examples[e].branches[b]
        own = selected(logits.detach(), branch.ids)
        ours += own.tolist()
        distance = selected(reference[e, b].detach(), branch.ids) - own
        kl += (distance.exp() - distance - 1).tolist()
        gaps += (own - torch.tensor(branch.engine_logprobs)).tolist() if branch.engine_logprobs else []
    ratios = [math.exp(gap) for gap in gaps]
    expected = {
        "grpo/sampled_nll": -sum(ours) / len(ours),
        "grpo/kl": sum(kl) / len(kl),
        "grpo/engine_ratio": sum(ratios) / len(ratios),
        "grpo/engine_logratio": sum(gaps) / len(gaps),
        "grpo/corrected_share": sum(not 0.5 <= ratio <= 5 for ratio in ratios) / len(ratios),
        "engine_logprob_abs_diff": sum(map(abs, gaps)) / len(gaps),
        "grpo/tokens": len(ours),
        "grpo/branches": 12,
        "grpo/clipped_fraction": 0.0,
    }
    assert {name: means[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_grpo_without_old_logprobs_is_the_plain_policy_gradient():
    examples = with_advantages(make_examples(["sampled"] * 2, ["suffix"] * 2, seed=13, count=1), [[1.5, -0.5]])
    policy = branch_logits(examples, seed=14)
    terms = over_rows(ObjectiveSettings("grpo"), examples, [[0]], policy=policy)
    plain = -sum(a * selected(policy[0, b], examples[0].branches[b].ids).sum() for b, a in enumerate((1.5, -0.5)))
    for ours, theirs in zip(gradients(terms.sum, policy), gradients(plain, policy), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize(("policy", "old"), [(-1.0, -200.0), (-200.0, -1.0)])
def test_grpo_stays_finite_where_policy_and_old_or_reference_are_far_apart(policy, old, advantage):
    logprobs = torch.tensor([policy, -2.0], requires_grad=True)
    others = torch.tensor([old, -2.0])
    one = torch.ones(1)
    corrections, metrics = correction("truncate", others, torch.arange(2), logprobs)
    settings = ObjectiveSettings("grpo", kl_coef=0.1)
    terms = grpo(settings, logprobs, others, others, corrections, advantage * one, torch.tensor([2]))
    terms.sum.backward()
    assert torch.isfinite(terms.sum)
    assert torch.isfinite(logprobs.grad).all()
    assert all(math.isfinite(float(value)) for value in metrics.values())


def test_grpo_pulls_back_to_the_reference_from_far_above_it():
    logprobs, one = torch.tensor([-1.0], requires_grad=True), torch.ones(1)
    settings = ObjectiveSettings("grpo", kl_coef=0.5)
    grpo(settings, logprobs, logprobs, torch.tensor([-60.0]), one, 0 * one, torch.tensor([1])).sum.backward()
    assert logprobs.grad.item() == pytest.approx(0.5)


def test_branch_sums_lose_nothing_over_long_branches() -> None:
    lengths = torch.tensor([2048, 0, 1, 512])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    logprobs = (-10 * torch.rand(int(lengths.sum()), generator=torch.Generator().manual_seed(0))).requires_grad_()
    exact = [part.sum().item() for part in logprobs.detach().double().split(lengths.tolist())]
    sums = branch_sums(logprobs, offsets)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), torch.tensor(exact).double(), rtol=6e-8, atol=0)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (sums * weights).sum().backward()
    assert torch.equal(logprobs.grad, weights.repeat_interleave(lengths))


@pytest.mark.parametrize("settings", [ObjectiveSettings("sft"), ObjectiveSettings("dpo"), ObjectiveSettings("grpo")])
def test_filler_row_is_a_differentiable_zero(settings):
    row = build_row([], [], 8, 0)
    tokens = torch.zeros(0, requires_grad=True)
    terms = row_loss(settings, row, tokens, torch.zeros(0))
    assert float(terms.sum.detach()) == 0.0
    assert terms.count == 0
    terms.sum.backward()
    assert tokens.grad is not None
    means = flatten(loss_metrics([terms]))
    assert set(means) <= {*METRIC_COUNTS.values(), "grpo/branches"}
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
    terms = dpo(nan, nan, nan, nan, torch.ones(1))
    assert torch.isnan(terms.sum)


def test_bad_inputs_name_the_value():
    pair = make_examples(["chosen", "rejected"], ["suffix", "rollout"], seed=17, count=1)
    row = build_row(pair, [0], 64, 0)
    tokens = torch.zeros(len(row.targets))
    with pytest.raises(ValueError, match="reference"):
        row_loss(ObjectiveSettings("dpo"), row, tokens)
    with pytest.raises(ValueError, match=r"task 0: .* role target, got chosen"):
        row_loss(ObjectiveSettings("sft"), row, tokens)
    with pytest.raises(ValueError, match=rf"reference_token_logprobs has shape \(3,\), .* needs \({len(tokens)},\)"):
        row_loss(ObjectiveSettings("dpo"), row, tokens, torch.zeros(3))
    with pytest.raises(ValueError, match="advantage of every branch"):
        row_loss(ObjectiveSettings("grpo"), row, tokens)
    row = build_row(with_advantages(pair, [[1.0, -1.0]]), [0], 64, 0)
    with pytest.raises(ValueError, match="token log-probs"):
        row_loss(ObjectiveSettings("grpo", kl_coef=0.1), row, tokens)
    odd = make_examples(["chosen", "rejected", "rejected"], ["suffix"] * 3, seed=18, count=1)
    row = build_row(odd, [0], 64, 0)
    with pytest.raises(ValueError, match=r"one chosen and one rejected, got \['chosen', 'rejected', 'rejected'\]"):
        row_loss(ObjectiveSettings("dpo"), row, torch.zeros(len(row.targets)), torch.zeros(len(row.targets)))
    with pytest.raises(ValueError, match="task 4: 1 engine log-probs for a branch of 2 tokens"):
        Example(4, [1], [Branch([2, 3], "target", "rollout", engine_logprobs=[-1.0])])


@pytest.mark.parametrize(
    ("constants", "named"),
    [
        ({"objective": "ppo"}, "objective is ppo"),
        ({"objective": "dpo", "beta": 0.0}, "beta is 0.0"),
        ({"objective": "dpo", "label_smoothing": 0.5}, "--dpo-label-smoothing is 0.5"),
        (
            {"objective": "dpo", "dpo_loss": "ipo", "label_smoothing": 0.1},
            "--dpo-label-smoothing is 0.1, must be 0 with ipo",
        ),
        ({"objective": "grpo", "kl_coef": -1.0}, "--grpo-kl-coef is -1.0"),
        ({"objective": "grpo", "clip_high": math.inf}, "--grpo-clip-high is inf"),
        ({"objective": "grpo", "clip_low": 1.0}, "--grpo-clip-low is 1.0, must be below 1"),
        ({"objective": "grpo", "grpo_length": "word"}, "--grpo-length is word"),
        ({"objective": "grpo", "mismatch_correction": "clip"}, "--mismatch-correction is clip"),
        ({"objective": "grpo", "grpo_length": "constant", "grpo_constant": 0}, "grpo_constant is 0"),
    ],
)
def test_settings_refuse_bad_constants(constants, named):
    with pytest.raises(ValueError, match=named):
        ObjectiveSettings(**constants)
