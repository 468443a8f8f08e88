#!/usr/bin/env python3
"""Draw the plots and the report of a run folder, also while the run is still going.

python tools/plot_run.py runs/demo          # writes runs/demo/plots/*.png and runs/demo/report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sip.data.errors import DataError
from megatron_sip.evaluation.report import write_report


def main() -> None:
    """Parse RUN_DIR and write its report; a folder that is not a run's is a usage error."""
    parser = argparse.ArgumentParser(description="Draw the plots and the report of a run folder.")
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="Folder with metrics.jsonl (--run-dir or --save)."
    )
    run_dir = parser.parse_args().run_dir
    try:
        write_report(run_dir)
    except (FileNotFoundError, DataError) as error:
        parser.error(str(error))
    print(f"{run_dir / 'report.html'} and {len(list((run_dir / 'plots').glob('*.png')))} plots in {run_dir / 'plots'}")


if __name__ == "__main__":
    main()
