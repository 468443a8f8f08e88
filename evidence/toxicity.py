"""Safety in small (tables 5 and 6): a policy that learns from offensive text, judged by a classifier of profanity.

Arms start from SmolLM2-135M-Instruct and take the same number of prefixes: next-token training on all pages (the baseline), SFT
on the suffixes that the classifier likes best (what filtering would do), and online DPO of suffix and rollouts, with several
seeds. What they then write behind toxic prompts is judged by what none of them was trained by.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from evidence.criteria import FOLDER
from evidence.study import EVAL_SETS, PYTHON, SERVED_URL, Part, Place, Report, Study
from evidence.toxicity_page import draw, section
from evidence.toxicity_report import CRITERIA, DPO, INITIAL, NEXT_TOKEN, SAFEST, TEXTS, report_of
from evidence.toxicity_text import MANIFEST, PREFIX

NAME = "toxicity"
EVALUATE = (PYTHON, "-m", "megatron_sip.evaluate")
ALL_OF_IT = ("--split", "0,0,1")
PREFIXES_A_STEP = 8
"""Of evidence/toxicity.args."""


@dataclass(frozen=True)
class Sizes:
    """steps: of each arm. prompts: toxic ones, None for all 700, each continued `rollouts` times. prefixes: of
    clean pages. documents: pieces whose likelihood is measured, of either text. passages: of LAMBADA."""

    steps: int = 32
    prompts: int | None = None
    rollouts: int = 3
    prefixes: int = 250
    documents: int = 200
    passages: int = 300


QUICK = Sizes(steps=2, prompts=4, rollouts=2, prefixes=4, documents=4, passages=4)
QUICK_FLAGS = ("--lr-warmup-iters", "0")
"""A warm-up must be shorter than the run."""


def sizes(place: Place) -> Sizes:
    return QUICK if place.quick else Sizes()


def folder(place: Place) -> Path:
    return place.run_dir / NAME


def folders(place: Place) -> dict[str, list[Path]]:
    """By arm the folders of its seeds' runs; the initial model's holds evaluations alone."""
    named = {arm: [folder(place) / arm.replace(" ", "_")] for arm in (INITIAL, NEXT_TOKEN, SAFEST)}
    return named | {DPO: [folder(place) / f"dpo_{seed}" for seed in place.seeds]}


def parts(place: Place) -> list[Part]:
    """Text, then a training and an evaluation for each arm."""
    text = folder(place) / "text"
    fetch = (
        (PYTHON, "tools/fetch_toxicity.py", "--save", str(FOLDER)),
        (PYTHON, "tools/fetch_eval_sets.py", "--save", str(EVAL_SETS)),
        (
            *(PYTHON, "-m", "evidence.toxicity_text", "--pages", str(FOLDER), "--tokenizer", str(place.smollm2)),
            *("--pieces", str(PREFIXES_A_STEP * sizes(place).steps), "--save", str(text)),
        ),
    )
    made = [Part("text", fetch, (text / "train.jsonl", text / "safest.idx", text / "clean.jsonl", text / MANIFEST))]
    arms = folders(place)
    made.append(evaluation(place, INITIAL, arms[INITIAL][0], place.smollm2))
    sft = ("--preset", "evidence/toxicity.args", "--objective", "sft", "--sft-target")
    learns: dict[str, tuple[str, ...]] = {
        NEXT_TOKEN: ("train.jsonl", *sft, "document"),
        SAFEST: ("safest", *sft, "suffix", "--min-prefix-length", str(PREFIX)),
    }
    for arm, (data, *flags) in learns.items():
        made.append(training(place, arm, arms[arm][0], text / data, *flags))
        made.append(evaluation(place, arm, arms[arm][0], arms[arm][0] / "hf"))
    for seed, run_dir in zip(place.seeds, arms[DPO], strict=True):
        dpo = ("--preset", "evidence/toxicity_dpo.args", "--teacher", str(place.smollm2), "--seed", str(seed))
        made.append(training(place, f"{DPO} {seed}", run_dir, text / "train.jsonl", *dpo))
        made.append(evaluation(place, f"{DPO} {seed}", run_dir, run_dir / "hf"))
    return made


def training(place: Place, arm: str, run_dir: Path, pages: Path, *flags: str) -> Part:
    """A run of the command for one node."""
    words = (PYTHON, "-m", "megatron_sip", str(place.smollm2), str(pages), "--run-dir", str(run_dir), *flags)
    command = (*words, "--train-iters", str(sizes(place).steps), *(QUICK_FLAGS if place.quick else ()))
    results = (run_dir / "summary.json", run_dir / "hf" / "config.json")
    return Part(f"{arm}, training", (command,), results, removed=(run_dir / "checkpoints",))


def continuations(place: Place, text: str, out: Path, model: Path, temperature: float = 1.0) -> list[tuple[str, ...]]:
    """Commands that continue one of TEXTS by a served model, judge what it wrote, and count its words."""
    size = sizes(place)
    limit = () if size.prompts is None else ("--limit", str(size.prompts))
    source = {
        "prompts": ("--set", f"realtoxicityprompts={EVAL_SETS / 'realtoxicityprompts.jsonl'}", *limit),
        "clean": (
            *(
                "--data-path",
                str(clean_pages(place)),
                *ALL_OF_IT,
                "--samples",
                str(size.prefixes),
                "--seq-length",
                "64",
            ),
            *("--dataset", "clean"),
        ),
    }[text]
    sampled = ("--suffix-length", "20", "--temperature", f"{temperature:g}", "--num-rollouts", str(size.rollouts))
    served, file = ("--url", SERVED_URL, "--tokenizer", str(model)), str(out / f"{text}.jsonl")
    scores = ("--output", str(out / f"{text}.rated.json"), "--scores", str(out / f"{text}.scores.jsonl"))
    return [
        (*EVALUATE, "generate", *served, *source, *sampled, "--output", file),
        (*EVALUATE, "rate", file, "--criteria", *CRITERIA, *scores),
        (*EVALUATE, "diversity", file, "--output", str(out / f"{text}.diversity.json")),
    ]


def clean_pages(place: Place) -> Path:
    """Those that no arm learns from."""
    return folder(place) / "text" / "clean.jsonl"


def judged_files(text: str) -> tuple[str, ...]:
    """What `continuations` leave that is reported."""
    return f"{text}.jsonl", f"{text}.scores.jsonl", f"{text}.diversity.json"


def evaluation(place: Place, arm: str, out: Path, model: Path) -> Part:
    """Continuations of toxic prompts and of clean pages, judged; likelihoods; LAMBADA."""
    size, served = sizes(place), ("--url", SERVED_URL, "--tokenizer", str(model))
    commands = [command for text in TEXTS for command in continuations(place, text, out, model)]
    for name, data in (("pages", clean_pages(place)), ("leads", place.wiki_leads)):
        what = ("--data-path", str(data), *ALL_OF_IT, "--samples", str(size.documents), "--seq-length", "128")
        commands.append(
            (*EVALUATE, "nll", *served, "--of", "document", *what, "--output", str(out / f"{name}.nll.json"))
        )
    lambada = ("--tasks", "lambada_openai", "--include-path", str(EVAL_SETS), "--limit", str(size.passages))
    commands.append((*EVALUATE, "tasks", *served, *lambada, "--output", str(out / "lambada.json")))
    results = [
        "pages.nll.json",
        "leads.nll.json",
        "lambada.json.questions.jsonl",
        *(name for text in TEXTS for name in judged_files(text)),
    ]
    return Part(f"{arm}, evaluation", tuple(commands), tuple(out / name for name in results), served=model)


def report(place: Place) -> Report:
    return report_of(place, folders(place), folder(place) / "text", asdict(sizes(place)))


STUDY = Study(
    name=NAME,
    question="Does a criterion make continuations less toxic, and at what price?",
    minutes=155,
    parts=parts,
    report=report,
    draw=draw,
    section=section,
)
