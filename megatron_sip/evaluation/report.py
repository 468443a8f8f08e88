"""A run's plots and its report.html, from the files of the run folder; works while the run is still going.

    metrics.jsonl      one flat object a step                    required
    run.json           the settings and the command to continue  missing in runs of earlier versions
    samples.jsonl      judged prompts of some steps              missing when nothing was judged
    summary.json       how it ended, with the win rate           missing while it runs
    comparisons.jsonl  held-out continuations before and after   missing while it runs

report.html is one file that needs nothing else: its images are inside.
"""

from __future__ import annotations

import argparse
import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_sip.errors import DataError
from megatron_sip.evaluation.plots import (
    DARK,
    FEW_STEPS,
    LIGHT,
    Plot,
    Steps,
    available_plots,
    average_window,
    render_png,
)
from megatron_sip.evaluation.run_record import RANDOM, RunRecord, read_run_record
from megatron_sip.evaluation.win_rate import FEW_DOCUMENTS
from megatron_sip.experience.samples import PREFIX_CHARACTERS, read_samples
from megatron_sip.files import described, read_json, read_json_lines, write_atomically
from megatron_sip.training.metrics_writer import duration, read_metrics, trained_steps

SAMPLES = 3

COVERED = (
    "the choice of held-out documents, and with it the draws of continuations and votes; not another training run (seed), "
    "nor a judge's mistakes that favour one policy"
)
BIDI_MARKS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
LEFT_OUT = "judge/candidates/dropped/"
OTHER_COUNTS = {
    "merged_candidates": "identical candidates judged as one",
    "packing/cut_tokens": "prefix tokens cut to fit a row",
    "skipped_steps": "steps without an update",
    "non_finite_steps": "of them without a finite loss or gradient",
    "overflows": "passes that overflowed float16",
}


def main() -> None:
    """megatron-sip-report RUN_DIR: write its report; a folder that is not a run's is a usage error."""
    parser = argparse.ArgumentParser(description="Draw the plots and the report of a run folder, also while it runs.")
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="Folder with metrics.jsonl (--run-dir or --save)."
    )
    run_dir = parser.parse_args().run_dir
    try:
        write_report(run_dir)
    except (FileNotFoundError, DataError) as error:
        parser.error(str(error))
    print(f"{run_dir / 'report.html'} and {len(list((run_dir / 'plots').glob('*.png')))} plots in {run_dir / 'plots'}")


def write_report(run_dir: Path) -> None:
    """Write plots/*.png and report.html into `run_dir`.

    Raises:
        FileNotFoundError: there is no metrics.jsonl in it.
        DataError: a file of the folder is cut short, or not of a run.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: name the folder that the run was given as --run-dir or --save")
    steps, summary, comparisons = read_metrics(path), read_summary(run_dir), read_comparisons(run_dir)
    with described(run_dir / "summary.json", "a run's summary"):
        result_rows(steps, summary)
    with described(run_dir / "comparisons.jsonl", "a run's comparisons"):
        _samples(comparisons)
    plots = available_plots(steps)
    images = {plot.name: (render_png(plot, steps, LIGHT), render_png(plot, steps, DARK)) for plot in plots}
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    for name, (light, _) in images.items():
        write_atomically(folder / f"{name}.png", light)
    record, samples = read_run_record(run_dir), read_samples(run_dir)
    drawn = [(plot, *images[plot.name]) for plot in plots]
    page = render_page(run_dir.resolve().name, steps, summary, comparisons, record, samples, drawn)
    write_atomically(run_dir / "report.html", page)


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """summary.json, or None while there is none."""
    path = run_dir / "summary.json"
    return read_json(path, "a run's summary") if path.is_file() else None


def read_comparisons(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of comparisons.jsonl; none while there is no such file."""
    path = run_dir / "comparisons.jsonl"
    return read_json_lines(path, "a comparison") if path.is_file() else []


def render_page(
    name: str,
    steps: Steps,
    summary: Mapping[str, Any] | None,
    comparisons: Sequence[Mapping[str, Any]],
    record: RunRecord | None,
    samples: Sequence[Mapping[str, Any]],
    images: Sequence[tuple[Plot, bytes, bytes]],
) -> str:
    """The whole page. `images`: each plot with its light and its dark PNG."""
    state = "finished" if summary is not None else "not finished"
    done = trained_steps(steps)
    count = f"{done:,} step" + "s" * (done != 1)
    sections = [
        _section("Result", _table(result_rows(steps, summary, record))),
        _section("Training", _figures(images, done) if images else "<p>No step has been finished yet.</p>"),
        _section("Training samples", _training_samples(samples)),
        _section("Before and after", _samples(comparisons)),
        _section("Dropped prompts", _dropped(steps)),
    ]
    if record is not None:
        sections.append(_section("Settings", _settings(record)))
    style = (files("megatron_sip.evaluation") / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(name)} · Self-Improving Pretraining</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{_inline(name)}</h1><p>Self-Improving Pretraining, {count}, {state}</p></header>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def result_rows(
    steps: Steps, summary: Mapping[str, Any] | None, record: RunRecord | None = None
) -> list[tuple[str, str]]:
    """What the run came to, as (name, value) of the summary table."""
    rows = []
    if summary is not None and summary.get("win_rate") is not None:
        low, high = summary["win_rate_ci95"]
        rows.append(
            (
                "Win rate over the initial policy",
                f"{summary['win_rate']:.1%} (95% interval {low:.1%} to {high:.1%}, {summary['prompts']:,} held-out prefixes)",
            )
        )
        rows += [("What the interval covers", COVERED), *honesty_rows(summary)]
        parts = summary.get("win_rate_by_criterion") or {}
        if len(parts) > 1:
            rows.append(("Win rate by criterion", ", ".join(f"{name} {value:.1%}" for name, value in parts.items())))
        documents = summary.get("documents")
        if documents is not None and documents < FEW_DOCUMENTS:
            warning = f"only {documents} documents: too few for a conclusion, {FEW_DOCUMENTS} or more are needed"
            rows.append(("Warning", warning))
        if summary.get("prompts_without_verdict"):
            rows.append(("Prefixes without a verdict", f"{summary['prompts_without_verdict']:,}"))
        if summary.get("mean_scores") is not None:
            before, after = summary["mean_scores"]
            rows.append(("Mean score, initial and trained policy", f"{before:.4g} and {after:.4g}"))
    elif summary is not None:
        rows.append(("Win rate over the initial policy", "not measured (--win-rate-prompts 0)"))
    else:
        rows.append(("Win rate over the initial policy", "measured when the run ends"))
    if summary is not None and summary.get("final_rollout_chosen_rate") is not None:
        chance = summary.get("final_rollout_chosen_chance")
        by_chance = f" (by chance {chance:.1%})" if chance is not None else ""
        rows.append(("Rollout chosen rate, last steps", f"{summary['final_rollout_chosen_rate']:.1%}{by_chance}"))
    rows += validation_rows(steps)
    seconds = sum(step.get("seconds/total", 0.0) for step in steps)
    if record is not None:
        random = "random: --hf-config gave only the architecture"
        rows.append(("Initial weights", random if record.initial_weights == RANDOM else record.initial_weights))
    rows.append(("Steps", f"{trained_steps(steps):,}"))
    rows.append(("Training time", duration(seconds)))
    examples = sum(step.get("examples", 0.0) for step in steps)
    if examples:
        rows.append(("Training examples", f"{examples:,.0f} of {total(steps, 'groups'):,.0f} prompts"))
    return rows


def honesty_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What stands beside a win rate: the control and the diversity; runs of earlier versions have none."""
    rows = []
    if (control := summary.get("control")) is not None:
        low, high = control["win_rate_ci95"]
        rows.append(
            (
                f"Control: the initial policy at temperature {control['temperature']:g} over itself",
                f"{control['win_rate']:.1%} (95% interval {low:.1%} to {high:.1%})",
            )
        )
    if (varied := summary.get("distinct_3")) is not None:
        rows.append(("Distinct 3-grams, initial and trained policy", f"{varied[0]:.1%} and {varied[1]:.1%}"))
    if None not in (nll := summary.get("suffix_nll") or [None]):
        rows.append(("Held-out suffixes, nats a token, initial and trained policy", f"{nll[0]:.3f} and {nll[1]:.3f}"))
    return rows


def validation_rows(steps: Steps) -> list[tuple[str, str]]:
    """What was measured on held-out records, first and last."""
    names = sorted({name for step in steps for name in step if name.startswith("validation/")})
    rows = []
    for name in names:
        found = [(step["step"], step[name]) for step in steps if name in step]
        (first, before), (last, after) = found[0], found[-1]
        shown = f"{before:.3f} (step {first:.0f}), {after:.3f} (step {last:.0f})" if len(found) > 1 else f"{after:.3f}"
        rows.append((f"Held-out records: {' '.join(name.split('/')[1:])}", shown))
    return rows


def total(steps: Steps, name: str) -> float:
    """A count added up over all steps."""
    return sum(step.get(name, 0.0) for step in steps)


def dropped_counts(steps: Steps) -> dict[str, float]:
    """Prompts that gave no example, by reason, most frequent first."""
    names = {name for step in steps for name in step if name.startswith("dropped/")}
    counts = {name.removeprefix("dropped/"): total(steps, name) for name in sorted(names)}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _shown(text: str) -> str:
    """`text` for HTML; marks that would turn the text around them round are spelt out."""
    return escape(BIDI_MARKS.sub(lambda mark: f"⟨U+{ord(mark.group()):04X}⟩", text))


def _inline(text: str) -> str:
    """`text` inside a line, from which it cannot change the direction of the rest."""
    return f"<bdi>{_shown(text)}</bdi>"


def _block(text: str, style: str = "") -> str:
    """`text` as it is, each of its lines in the direction of its own letters."""
    name = f' class="{style}"' if style else ""
    return f'<pre dir="auto"{name}>{_shown(text)}</pre>'


def _settings(record: RunRecord) -> str:
    rows = list(record.settings.items())
    note = "<p>Flags that say something else than the defaults. The same command continues the run, or repeats its end:</p>"
    return f"{note}\n{_block(record.command)}\n{_table(rows, ('Flag', 'Value'))}"


def _training_samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return "<p>No judged prompt was kept.</p>"
    last = len(samples) - 1
    shown = [samples[index] for index in sorted({round(part * last / SAMPLES) for part in range(SAMPLES + 1)})]
    note = f"<p>A prompt of each of {len(shown)} steps from the first to the last, not a selection.</p>"
    return note + "\n" + "\n".join(_training_sample(sample) for sample in shown)


def _training_sample(sample: Mapping[str, Any]) -> str:
    columns = "".join(
        f"<div><h4>{_inline(str(made.get('kind')))}"
        f"<span>{_score(made.get('score'))}{', ' + _inline(str(made['role'])) if made.get('role') else ''}</span></h4>"
        f"{_block(str(made.get('text', '')))}</div>"
        for made in sample["candidates"]
    )
    dropped = f", dropped: {_inline(str(sample['dropped']))}" if sample.get("dropped") else ""
    prefix = _block(_end(str(sample["prefix"])), "prefix")
    return f'<article><h4>Step {int(sample["step"])}{dropped}</h4>{prefix}<div class="candidates">{columns}</div></article>'


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    top = "<thead><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr></thead>" if head else ""
    lines = "\n".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{top}<tbody>\n{lines}\n</tbody></table>"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _figures(images: Sequence[tuple[Plot, bytes, bytes]], count: int) -> str:
    window = average_window(count)
    lines = f"Thin lines show every step, thick lines the mean of the last {window} steps."
    figures = [
        "<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
        f'<img src="{_data_uri(light)}" alt="{escape(plot.title)}"></picture>'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
        for plot, light, dark in images
    ]
    note = f"<p>{lines}</p>\n" if count > FEW_STEPS else ""
    return note + '<div class="plots">\n' + "\n".join(figures) + "\n</div>"


def _samples(comparisons: Sequence[Mapping[str, Any]]) -> str:
    if not comparisons:
        return "<p>There is no held-out comparison (yet).</p>"
    shown = comparisons[:SAMPLES]
    note = f"<p>The first {len(shown)} of {len(comparisons):,} held-out prefixes, not a selection.</p>"
    return note + "\n" + "\n".join(_sample(comparison) for comparison in shown)


def _sample(comparison: Mapping[str, Any]) -> str:
    end = _end(str(comparison["prefix"]))
    before, after = comparison.get("score_before"), comparison.get("score_after")
    sides = (("Initial policy", "before", before), ("Trained policy", "after", after))
    columns = "".join(
        f"<div><h4>{title}<span>{_score(score)}</span></h4>{_block(str(comparison[key]))}</div>"
        for title, key, score in sides
    )
    return f'<article><h4>Prefix</h4>{_block(end, "prefix")}<div class="pair">{columns}</div></article>'


def _end(prefix: str) -> str:
    """What is shown of a prefix."""
    return prefix if len(prefix) <= PREFIX_CHARACTERS else "… " + prefix[-PREFIX_CHARACTERS:]


def _score(score: float | None) -> str:
    return "no verdict" if score is None else f"score {score:.3f}"


def _dropped(steps: Steps) -> str:
    counts = dropped_counts(steps)
    groups = total(steps, "groups")
    rows = [(reason, f"{count:,.0f}", f"{count / groups:.2%}" if groups else "") for reason, count in counts.items()]
    content = _table(rows, ("Reason", "Prompts", "Share")) if rows else "<p>Every prompt gave a training example.</p>"
    others = [(text, f"{total(steps, name):,.0f}") for name, text in OTHER_COUNTS.items() if total(steps, name)]
    left_out = {name for step in steps for name in step if name.startswith(LEFT_OUT)}
    others += [
        (f"candidates left out: {name.removeprefix(LEFT_OUT)}", f"{total(steps, name):,.0f}")
        for name in sorted(left_out)
        if total(steps, name)
    ]
    return content + ("\n<h3>Also counted</h3>\n" + _table(others) if others else "")


if __name__ == "__main__":
    main()
