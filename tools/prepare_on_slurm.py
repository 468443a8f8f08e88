#!/usr/bin/env python
"""Make a corpus with tasks on many nodes: `redpajama`, `slimpajama` or `text` of megatron-sip-prepare by datatrove and SLURM.

    python tools/prepare_on_slurm.py --tasks 500 --time 12:00:00 --partition cpu -- \\
        redpajama --keep unsafe --data-path '/data/rp/documents/**/*.json.gz' --out /data/unsafe

When the job is over, the same command of megatron-sip-prepare writes the manifest, and makes what a failed task left out. Give
folders that all nodes share; OUT/.slurm has datatrove's logs. Needs the extra `cluster-data`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from datatrove.executor import SlurmPipelineExecutor

from megatron_sip.config.corpus_flags import CORPORA, corpus_work
from megatron_sip.corpus.cluster import MakeShards
from megatron_sip.errors import UserError
from megatron_sip.prepare.__main__ import command_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, required=True, help="Tasks of a core each; no more than there are shards.")
    parser.add_argument("--time", default="12:00:00", help="Limit of a task, as sbatch is given it.")
    parser.add_argument("--partition", required=True)
    parser.add_argument("--qos", default="", help="Quality of service.")
    parser.add_argument("--memory-gb", type=int, default=1, help="Of a task.")
    parser.add_argument("--at-once", type=int, default=-1, help="Tasks that run at the same time. Default: all.")
    parser.add_argument(
        "--env-command", default="", help="What a task needs first: 'source /shared/.venv/bin/activate'."
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command of megatron-sip-prepare.")
    given = parser.parse_args()
    words = [word for word in given.command if word != "--"]
    if words[:1] == [] or words[0] not in CORPORA:
        parser.error(f"behind -- stands a command of megatron-sip-prepare: {', '.join(CORPORA)}")
    wanted = command_line().parse_args(words)
    out = Path(wanted.out).resolve()
    try:
        step = MakeShards(corpus_work(wanted.command, wanted), out)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    SlurmPipelineExecutor(
        [step],
        tasks=min(given.tasks, len(step.work.shards)),
        workers=given.at_once,
        time=given.time,
        partition=given.partition,
        qos=given.qos,
        mem_per_cpu_gb=given.memory_gb,
        env_command=given.env_command or None,
        job_name=f"corpus-{out.name}",
        logging_dir=str(out / ".slurm"),
        skip_completed=False,  # a task sees by itself which of its shards are there
    ).run()
    print(f"afterwards: megatron-sip-prepare {shlex.join(words)}")


if __name__ == "__main__":
    main()
