"""Which objective buys what (the paper's table 6, small)? About 155 minutes on two cores with AVX2 alone, after study `judge`.

Ten ways to continue SmolLM2-135M-Instruct, most for 16 steps of 8 prefixes; the main ones with every seed, the others with the
first. The teacher's likelihood judges all but the two that show what the pairwise judge of study `judge` makes of it. All
then continue the same held-out prefixes, sampled (as in training) and greedily, and both judges compare them with the initial
policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evidence.judge import later_leads, trained_judge
from evidence.study import PYTHON, SERVED_URL, Part, Place

NAME = "objectives"
INITIAL = "initial"
PRESET = "evidence/objectives.args"
QUALITY = "examples/short_quality.txt"
ROLLOUTS = ("--candidates", "rollout", "--num-rollouts", "4")
TOGETHER = ("--candidates", "suffix", "rollout", "--num-rollouts")
BY_JUDGE = ("--criteria", f"{QUALITY}=1", "--judge-verdict", "soft")


@dataclass(frozen=True)
class Row:
    """A way to train. told: in the table. flags: of the trainer. judge: the pairwise judge is its teacher, not the likelihood.

    main: trained with every seed."""

    told: str
    flags: tuple[str, ...]
    judge: bool = False
    main: bool = False
    asks: bool = True


ROWS: Mapping[str, Row] = {
    "suffix": Row("next token, suffixes", ("--objective", "sft", "--candidates", "suffix"), main=True, asks=False),
    "document": Row(
        "next token, whole pieces",
        (
            *("--objective", "sft", "--candidates", "suffix", "--sft-target", "document"),
            *("--global-batch-size", "4", "--train-iters", "13"),  # 52 pieces have about as many tokens as 128 suffixes
        ),
        asks=False,
    ),
    "rf-nll": Row("RF-NLL, suffix + 4 rollouts", ("--objective", "rf-nll", *TOGETHER, "4")),
    "dpo-1": Row("DPO, suffix + 1 rollout", ("--objective", "dpo", *TOGETHER, "1")),
    "dpo-4": Row("DPO, suffix + 4 rollouts", ("--objective", "dpo", *TOGETHER, "4"), main=True),
    "dpo-8": Row("DPO, suffix + 8 rollouts", ("--objective", "dpo", *TOGETHER, "8")),
    "dpo-rollouts": Row("DPO, 4 rollouts", ("--objective", "dpo", *ROLLOUTS)),
    "grpo": Row("GRPO, 4 rollouts", ("--objective", "grpo", *ROLLOUTS)),
    "judge-dpo-4": Row("DPO, suffix + 4 rollouts", ("--objective", "dpo", *TOGETHER, "4", *BY_JUDGE), judge=True),
    "judge-pivot": Row(
        "DPO, 4 rollouts, suffix as pivot",
        ("--objective", "dpo", *ROLLOUTS, *BY_JUDGE, "--judge-schedule", "pivot", "--judge-pivot", "suffix"),
        judge=True,
    ),
}
MAIN, BASELINE, WHOLE = "dpo-4", "suffix", "document"
"""The main comparison: the method against next-token training on suffixes of the same text; and that on whole pieces."""
QUICK_ROWS = ("suffix", "dpo-4", "judge-pivot")
PREFIXES, NLL_PREFIXES, QUICK_PREFIXES = 96, 128, 6
QUICK = ("--train-iters", "1", "--lr-warmup-iters", "0", "--global-batch-size", "2")


@dataclass(frozen=True)
class Run:
    """A model of the study: a row trained with a seed, or the initial one."""

    row: str
    seed: int

    def folder(self, place: Place) -> Path:
        """Where its files lie."""
        return place.run_dir / NAME / f"{self.row}-{self.seed}"

    def model(self, place: Place) -> Path:
        """HF folder of its weights."""
        return place.smollm2 if self.row == INITIAL else self.folder(place) / "run" / "hf"


def runs(place: Place) -> list[Run]:
    """Those that are trained: main ones with every seed, the others with the first."""
    names = QUICK_ROWS if place.quick else tuple(ROWS)
    return [Run(name, seed) for name in names for seed in (place.seeds if ROWS[name].main else place.seeds[:1])]


def initial(place: Place) -> Run:
    """The model that all start from; its seed is in no draw."""
    return Run(INITIAL, place.seeds[0])


def parts(place: Place) -> list[Part]:
    """Train and measure each, then ask both judges about all."""
    trained = runs(place)
    found = [_measured(place, initial(place))]
    for run in trained:
        found += [_trained(place, run), _measured(place, run)]
    found += [
        _compared(place, "likelihood", {"likelihood.json": "sampled.jsonl"}, place.smollm2),
        _compared(
            place, "judge", {"judge.json": "sampled.jsonl", "judge_greedy.json": "greedy.jsonl"}, trained_judge(place)
        ),
    ]
    return found


def training(place: Place, name: str, seed: int, run_dir: Path, leads: Path) -> tuple[str, ...]:
    """The command that trains a row on these leads."""
    row = ROWS[name]
    teacher = trained_judge(place) if row.judge else place.smollm2
    return (
        *(PYTHON, "-m", "megatron_sip", str(place.smollm2), str(leads), "--run-dir", str(run_dir)),
        *(("--teacher", str(teacher)) if row.asks else ()),
        *("--preset", PRESET, *row.flags, "--seed", str(seed)),
        *(QUICK if place.quick else ()),
    )


def _trained(place: Place, run: Run) -> Part:
    run_dir = run.folder(place) / "run"
    words = training(place, run.row, run.seed, run_dir, later_leads(place))
    if run == Run(MAIN, place.seeds[0]):
        # One run also finds the control, the initial policy at 0.7 of the temperature against itself.
        prompts = QUICK_PREFIXES if place.quick else PREFIXES
        words = (*words, "--win-rate-prompts", str(prompts), "--win-rate-temperature", "1.0")
    results = (run_dir / "summary.json", run_dir / "hf" / "config.json", run_dir / "metrics.jsonl")
    return Part(f"train {run.row} {run.seed}", (words,), results, removed=(run_dir / "checkpoints",))


def _measured(place: Place, run: Run) -> Part:
    folder, evaluate = run.folder(place), (PYTHON, "-m", "megatron_sip.evaluate")
    served = ("--url", SERVED_URL, "--tokenizer", str(place.smollm2))
    cut = ("--data-path", str(later_leads(place)), "--split", "90,0,10", "--seq-length", "64", "--suffix-length", "20")
    prefixes, nll_prefixes = (QUICK_PREFIXES,) * 2 if place.quick else (PREFIXES, NLL_PREFIXES)
    results: list[Path] = [folder / "nll.json"]
    commands: list[tuple[str, ...]] = []
    for name, temperature in (("sampled", "1"), ("greedy", "0")):
        sampling = ("--samples", str(prefixes), "--temperature", temperature, "--dataset", "standard")
        results.append(folder / f"{name}.jsonl")
        commands.append((*evaluate, "generate", *served, *cut, *sampling, "--output", str(results[-1])))
    nll = ("--of", "suffix", "--samples", str(nll_prefixes), "--output", str(folder / "nll.json"))
    commands.append((*evaluate, "nll", *served, *cut, *nll))
    return Part(f"measure {run.row} {run.seed}", tuple(commands), tuple(results), served=run.model(place))


def _compared(place: Place, judge: str, made: Mapping[str, str], served: Path) -> Part:
    """By a judge every trained run against the initial one; made: the generations that each file of results is of."""
    criteria = ("likelihood",) if judge == "likelihood" else (QUALITY, "--judge-verdict", "soft")
    commands, results = [], []
    for run in runs(place):
        for name, generations in made.items():
            output = run.folder(place) / name
            base, trained = (str(each.folder(place) / generations) for each in (initial(place), run))
            words = (
                "compare",
                base,
                trained,
                "--criteria",
                *criteria,
                "--teacher-url",
                SERVED_URL,
                "--output",
                str(output),
            )
            commands.append((PYTHON, "-m", "megatron_sip.evaluate", *words))
            results.append(output)
    return Part(f"compared by {judge}", tuple(commands), tuple(results), served=served)
