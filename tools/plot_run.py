#!/usr/bin/env python3
"""Draw the plots and the report of a run folder, also while the run is still going.

python tools/plot_run.py runs/demo          # writes runs/demo/plots/*.png and runs/demo/report.html
"""

from megatron_sip.evaluation.report import main

if __name__ == "__main__":
    main()
