"""Run the studies, resumably, and write what they found: docs/results/evidence_NAME.json, a figure each, and docs/results.md.

    python -m evidence [--only NAME ...] [--run-dir runs/evidence] [--dry-run]      # or: make evidence ONLY=NAME
    python -m evidence --page                                       # docs/results.md and the figures again, from the JSON files

A study that was stopped goes on with the same command; docs/results.md is written from the JSON files and by nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evidence import cooler, cost, from_scratch, judge, objectives_report, tasks, toxicity
from evidence.results import publish, write_page
from evidence.study import ROOT, Place, Study, do_parts, fetched
from megatron_sip.console import say
from megatron_sip.errors import UserError

ALL: tuple[Study, ...] = (
    judge.STUDY,
    objectives_report.STUDY,
    tasks.STUDY,
    toxicity.STUDY,
    cooler.STUDY,
    from_scratch.STUDY,
    cost.STUDY,
)
STUDIES: Mapping[str, Study] = {study.name: study for study in ALL}
"""In the order of the page; a study that asks another one's model stands behind it."""


def main(words: Sequence[str] | None = None) -> None:
    """Do what the command line says; a line on stderr and exit status 1 when that cannot be."""
    given = command_line().parse_args(words)
    try:
        run(given)
    except (UserError, OSError) as error:
        sys.exit(f"evidence: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="NAME", help=", ".join(STUDIES)
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/evidence"), help="where they work, a folder each")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "docs" / "results", help="where JSON files and figures go"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the main comparisons")
    parser.add_argument(
        "--quick", action="store_true", help="as small as possible, in RUN_DIR-quick; nothing is published"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    parser.add_argument("--page", action="store_true", help="only write the page and figures from the JSON files")
    return parser


def run(given: argparse.Namespace) -> None:
    """`main` for what was given."""
    results = given.results.resolve()
    if given.page:
        write_page(STUDIES.values(), results)
        return
    place = Place(given.run_dir.resolve(), tuple(given.seeds), given.quick)
    if given.quick:
        place = replace(place, run_dir=place.run_dir.with_name(place.run_dir.name + "-quick"), seeds=place.seeds[:2])
    if not given.dry_run:
        place = replace(place, smollm2=fetched("fetch_smollm2.py"), wiki_leads=fetched("fetch_wiki_leads.py"))
    os.chdir(ROOT)  # which the commands' paths start from
    for study, needed in chosen(given.only):
        if needed is None:
            say(f"# {study.name}: {study.question} (about {study.minutes} minutes on two cores with AVX2 alone)")
        parts = [part for part in study.parts(place) if needed is None or part.name in needed]
        work = do_parts(parts, study.folder(place), dry_run=given.dry_run)
        if given.dry_run or needed is not None:
            continue
        report = study.report(place)
        say(study.section(report))
        if not given.quick:
            publish(study, report, place, work, results)
            write_page(STUDIES.values(), results)


def chosen(names: Sequence[str]) -> list[tuple[Study, set[str] | None]]:
    """Those of these names, and of the studies that they need the parts that they need, in the order of the page."""
    needed: dict[str, set[str]] = {}
    for name in names:
        for other, parts in STUDIES[name].needs.items():
            needed.setdefault(other, set()).update(parts)
    found = [(study, None if name in names else needed.get(name)) for name, study in STUDIES.items()]
    return [(study, parts) for study, parts in found if study.name in names or parts]


if __name__ == "__main__":
    main()
