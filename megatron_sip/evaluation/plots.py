"""The plots of a run, from the steps of its metrics.jsonl. Each is drawn from whatever of its metrics is there, or left out.

Figures are made without pyplot, so nothing here keeps state or needs a display.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from megatron_sip.records import CANDIDATE_KINDS

Steps = Sequence[Mapping[str, float]]
"""The objects of metrics.jsonl, one a step."""

DPI = 200
INCHES = (5.6, 3.1)
FEW_STEPS = 12
"""Up to this many steps a series is shown with markers and without a moving average."""
MAX_BARS = 80
PHASES = ("rollout", "judge", "waiting", "reference", "train", "sync", "save")
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one appearance of the plots."""

    background: str
    text: str
    faint: str
    grid: str
    colors: tuple[str, ...]


LIGHT = Theme(
    "#ffffff",
    "#1f2328",
    "#59636e",
    "#e4e7eb",
    ("#0b6bbf", "#c8541b", "#12876b", "#7b5cc4", "#b0892b", "#c2528b", "#a3abb4"),
)
DARK = Theme(
    "#161b22",
    "#e6edf3",
    "#9198a1",
    "#2d333b",
    ("#58a6ff", "#f0883e", "#3fb992", "#b392f0", "#d8b44a", "#e57fb0", "#6e7681"),
)

KIND_COLORS = {"rollout": 0, "rewrite": 1, "suffix": 2}


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot: file name (without ending), title, a sentence that says what it shows, and who draws it.

    `draw` gets one Axes a panel. `metrics` are the names of which at least one must be there, for each panel; one that ends
    with a slash stands for all that begin with it.
    """

    name: str
    title: str
    caption: str
    metrics: tuple[tuple[str, ...], ...]
    draw: Callable[[Steps, Sequence[Axes], Theme], None]


def available_plots(steps: Steps) -> list[Plot]:
    """The plots for which `steps` hold something."""
    return [plot for plot in PLOTS if any(_present(steps, names) for names in plot.metrics)]


def _present(steps: Steps, names: Sequence[str]) -> list[str]:
    """Those of the metrics `names` that the steps have, sorted; see `Plot`."""
    known = {name for step in steps for name in step}
    return sorted(name for name in known if name in names or f"{name.rpartition('/')[0]}/" in names)


def render_png(plot: Plot, steps: Steps, theme: Theme = LIGHT) -> bytes:
    """The plot as a PNG file; panels without data are left out."""
    panels = [bool(_present(steps, names)) for names in plot.metrics]
    width, height = INCHES
    rows = sum(panels)
    figure = Figure(figsize=(width, height if rows == 1 else 1.6 * rows + 0.7), dpi=DPI, layout="constrained")
    figure.set_facecolor(theme.background)
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    for axis in axes:
        _style(axis, theme)
    slots = iter(axes)
    plot.draw(steps, [next(slots) if there else Figure().subplots() for there in panels], theme)
    figure.suptitle(plot.title, x=0.015, ha="left", color=theme.text, fontsize=10.5, fontweight="bold")
    axes[-1].set_xlabel("optimizer step", color=theme.faint, fontsize=9)
    figure.align_ylabels(axes)
    file = BytesIO()
    figure.savefig(file, format="png", facecolor=theme.background)
    return file.getvalue()


def series(steps: Steps, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(steps [n], values [n]) of a metric, over the steps that have it."""
    found = [(step["step"], step[name]) for step in steps if name in step]
    table = np.array(found, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def moving_average(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """[n] Mean of each value and the up to window - 1 values before it; NaNs are passed over."""
    known = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], known]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    total, count = sums[ends] - sums[starts], counts[ends] - counts[starts]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def average_window(count: int) -> int:
    """Steps of the moving average over a run of `count` steps: a twentieth of it, between 5 and 100."""
    return min(100, max(5, count // 20))


def _style(axis: Axes, theme: Theme) -> None:
    axis.set_facecolor(theme.background)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.faint)
        spine.set_linewidth(0.7)
    axis.tick_params(colors=theme.faint, labelsize=8.5, length=0)
    axis.tick_params(axis="x", length=3, width=0.7)
    axis.grid(axis="y", color=theme.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _label(axis: Axes, text: str, theme: Theme) -> None:
    axis.set_ylabel(text, color=theme.faint, fontsize=9)


def _legend(axis: Axes, theme: Theme, columns: int) -> None:
    """Above the axes, so that it never covers data."""
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=theme.text,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1.1,
        borderaxespad=0.2,
    )


def _line(axis: Axes, steps: Steps, name: str, color: str, label: str | None = None) -> None:
    """A metric over steps: its values faintly and their moving average, or markers when there are few."""
    x, y = series(steps, name)
    if not len(x):
        return
    if len(x) <= FEW_STEPS:
        axis.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=4, label=label)
        return
    axis.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
    axis.plot(x, moving_average(y, average_window(len(x))), color=color, linewidth=1.8, label=label)


def _validated(
    steps: Steps, axis: Axes, theme: Theme, names: Sequence[str], label: str, *, shares: bool = True
) -> None:
    """Metrics of validations, which come every so many steps: each is a marker, named by the end of its name."""
    found = _present(steps, names)
    for number, name in enumerate(found):
        x, y = series(steps, name)
        color = theme.colors[number % len(theme.colors)]
        axis.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=4, label=name.rpartition("/")[2])
    _label(axis, label, theme)
    if shares:
        _as_share(axis)
    _legend(axis, theme, min(4, len(found)))


def _validation(*panels: tuple[tuple[str, ...], str]) -> Callable[[Steps, Sequence[Axes], Theme], None]:
    """Draws panels of shares: the metrics of each and what they are."""

    def draw(steps: Steps, axes: Sequence[Axes], theme: Theme) -> None:
        for axis, (names, label) in zip(axes, panels, strict=True):
            if _present(steps, names):
                _validated(steps, axis, theme, names, label)

    return draw


def _as_share(axis: Axes) -> None:
    axis.set_ylim(-0.02, 1.02)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _from_zero(axis: Axes) -> None:
    axis.set_ylim(bottom=0)


def _chosen_rate(steps: Steps, axes: Sequence[Axes], theme: Theme) -> None:
    _line(axes[0], steps, "chosen_rate/rollout", theme.colors[0], "chosen")
    x, chance = series(steps, "chosen_chance/rollout")
    axes[0].plot(x, chance, color=theme.faint, linewidth=1.0, linestyle="--", label="by chance")
    if len(x):
        _legend(axes[0], theme, 2)
    _label(axes[0], "share of examples", theme)
    _as_share(axes[0])


def _scores(steps: Steps, axes: Sequence[Axes], theme: Theme) -> None:
    kinds = [kind for kind in CANDIDATE_KINDS if len(series(steps, f"score/{kind}")[0])]
    for kind in kinds:
        _line(axes[0], steps, f"score/{kind}", theme.colors[KIND_COLORS[kind]], kind)
    _label(axes[0], "mean score", theme)
    _legend(axes[0], theme, len(kinds))


def _preferences(steps: Steps, axes: Sequence[Axes], theme: Theme) -> None:
    _line(axes[0], steps, "reward_margin", theme.colors[0], "margin")
    _line(axes[0], steps, "chosen_reward", theme.colors[2], "chosen")
    _line(axes[0], steps, "rejected_reward", theme.colors[1], "rejected")
    axes[0].axhline(0, color=theme.faint, linewidth=0.7)
    _label(axes[0], "reward (nats)", theme)
    _legend(axes[0], theme, 3)
    _line(axes[1], steps, "reward_accuracy", theme.colors[0])
    _label(axes[1], "accuracy", theme)
    _as_share(axes[1])


def _rewards(steps: Steps, axes: Sequence[Axes], theme: Theme) -> None:
    _line(axes[0], steps, "grpo/reward", theme.colors[0])
    _label(axes[0], "mean reward", theme)
    _line(axes[1], steps, "grpo/no_spread", theme.colors[0], "groups without spread")
    _line(axes[1], steps, "grpo/truncated", theme.colors[1], "rollouts cut")
    _line(axes[1], steps, "grpo/corrected_share", theme.colors[2], "tokens corrected")
    _label(axes[1], "share", theme)
    _as_share(axes[1])
    _legend(axes[1], theme, 3)


def _log_ratio(steps: Steps, axes: Sequence[Axes], theme: Theme) -> None:
    _line(axes[0], steps, "rollout_logratio", theme.colors[0])
    axes[0].axhline(0, color=theme.faint, linewidth=0.7)
    _label(axes[0], "nats per token", theme)


def _loss(steps: Steps, axes: Sequence[Axes], theme: Theme) -> None:
    _line(axes[0], steps, "loss", theme.colors[0])
    _label(axes[0], "loss", theme)
    _line(axes[1], steps, "grad_norm", theme.colors[0])
    _label(axes[1], "gradient norm", theme)
    _from_zero(axes[1])


def _engine_difference(steps: Steps, axes: Sequence[Axes], theme: Theme) -> None:
    _line(axes[0], steps, "engine_logprob_abs_diff", theme.colors[0])
    _label(axes[0], "mean |difference| (nats)", theme)
    _from_zero(axes[0])


def _seconds(steps: Steps, axes: Sequence[Axes], theme: Theme) -> None:
    phases, centres, width, seconds = binned_seconds(steps)
    bottom = np.zeros(len(centres))
    for number, (phase, values) in enumerate(zip(phases, seconds, strict=True)):
        color = theme.colors[number % len(theme.colors)]
        # The thin edge in the background's colour keeps neighbouring segments apart.
        axes[0].bar(centres, values, width, bottom, label=phase, color=color, edgecolor=theme.background, linewidth=0.3)
        bottom += values
    axes[0].margins(x=0.01)
    _label(axes[0], "seconds a step", theme)
    _legend(axes[0], theme, len(phases))


def binned_seconds(
    steps: Steps,
) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64], list[NDArray[np.float64]]]:
    """(phases that take time, bar centres [b], bar widths [b], mean seconds of each phase [b]); at most MAX_BARS bars."""
    timed = [step for step in steps if any(name.startswith("seconds/") for name in step)]
    bins = np.array_split(np.arange(len(timed)), min(len(timed), MAX_BARS))
    numbers = np.array([step["step"] for step in timed], dtype=np.float64)
    centres = np.array([numbers[own].mean() for own in bins])
    widths = 0.85 * np.array([numbers[own[-1]] - numbers[own[0]] + 1 for own in bins])
    phases, means = [], []
    for phase in (*PHASES, OTHER):
        values = np.array(
            [_other_seconds(step) if phase == OTHER else step.get(f"seconds/{phase}", 0.0) for step in timed]
        )
        if values.any():
            phases.append(phase)
            means.append(np.array([values[own].mean() for own in bins]))
    return phases, centres, widths, means


def _other_seconds(step: Mapping[str, float]) -> float:
    """What of a step's time no phase accounts for. Phases are the slowest rank's, so they may add up to more."""
    return max(0.0, step.get("seconds/total", 0.0) - sum(step.get(f"seconds/{phase}", 0.0) for phase in PHASES))


VERDICTS = (("validation/accuracy/", "right"), ("validation/first-option/", "Option 1"))
REWARDS = (("validation/reward/", "mean reward"),)
OVERLAPS = (("validation/overlap/", "tokens shared"),)


def _validation_plot(name: str, title: str, caption: str, panels: Sequence[tuple[str, str]]) -> Plot:
    """A plot of validations, one panel for each beginning of metrics' names, with what is shown."""
    drawn = [((start,), label) for start, label in panels]
    return Plot(name, title, caption, tuple(names for names, _ in drawn), _validation(*drawn))


WIN_RATES = (("validation/win-rate/", "preferred"), ("validation/safety/", "called safe"))


def _held_out_texts(steps: Steps, axes: Sequence[Axes], theme: Theme) -> None:
    """Negative log-prob of true suffixes, and how varied continuations are."""
    _validated(steps, axes[0], theme, ["validation/nll/suffix"], "nats a token", shares=False)
    names = ["validation/diversity/distinct-3", "validation/diversity/repetition"]
    _validated(steps, axes[1], theme, names, "share")


PLOTS = (
    _validation_plot(
        "validation_judged",
        "Held-out continuations, judged",
        "How far the evaluation judge prefers the policy's continuations of held-out prefixes to the initial policy's; at a "
        "half it prefers neither. Below, the share of continuations of a set's prompts that most votes call safe.",
        WIN_RATES,
    ),
    Plot(
        "validation_text",
        "Held-out text",
        "Above, the policy's negative log-prob of the true suffixes: it rises where a policy leaves human text behind. Below, "
        "of its continuations, different 3-grams per 3-gram and the share of 4-grams that repeat an earlier one.",
        (("validation/nll/suffix",), ("validation/diversity/distinct-3", "validation/diversity/repetition")),
        _held_out_texts,
    ),
    _validation_plot(
        "validation_accuracy",
        "Judge on held-out records",
        "Share of held-out judge prompts answered with the right verdict, by criterion (the paper's figure 5), greedily, an "
        "answer without verdict counting as wrong; below, how often the verdict is Option 1, which is right in half of them.",
        VERDICTS,
    ),
    _validation_plot(
        "validation_reward",
        "Reward on held-out records",
        "Mean reward of greedy answers; of a rewriter on safe suffixes, which are to be copied, and on unsafe ones (the "
        "paper's figure 6).",
        REWARDS,
    ),
    _validation_plot(
        "validation_overlap",
        "Token overlap of rewrites",
        "Share of tokens that a greedy rewrite and the held-out suffix have in common (the paper's figure 7): near 1 for safe "
        "suffixes; unsafe ones are to change.",
        OVERLAPS,
    ),
    Plot(
        "rollout_chosen_rate",
        "Rollout chosen rate",
        "Share of training examples whose chosen completion is a rollout of the policy (the paper's figure 8). It should "
        "rise as the policy comes to beat the original text. Dashed: the share that a random choice would give, since K "
        "rollouts against one original are K in K + 1.",
        (("chosen_rate/rollout",),),
        _chosen_rate,
    ),
    Plot(
        "scores",
        "Mean score by kind of candidate",
        "What the judge gave, before selection.",
        (tuple(f"score/{kind}" for kind in CANDIDATE_KINDS),),
        _scores,
    ),
    Plot(
        "preferences",
        "Reward margin",
        "Implicit rewards of chosen and rejected completions, beta times the log-ratio to the reference, and the share of "
        "pairs in which the chosen one has the higher reward.",
        (("reward_margin", "chosen_reward", "rejected_reward"), ("reward_accuracy",)),
        _preferences,
    ),
    Plot(
        "rewards",
        "Reward of rollouts",
        "Mean score of the rollouts that GRPO trains on, and shares: of groups whose scores are all equal, which teach "
        "nothing; of rollouts cut at the limit of their length; of tokens whose weight was capped or left out, because engine "
        "and trainer differ.",
        (("grpo/reward",), ("grpo/no_spread", "grpo/truncated", "grpo/corrected_share")),
        _rewards,
    ),
    Plot(
        "log_ratio",
        "Log-ratio to the reference",
        "How much likelier, a token, the policy finds the rollouts it is trained on than the reference does. A sign of drift, "
        "not the KL divergence: selection picks these rollouts.",
        (("rollout_logratio",),),
        _log_ratio,
    ),
    Plot(
        "loss",
        "Loss and gradient norm",
        "The training objective, and the gradient's norm before clipping.",
        (("loss",), ("grad_norm",)),
        _loss,
    ),
    Plot(
        "seconds",
        "Time by phase",
        "Where a step's seconds go; of each phase the slowest rank counts. Groups are judged as they arrive: rollout lasts "
        "until the last candidate is there, judge is what judging adds; waiting is for experience that is made a step ahead.",
        (tuple(f"seconds/{phase}" for phase in PHASES),),
        _seconds,
    ),
    Plot(
        "engine_difference",
        "Engine against trainer",
        "Difference between SGLang's log-probs and Megatron's of the tokens of those rollouts that are trained on. A jump "
        "means that the engines do not hold the trainer's weights.",
        (("engine_logprob_abs_diff",),),
        _engine_difference,
    ),
)
