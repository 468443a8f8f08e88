"""What is published of the studies: a JSON file and a figure each, and the page that is written from the JSON files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, write_report
from evidence.study import ROOT, Place, Report, Study, StudyError, Work, commit
from megatron_sip.files import read_json, write_atomically

PACKAGES = ("megatron_sip", "megatron-core", "sglang", "torch", "transformers", "lm-eval", "numpy")
HEAD = """# What Self-Improving Pretraining buys, measured here

Written by `python -m evidence` (`make evidence`) from `docs/results/evidence_*.json`, which name commit, machine, seeds and
versions; not by hand. All of it is SmolLM2-135M-Instruct, or smaller, on two CPU cores, with pieces of tens of tokens and
steps by tens, from scratch by hundreds: it shows directions and what to look out for, not what a model of use would gain.
"""


def publish(study: Study, report: Report, place: Place, work: Work, results: Path) -> None:
    """Write the study's JSON. Raises StudyError when it holds a path of this machine."""
    published = {
        "question": study.question,
        "machine": describe_machine(),
        "processors": list(work.processors),
        "commits": list(dict.fromkeys([*work.commits, commit()])),  # the last one's code wrote the report
        "versions": {name: version(name) for name in PACKAGES},
        "seeds": report.get("seeds", list(place.seeds)),
        "seconds": round(sum(work.seconds.values())),
        "part_seconds": {name: round(seconds) for name, seconds in work.seconds.items()},
        "report": report,
    }
    refuse_paths(published, (str(place.run_dir), str(ROOT), str(Path.home())))
    write_report(json_of(study.name, results), published, sort=False)  # the page's rows are in the report's order


def write_page(studies: Iterable[Study], results: Path) -> None:
    """Write the page beside the folder of results, and the figures into it."""
    studies = list(studies)
    for study in studies:
        if json_of(study.name, results).exists():
            study.draw(_read(study.name, results)["report"], figure_of(study.name, results))
    write_atomically(page_of(results), page(studies, results))


def page(studies: Iterable[Study], results: Path) -> str:
    """The page: a section for each study that has a JSON file, and the names of those that were not run yet."""
    sections, missing = [HEAD], []
    for study in studies:
        if not json_of(study.name, results).exists():
            missing.append(f"- **{study.name}**: {study.question}")
            continue
        found = _read(study.name, results)
        image = f"![{study.name}]({results.name}/{figure_of(study.name, results).name})"
        text = study.section(found["report"]).strip()
        sections.append("\n\n".join([f"## {study.question}", image, text, provenance(study, found)]) + "\n")
    if missing:
        sections.append("## Not run yet\n\n" + "\n".join(missing) + "\n")
    return "\n".join(sections)


def provenance(study: Study, found: Mapping[str, Any]) -> str:
    """Where the figures come from, in a line."""
    machine, seeds = found["machine"], ", ".join(map(str, found["seeds"]))
    commits = ", ".join(each[:12] + each[40:] for each in found["commits"])
    processors = " and of ".join(found.get("processors") or [machine["processor"]])
    return (
        f"`docs/results/evidence_{study.name}.json`: commit {commits}, seeds {seeds}, "
        f"{found['seconds'] / 60:.0f} minutes on {machine['cores']} cores of {processors}. "
        f"Again: `python -m evidence --only {study.name}`."
    )


def json_of(name: str, results: Path) -> Path:
    """The study's JSON file."""
    return results / f"evidence_{name}.json"


def figure_of(name: str, results: Path) -> Path:
    """The study's figure."""
    return results / f"evidence_{name}.png"


def page_of(results: Path) -> Path:
    """docs/results.md of docs/results."""
    return results.with_suffix(".md")


def _read(name: str, results: Path) -> Mapping[str, Any]:
    return read_json(json_of(name, results), "a study's results")


def refuse_paths(value: Any, roots: Iterable[str]) -> None:
    """Raises StudyError for a text anywhere in `value` that holds one of `roots`."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            refuse_paths([name, inner], roots)
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_paths(inner, roots)
    elif isinstance(value, str) and (root := next((root for root in roots if root in value), None)):
        raise StudyError(f"a report must hold no path of this machine, and {value!r} holds {root}")
