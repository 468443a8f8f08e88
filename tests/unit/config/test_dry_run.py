"""The cost of a run against figures worked out by hand, most of them from the paper's protocol."""

from __future__ import annotations

import pytest
from flag_cases import dry_run_settings

from megatron_sip.config.dry_run import criterion_cost, describe, prompt_cost, run_cost, step_cost
from megatron_sip.judge.settings import ClientSettings, Endpoint, JudgeSettings, ScheduleSettings, VerdictMode

URL = "http://teacher"


def settings_with(schedule: ScheduleSettings, votes: int = 5, verdict: VerdictMode = "hard") -> JudgeSettings:
    return JudgeSettings(
        {"quality": 1.0}, ClientSettings((Endpoint(URL),)), votes=votes, schedule=schedule, default_verdict=verdict
    )


def test_the_papers_safety_set_up_asks_680_pair_and_85_point_judgements_a_prompt() -> None:
    cost = prompt_cost(dry_run_settings("--preset", "safety"))
    assert cost["pair judgements"] == 680  # 17 * 16 / 2 pairs, 5 votes
    assert cost["point judgements"] == 85  # 17 candidates, 5 votes
    assert cost["judge requests"] == 2 * 136 + 17
    assert cost["judge tokens, answers"] == 765 * 512


def test_the_papers_safety_run() -> None:
    run = dry_run_settings("--preset", "safety")
    cost = run_cost(run)
    assert cost["pair judgements"] + cost["point judgements"] == 2000 * 195_840
    assert cost["rollout tokens, generated"] == 2000 * 256 * 16 * 128
    assert cost["training tokens, packed"] == 2000 * 256 * (1920 + 2 * 128)
    assert cost["training tokens, unpacked"] == 2000 * 256 * 2 * 2048


@pytest.mark.parametrize(
    ("preset", "pairs", "points"),
    [
        ("quality", 16 * 15 // 2 * 5, None),
        ("quality-pivot-8", 8 * 5, None),  # K judgements an update, section 3.2.3; 5 votes each
        ("factuality-8", 8 * 7 // 2 * 5, 8 * 5),
        ("safety-suffix-rewrite-16", 18 * 17 // 2 * 5, 18 * 5),
        ("factuality-pivot-8", 8 * 5, 8 * 5),  # the suffix is not its own reference
        ("safety-pivot-16", 16 * 5, 16 * 5),
        ("from-scratch", 6, 10),  # of two candidates: three votes in either order
        ("safety-sft-rollout", None, None),
        ("safety-dpo-rewrite-over-rollout", None, None),
    ],
)
def test_judgements_a_prompt_of_presets(preset: str, pairs: int | None, points: int | None) -> None:
    cost = prompt_cost(dry_run_settings("--preset", preset))
    assert (cost.get("pair judgements"), cost.get("point judgements")) == (pairs, points)
    assert ("rewriter calls" in cost) == (preset in ("safety-suffix-rewrite-16", "from-scratch") or "dpo-rew" in preset)


@pytest.mark.parametrize(
    ("settings", "judgements", "requests"),
    [
        (settings_with(ScheduleSettings("all_pairs"), votes=1), 136, 136),
        (settings_with(ScheduleSettings("all_pairs_swap"), votes=5), 1360, 272),
        (settings_with(ScheduleSettings("all_pairs"), verdict="soft"), 272, 272),
        (settings_with(ScheduleSettings("circulant_bt", degree=4), votes=5), 170, 68),
        (settings_with(ScheduleSettings("circulant_bt", degree=4), verdict="soft"), 34, 34),
        (settings_with(ScheduleSettings("two_ended_bt", budget=40), votes=1), 40, 40),
        (settings_with(ScheduleSettings("pivot", pivot_competes=True), votes=2), 32, 32),
        (settings_with(ScheduleSettings("pivot"), votes=2), 34, 34),
    ],
)
def test_pairwise_judgements_of_17_candidates(settings: JudgeSettings, judgements: int, requests: int) -> None:
    cost = criterion_cost("quality", settings, 17, 1920, 128)
    assert (cost["pair judgements"], cost["judge requests"]) == (judgements, requests)


def test_judge_tokens_share_the_prefix_between_the_requests_of_a_prompt() -> None:
    cost = criterion_cost("likelihood", settings_with(ScheduleSettings("pivot")), 17, 1920, 128)
    assert cost["likelihood judgements"] == cost["judge requests"] == 17
    assert cost["judge tokens, prompts"] == 17 * 2048
    assert cost["judge tokens, uncached"] == 1920 + 17 * 128
    assert cost["judge tokens, answers"] == 0
    factual = criterion_cost("factuality", settings_with(ScheduleSettings("pivot"), votes=1), 8, 1000, 100)
    alone = criterion_cost("safety", settings_with(ScheduleSettings("pivot"), votes=1), 8, 1000, 100)
    assert 1100 + 8 * 100 < factual["judge tokens, uncached"] < 1100 + 8 * 100 + 1000  # prefix, reference, instructions
    assert alone["judge tokens, uncached"] < 8 * 100 + 1000  # safety shows the candidate without its prefix


def test_a_late_start_of_rollouts_saves_their_cost_until_then() -> None:
    run = dry_run_settings(
        *("--preset", "safety-suffix-rewrite-16", "--rollout-start-step", "500"),
        *("--train-iters", "1000", "--global-batch-size", "2"),
    )
    cost = run_cost(run)
    assert cost["rollout tokens, generated"] == 500 * 2 * 16 * 128
    assert cost["pair judgements"] == 2 * (500 * 18 * 17 // 2 * 5 + 500 * 6)
    assert cost["rewriter calls"] == 2000


def test_kinds_that_end_save_their_cost_from_then_on() -> None:
    run = dry_run_settings(
        *("--preset", "safety-suffix-rewrite-1", "--suffix-end-step", "400", "--rewrite-end-step", "700"),
        *("--num-rollouts", "2", "--train-iters", "1000", "--global-batch-size", "2"),
    )
    cost = run_cost(run)
    assert cost["rewriter calls"] == 2 * 700
    assert cost["point judgements"] == 2 * 5 * (400 * 4 + 300 * 3 + 300 * 2)
    text = "suffix + rewrite + 2 rollouts = 4 a prompt, 128 tokens each; rollouts at T=1, top-p 1"
    ends = "suffix before step 400 only; rewrite before step 700 only"
    assert f"  candidates  {text}; {ends}" in describe(run).splitlines()


def test_a_document_costs_its_tokens_and_is_described() -> None:
    flags = ("--preset", "safety-baseline", "--sft-target", "document")
    for mode in ((), ("--task-mode", "whole")):
        run = dry_run_settings(*flags, *mode)
        assert prompt_cost(run) == {"training tokens, packed": 2048, "training tokens, unpacked": 2048}
        lines = describe(run).splitlines()
        assert "  objective   NLL of every token" in lines
        assert "  candidates  the documents themselves, up to 2,048 tokens of one" in lines


def test_control_texts_make_two_examples_of_a_prompt() -> None:
    run = dry_run_settings("--preset", "from-scratch", "--control-token", "safety")
    assert prompt_cost(run)["training tokens, packed"] == 2 * (4 + 2048)  # 16 bytes are four tokens or so
    objective = (
        "  objective   RF-NLL: NLL of the best candidate with safety >= 0.5 behind '[safety: good]\\n', and of the worst below "
        "behind '[safety: bad]\\n'"
    )
    assert objective in describe(run).splitlines()


def test_description_of_the_papers_safety_set_up() -> None:
    text = describe(dry_run_settings("--preset", "safety", "--win-rate-prompts", "1000"))
    for line in (
        "  objective   online DPO, best against worst candidate; beta 0.1, reference frozen",
        "  candidates  suffix + 16 rollouts = 17 a prompt, 128 tokens each; rollouts at T=1, top-p 1",
        "  judge       quality (weight 1): hard verdicts, all_pairs: 136 of 136 pairs, 5 votes at T=1, "
        "top-p 0.6, up to 512 tokens each; 680 pair judgements a prompt",
        "  judge       safety (weight 1): hard verdicts, 5 votes at T=1, top-p 0.6, up to 512 tokens each; "
        "85 point judgements a prompt",
        "  schedule    2,000 steps x 256 prompts = 512,000 prompts; lr 5e-06 cosine to 5e-07, warm-up 100 steps",
        "  at the end  1,000 held-out prefixes: trained against initial policy, judged",
        "  Packed, with the prefix shared by its branches, training takes 53% of the tokens.",
    ):
        assert line in text.splitlines()
    pair_line = next(line for line in text.splitlines() if line.strip().startswith("pair judgements"))
    assert pair_line.split()[2:] == ["680", "174,080", "348,160,000"]


def test_an_audit_by_all_pairs_is_told_where_there_is_one() -> None:
    sparse = ("--preset", "safety", "--judge-schedule", "circulant_bt")
    told = "  judge       audit: in 1.00% of the groups all pairs as well, beyond what is counted below"
    assert told in describe(dry_run_settings(*sparse)).splitlines()
    for flags in (("--preset", "safety"), (*sparse, "--judge-audit-rate", "0"), ("--preset", "from-scratch")):
        assert "audit" not in describe(dry_run_settings(*flags))


def test_what_a_reasoning_judge_behind_a_rate_limit_costs() -> None:
    flags = (
        *("--preset", "safety-suffix-1", "--teacher-api", "openai", "--teacher-name", "m", "--teacher-url"),
        URL,
        URL + "2",
    )
    limits = ("--teacher-reasoning-tokens", "2048", "--teacher-requests-per-second", "5", "--judge-max-tokens", "100")
    run = dry_run_settings(*flags, *limits, "--judge-verdict", "hard", "safety=soft")
    cost = prompt_cost(run)
    # One pair with 3 votes in either order; 2 candidates whose verdicts are written too, and their probabilities read.
    assert (cost["pair judgements"], cost["point judgements"], cost["judge requests"]) == (6, 2, 4)
    assert cost["judge tokens, answers"] == (6 + 2) * 2148
    text = describe(run)
    assert "  at least    102 s a step for 1,024 teacher requests at 10 a second" in text.splitlines()
    assert "soft verdicts, up to 2148 tokens each" in text


def test_a_pivot_and_votes_made_even_are_said() -> None:
    lines = describe(dry_run_settings("--preset", "quality-pivot-8")).splitlines()
    assert any("pivot: 8 pairs with the suffix, for comparison only" in line for line in lines)
    assert "  candidates  8 rollouts = 8 a prompt, 128 tokens each; rollouts at T=1, top-p 1" in lines
    small = describe(dry_run_settings("--preset", "quality-2"))
    assert "1 of 1 pairs, as many votes in either order, 5 votes" in small
    assert "6 pair judgements a prompt" in small
    drawn = prompt_cost(dry_run_settings("--preset", "quality-pivot-8", "--judge-pivot", "rollout"))
    assert drawn["pair judgements"] == 7 * 5  # of 8 rollouts one is the pivot


def test_rollouts_of_a_step_ahead_are_said_to_be_of_other_weights() -> None:
    in_turn, ahead = (dry_run_settings("--preset", "safety", "--max-staleness", steps) for steps in ("0", "1"))
    assert (in_turn.run.max_staleness, ahead.run.max_staleness) == (0, 1)
    assert "rollouts at T=1, top-p 1, by the weights before the last update" in describe(ahead)
    assert "weights before" not in describe(in_turn)


GRPO = ("--preset", "safety", "--objective", "grpo", "--candidates", "rollout")


def test_grpo_is_described_and_counted_with_its_splits_and_rounds() -> None:
    run = dry_run_settings(*GRPO, "--branches-per-row", "6", "--grpo-oversample", "3")
    cost = prompt_cost(run)
    assert cost["training tokens, packed"] == 3 * 1920 + 16 * 128  # rows of 5, 5 and 6
    assert cost["training tokens, unpacked"] == 16 * 2048
    assert "reference tokens, packed" not in cost
    step = step_cost(run, cost)
    assert step["training tokens, packed"] == 256 * cost["training tokens, packed"]
    assert step["rollout tokens, generated"] == 3 * 256 * 16 * 128
    lines = describe(run).splitlines()
    assert (
        "  objective   GRPO: score minus mean of its group; mean over all tokens; no KL; mismatch "
        "correction truncate; rollouts cut at 128 tokens: score; up to 3 rounds of tasks a step until all groups have a spread"
    ) in lines
    assert (
        "  rows        micro-batches of up to 2,688 tokens, on GPUs of more groups where memory has room; "
        "an example's 16 branches are split, a part has up to 2,688 "
        "(1,920 of prefix, 6 x 128)"
    ) in lines


def test_grpo_with_a_reference_says_so() -> None:
    flags = (*GRPO, "--grpo-kl-coef", "0.01", "--grpo-length", "constant", "--grpo-spread-normalization")
    run = dry_run_settings(*flags, "--ref-update-interval", "50")
    text = describe(run)
    assert "divided by its spread; sum over each rollout's tokens / 128, then mean over rollouts;" in text
    assert "KL 0.01, reference refreshed every 50 steps" in text
    assert prompt_cost(run)["reference tokens, packed"] == 1920 + 16 * 128


def test_description_without_a_judge() -> None:
    text = describe(dry_run_settings("--preset", "safety-sft-rewrite", "--teacher-url", URL))
    assert "  objective   NLL of the rewrite" in text.splitlines()
    assert "  judge       none" in text.splitlines()
    assert "judgements" not in text


@pytest.mark.parametrize("flags", [("--preset", "safety"), ("--dpo-pair", "rewrite", "rollout")])
def test_a_replayed_prompt_costs_training_alone(flags: tuple[str, ...]) -> None:
    sizes = ("--seq-length", "2048", "--global-batch-size", "4", "--train-iters", "2", "--win-rate-prompts", "8")
    sizes += ("--lr", "1e-5", "--min-lr", "1e-6", "--lr-decay-style", "linear", "--lr-warmup-iters", "0")
    settings = dry_run_settings(*flags, *sizes, "--replay-groups", "groups")
    assert {name.split()[0] for name in prompt_cost(settings)} == {"training", "reference"}
    assert describe(settings)
