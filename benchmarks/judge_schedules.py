"""How much of the best-worst gap each judging schedule recovers, and with how many judge calls.

    python benchmarks/judge_schedules.py [--json FILE] [--plot FILE] [--groups 500] [--seeds 1 2 3]

Simulated judges: candidate qualities q are standard normal; the judge's logit for "first" is
scale * (q[first] - q[second]) + bias + persistent error of the pair + half as much of the ordered pair. A hard vote is
drawn from it, a soft verdict is its probability. "weak": scale 1, "strong": scale 3; bias 0.5; error 1.

Teacher: `results/judge_teacher.json` (made by judge_teacher.py) holds, measured on SmolLM2-135M-Instruct over real
prefixes (`pydoc_data.topics`), (a) mean log-probs of 16 sampled continuations per prefix: taken as true qualities,
standardised, with the strong judge's simulated noise on top; (b) its real soft quality verdicts for all ordered pairs of
a few groups: nothing is simulated, the truth is what all pairs in both orders say.

recovered: (quality of the best pick - of the worst pick) / (true best - true worst), mean over the groups of all seeds; ci95
by the normal approximation. Margins between schedules are paired: the same groups, the same judge. A call is one verdict: a
soft one costs a prefill, a hard one up to 512 generated tokens.

"pivot of N calls" is the pivot with exactly as many calls as the default: hard, its votes are spread over its pairs; soft,
where asking again says nothing new, all its pairs in both orders and then pairs with a second pivot. Its scores are those of
a Bradley-Terry fit, which is kinder to it than win rates.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine, format_table, write_report
from numpy.typing import NDArray

from megatron_sip.judge.bradley_terry import expected_win_rates, fit_bradley_terry, sigmoid
from megatron_sip.judge.schedules import (
    AllPairs,
    CirculantBT,
    Comparisons,
    Field,
    Pair,
    Pivot,
    Schedule,
    TwoEndedBT,
    measured_win_rates,
)
from megatron_sip.judge.settings import ScheduleSettings

RESULTS = Path(__file__).parent / "results"
Array = NDArray[np.float64]
DEFAULT = ScheduleSettings()


@dataclass(frozen=True)
class Plan:
    """A contestant: a schedule, whether verdicts are soft, votes in each asked order."""

    name: str
    schedule: Schedule
    soft: bool
    votes: int = 1
    both_orders: bool = False


@dataclass(frozen=True)
class PivotOfCalls:
    """The pivot with a given number of calls; see the module. For this comparison only."""

    calls: int
    soft: bool
    both_orders: bool = False
    balanced: bool = True

    def next_pairs(self, round_index: int, field: Field, history: Comparisons) -> list[Pair]:
        if round_index > 0:
            return []
        first, second, *others = (int(i) for i in field.rng.permutation(field.count))
        star = [(first, other) for other in (second, *others)]
        more = [(second, other) for other in others]
        swapped = [(b, a) for a, b in star]
        if self.soft:
            return [*star, *swapped, *more, *((b, a) for a, b in more)][: self.calls]
        turns = -(-self.calls // len(star))
        return [pair for turn in range(turns) for pair in (star if turn % 2 == 0 else swapped)][: self.calls]

    def scores(self, field: Field, history: Comparisons) -> Array:
        fit = fit_bradley_terry(history.first, history.second, history.outcome, field.count)
        return expected_win_rates(fit.strengths)


DEFAULT_CALLS = 16 * DEFAULT.degree // 2
DEFAULT_PLAN = f"circulant_bt {DEFAULT.degree} soft (default)"
PIVOT_HARD, PIVOT_SOFT = (f"pivot of {DEFAULT_CALLS} calls {kind}" for kind in ("hard", "soft"))

PLANS = (
    Plan("all_pairs x5 hard", AllPairs(), False, 5),
    Plan("all_pairs x1 hard", AllPairs(), False),
    Plan("all_pairs soft", AllPairs(), True, both_orders=True),
    Plan("pivot x1 hard", Pivot("rollout"), False),
    Plan("pivot x3 hard", Pivot("rollout"), False, 3),
    Plan("pivot x4 hard", Pivot("rollout"), False, 4),
    Plan("pivot soft", Pivot("rollout"), True, both_orders=True),
    Plan(PIVOT_HARD, PivotOfCalls(DEFAULT_CALLS, soft=False), False),
    Plan(PIVOT_SOFT, PivotOfCalls(DEFAULT_CALLS, soft=True), True),
    Plan("circulant_bt 8 hard", CirculantBT(8), False),
    Plan("two_ended_bt 60 hard", TwoEndedBT(60), False),
    Plan("circulant_bt 2 soft", CirculantBT(2), True),
    Plan("circulant_bt 4 soft", CirculantBT(4), True),
    Plan("circulant_bt 4 soft, both orders", CirculantBT(4), True, both_orders=True),
    Plan(DEFAULT_PLAN, CirculantBT(DEFAULT.degree), True),
    Plan("two_ended_bt 32 soft", TwoEndedBT(32), True),
    Plan("two_ended_bt 48 soft", TwoEndedBT(48), True),
)


@dataclass(frozen=True)
class SimulatedJudge:
    """See the module."""

    scale: float
    bias: float
    error: float


JUDGES = {"weak": SimulatedJudge(1.0, 0.5, 1.0), "strong": SimulatedJudge(3.0, 0.5, 1.0)}


def first_preferred(judge: SimulatedJudge, quality: Array, rng: np.random.Generator) -> Array:
    """P(first shown is preferred) for all ordered pairs of one group, [n, n]."""
    count = quality.size
    pair = np.triu(rng.standard_normal((count, count)), 1)
    pair_error = judge.error * (pair - pair.T)
    ordered_error = 0.5 * judge.error * rng.standard_normal((count, count))
    return sigmoid(judge.scale * (quality[:, None] - quality[None, :]) + judge.bias + pair_error + ordered_error)


def run_plan(plan: Plan, preferred: Array, seed: Sequence[int]) -> tuple[Array, int]:
    """Scores that a plan gives the group whose judge answers with `preferred`, and the calls it took."""
    rng = np.random.default_rng([*seed, 1])
    field = Field(("rollout",) * len(preferred), "dpo", np.random.default_rng([*seed, 2]), repeatable=not plan.soft)
    history, calls, round_index = Comparisons.empty(), 0, 0
    while pairs := plan.schedule.next_pairs(round_index, field, history):
        shown = [order for pair in pairs for order in orders_of(plan, pair)]
        verdicts = []
        for first, second in shown:
            probability = float(preferred[first, second])
            verdicts.append((first, second, probability if plan.soft else float(rng.random() < probability)))
        history, calls, round_index = history.plus(verdicts), calls + len(shown), round_index + 1
    return plan.schedule.scores(field, history), calls


def orders_of(plan: Plan, pair: Pair) -> list[Pair]:
    """The orders in which a pair is shown, one per vote: alternating from the drawn one, as the judge does."""
    swapped = (pair[1], pair[0])
    if plan.both_orders:
        return [pair, swapped] * plan.votes
    return [pair if vote % 2 == 0 else swapped for vote in range(plan.votes)]


def recovered(scores: Array, truth: Array, rng: np.random.Generator) -> float:
    """Share of the true best-worst gap between the picks; ties broken by lot."""
    tie_break = rng.permutation(scores.size)
    order = np.lexsort((tie_break, scores))
    return float((truth[order[-1]] - truth[order[0]]) / (truth.max() - truth.min()))


Groups = list[tuple[Array, Array]]
"""(true qualities [n], P(first preferred) [n, n]) a group."""


def simulated_groups(judge: SimulatedJudge, count: int, candidates: int, seed: int) -> Groups:
    groups = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        quality = rng.standard_normal(candidates)
        groups.append((quality, first_preferred(judge, quality, rng)))
    return groups


def teacher_likelihood_groups(measured: Any, wanted: int, seed: int) -> Groups:
    """Measured log-probs as qualities, standardised within each group; the noise is the simulated strong judge's."""
    groups = []
    for index, row in enumerate(list(measured["mean_logprobs"]) * max(1, wanted // len(measured["mean_logprobs"]))):
        values = np.array(row)
        quality = (values - values.mean()) / values.std()
        groups.append((quality, first_preferred(JUDGES["strong"], quality, np.random.default_rng([seed, 7, index]))))
    return groups


def teacher_verdict_groups(measured: Any, wanted: int) -> Groups:
    """Measured soft verdicts; the truth is the win rate over all pairs in both orders. Each group comes up several times,
    for the schedules' own draws."""
    groups = []
    for matrix in list(measured["first_preferred"]) * (wanted // max(1, len(measured["first_preferred"]))):
        preferred = np.array(matrix)
        first, second = np.nonzero(~np.eye(len(preferred), dtype=bool))
        truth = measured_win_rates(len(preferred), Comparisons(first, second, preferred[first, second]))
        groups.append((truth, preferred))
    return groups


@dataclass(frozen=True)
class Measured:
    """A schedule's calls and recovered share [groups], and the seed of each group."""

    calls: Array
    shares: Array
    seeds: tuple[int, ...]

    def report(self) -> dict[str, Any]:
        by_seed = {seed: self.shares[np.array(self.seeds) == seed] for seed in dict.fromkeys(self.seeds)}
        return {
            "calls": float(self.calls.mean()),
            **mean_and_interval(self.shares, "recovered"),
            "recovered_by_seed": {str(seed): float(shares.mean()) for seed, shares in by_seed.items()},
            "groups": len(self.shares),
        }


def mean_and_interval(values: Array, name: str) -> dict[str, Any]:
    """The mean under `name`, and its 95 % interval."""
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    return {name: mean, "ci95": [mean - half, mean + half]}


def measure(plans: Sequence[Plan], groups_of: Mapping[int, Groups]) -> dict[str, Measured]:
    """Each plan on the same groups; `groups_of` has those of each seed."""
    found = {}
    for plan in plans:
        shares, calls, seeds = [], [], []
        for seed, groups in groups_of.items():
            for index, (truth, preferred) in enumerate(groups):
                scores, asked = run_plan(plan, preferred, (seed, index))
                shares.append(recovered(scores, truth, np.random.default_rng([seed, index, 3])))
                calls.append(asked)
                seeds.append(seed)
        found[plan.name] = Measured(np.array(calls, float), np.array(shares), tuple(seeds))
    return found


def check_claims(measured: Mapping[str, Mapping[str, Measured]]) -> dict[str, Any]:
    """The documentation's claims about the default schedule, with their figures; `holds` is about the strong judge."""
    claims: dict[str, Any] = {}
    for judge in JUDGES:
        full, default = measured[judge]["all_pairs x5 hard"], measured[judge][DEFAULT_PLAN]
        claims[judge] = {
            "recovers_of_all_pairs_x5": float(default.shares.mean() / full.shares.mean()),
            "calls_of_all_pairs_x5": float(default.calls.mean() / full.calls.mean()),
            "calls": float(default.calls.mean()),
        }
        for kind, name in (("hard", PIVOT_HARD), ("soft", PIVOT_SOFT)):
            pivot = measured[judge][name]
            claims[judge][f"margin_over_{kind}_pivot"] = {
                "pivot_calls": float(pivot.calls.mean()),
                **mean_and_interval(default.shares - pivot.shares, "margin"),
            }
    strong = claims["strong"]
    default, full = measured["strong"][DEFAULT_PLAN].report(), measured["strong"]["all_pairs x5 hard"].report()
    claims["holds"] = bool(
        default["ci95"][0] >= 0.95 * full["recovered"]
        and strong["calls_of_all_pairs_x5"] <= 0.1
        and strong["margin_over_hard_pivot"]["ci95"][0] > 0.2
        and strong["margin_over_soft_pivot"]["ci95"][0] > 0.0
    )
    return claims


def family_and_parameter(plan: str) -> tuple[str, str]:
    """("circulant_bt soft", "6") for "circulant_bt 6 soft (default)"."""
    words = plan.replace(" (default)", "").replace(f"pivot of {DEFAULT_CALLS} calls", "pivot").replace("x", "").split()
    middle = [word for word in words[1:] if word.isdigit()]
    kind = "soft" if "soft" in plan else "hard"
    both = ", both orders" if "both orders" in plan else ""
    return f"{words[0]} {kind}{both}", " ".join(middle)


def plot(settings: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Calls against recovered gap, a panel a judge, a line a kind of schedule and verdict."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    panels = {name: rows for name, rows in settings.items() if name in JUDGES}
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 5.2), sharey=True)
    colours = {"all_pairs": "tab:gray", "pivot": "tab:red", "circulant_bt": "tab:blue", "two_ended_bt": "tab:green"}
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        families: dict[str, list[tuple[float, float, float, str]]] = {}
        for plan, row in rows.items():
            family, parameter = family_and_parameter(plan)
            spread = (row["ci95"][1] - row["ci95"][0]) / 2
            families.setdefault(family, []).append((row["calls"], row["recovered"], spread, parameter))
        for family, points in families.items():
            calls, shares, spreads, labels = zip(*sorted(points), strict=True)
            soft, colour = "soft" in family, colours[family.split(" ")[0]]
            axis.errorbar(
                calls, shares, yerr=spreads, fmt="o-" if soft else "s:", color=colour, capsize=2, label=family
            )
            for place, label in enumerate(labels):
                axis.annotate(
                    label, (calls[place], shares[place]), fontsize=8, xytext=(5, -11), textcoords="offset points"
                )
        axis.set_yscale("logit", one_half="0.5")
        axis.set_yticks([0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99], ["0.2", "0.5", "0.8", "0.9", "0.95", "0.98", "0.99"])
        axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.set(xscale="log", xlabel="judge calls for a group of 16", title=f"{name} judge (simulated)")
        axis.set_xticks([15, 30, 60, 120, 240, 600], ["15", "30", "60", "120", "240", "600"])
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of the true best-worst gap recovered")
    axes[-1].legend(fontsize=8, loc="lower right")
    figure.suptitle("Judging schedules; numbers: votes, degree or budget; bars: 95 % intervals")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "judge_schedules.json", help="report file")
    parser.add_argument("--plot", type=Path, help="picture file; docs/judge_schedules.png is the published one")
    parser.add_argument("--groups", type=int, default=500, help="simulated groups a judge and seed")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--teacher", type=Path, default=RESULTS / "judge_teacher.json", help="measured verdicts")
    args = parser.parse_args()
    measured = {
        name: measure(PLANS, {s: simulated_groups(judge, args.groups, args.candidates, s) for s in args.seeds})
        for name, judge in JUDGES.items()
    }
    claims = check_claims(measured)
    if args.teacher.exists():
        teacher = json.loads(args.teacher.read_text())
        likelihood = {seed: teacher_likelihood_groups(teacher, args.groups, seed) for seed in args.seeds}
        measured["teacher's likelihoods, strong judge's noise"] = measure(PLANS, likelihood)
        if verdicts := teacher_verdict_groups(teacher, args.groups):
            soft = [plan for plan in PLANS if plan.soft]
            measured["teacher's own soft verdicts"] = measure(soft, dict.fromkeys(args.seeds, verdicts))
    settings = {name: {plan: found.report() for plan, found in rows.items()} for name, rows in measured.items()}
    for name, rows in settings.items():
        table = [
            (plan, f"{r['calls']:.0f}", r["recovered"], f"{r['ci95'][0]:.3f} .. {r['ci95'][1]:.3f}")
            for plan, r in sorted(rows.items(), key=lambda item: item[1]["calls"])
        ]
        print(f"\n{name}\n" + format_table(("schedule", "calls", "recovered", "95 % interval"), table))
    print(f"\n{json.dumps(claims, indent=2)}")
    report = {"machine": describe_machine("cpu"), "seeds": args.seeds, "candidates": args.candidates}
    report |= {"judges": {name: vars(judge) for name, judge in JUDGES.items()}, "settings": settings, "claims": claims}
    write_report(args.json, report)
    if args.plot is not None:
        plot(settings, args.plot)


if __name__ == "__main__":
    main()
