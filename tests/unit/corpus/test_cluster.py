"""A corpus by datatrove's tasks, started as SLURM starts them, is the one that the command makes on one node."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from prepare_cases import files_below, run
from raw_corpus_cases import GOOD, write_redpajama

REPO = Path(__file__).parents[3]
STAND_INS = {
    # runs each task of an array, or does nothing of the job that only sums statistics up
    "sbatch": """script=$(cat "${@: -1}")
[[ $script == *merge_stats* ]] || for ((i = 0; i <= $(sed -n 's/^#SBATCH --array=0-//p' <<< "$script"); i++)); do
    SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=node SLURM_JOB_ID=7 bash -c "$script" > /dev/null || exit 1
done
echo Submitted batch job 7""",
    "srun": 'while [[ $1 != launch_pickled_pipeline ]]; do shift; done; exec "$@"',
    "scontrol": "echo node",
}


def on_slurm(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What the tool says, with stand-ins for SLURM on the PATH."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [
        sys.executable,
        str(REPO / "tools/prepare_on_slurm.py"),
        "--tasks",
        "2",
        "--partition",
        "cpu",
        "--",
        *words,
    ]
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPO)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)


def corpus_files(folder: Path) -> dict[str, bytes]:
    """Without datatrove's logs."""
    return {name: content for name, content in files_below(folder).items() if not name.startswith(".slurm/")}


def test_tasks_of_slurm_and_one_node_make_the_same_corpus(tmp_path: Path) -> None:
    for number in range(3):
        scores = [GOOD | {"rps_doc_ldnoobw_words": float(i + number)} for i in range(9)]
        write_redpajama(tmp_path, f"2023-06/{number:04d}/en_head.json.gz", scores)
    words = ("redpajama", "--keep", "unsafe", "--data-path", str(tmp_path / "documents/**/*.json.gz"))
    run(*words, "--out", tmp_path / "one")
    said = on_slurm(tmp_path, *words, "--out", str(tmp_path / "many"))
    assert said.returncode == 0, said.stderr
    assert sorted(path.name for path in (tmp_path / "many/.slurm/completions").iterdir()) == ["00000", "00001"]
    made = corpus_files(tmp_path / "many")
    whole = files_below(tmp_path / "one")
    manifest = whole.pop("manifest.json")
    assert made == whole
    (tmp_path / "many/documents/1-en_head.jsonl.zst").unlink()
    assert on_slurm(tmp_path, *words, "--out", str(tmp_path / "many")).returncode == 0
    assert corpus_files(tmp_path / "many") == whole
    [*_, last] = said.stdout.splitlines()
    assert last == "afterwards: megatron-sip-prepare " + shlex.join((*words, "--out", str(tmp_path / "many")))
    run(*words, "--out", tmp_path / "many")
    assert corpus_files(tmp_path / "many") == whole | {"manifest.json": manifest}
    refused = on_slurm(tmp_path, *words, "--unsafe-tags", "or", "--out", str(tmp_path / "many"))
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(f"error: --out {tmp_path / 'many'} holds other work")
