"""examples/cycle.sh: its commands are understood and read what those before them wrote, and it goes on where it was."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.config.early_checks import check_flags
from megatron_sip.evaluate import command_line as evaluate_command_line
from megatron_sip.judge.__main__ import command_line as judge_command_line
from megatron_sip.one_node.command import CHECKPOINTS_SUBFOLDER, understand
from megatron_sip.prepare.__main__ import command_line as prepare_command_line
from megatron_sip.prepare.__main__ import main as prepare

REPO = Path(__file__).parents[3]
STAND_IN = """#!/bin/bash
# Notes what it is asked for and makes what its program would; at command number $FAILS it ends with status 9 instead, at $STOPS
# it ends well and has made nothing.
printf '%q ' "$@" >> "$NOTES"
echo >> "$NOTES"
number=$(wc -l < "$NOTES")
((number != ${FAILS:-0})) || exit 9
((number != ${STOPS:-0})) || exit 0
case $1 in
    tools/fetch_smollm2.py) echo "$MODELS/smollm2" ;;
    tools/fetch_wiki_leads.py) echo "$MODELS/leads.jsonl" ;;
esac
words=("$@")
for ((i = 0; i < $#; i++)); do
    case ${words[i]} in
        --out) mkdir -p "${words[i + 1]}" && touch "${words[i + 1]}/manifest.json" ;;
        --output | --save) mkdir -p "$(dirname "${words[i + 1]}")" && touch "${words[i + 1]}" ;;
        --run-dir) mkdir -p "${words[i + 1]}/hf" && touch "${words[i + 1]}"/{summary.json,hf/config.json} ;;
        megatron_sip.evaluation.report) touch "${words[i + 1]}/report.html" ;;
    esac
done
"""


def cycle(folder: Path, *words: str, **environment: str) -> tuple[int, list[str], str]:
    """Exit status of the script with a stand-in for Python, the programs that it started, and what it said."""
    notes = folder / "notes"
    notes.write_text("")
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    told = {"PATH": f"{folder}:{os.environ['PATH']}", "NOTES": str(notes), "MODELS": str(folder)}
    command = ["bash", str(REPO / "examples/cycle.sh"), "--run-dir", "run", *words]
    ended = subprocess.run(command, cwd=folder, env=os.environ | told | environment, capture_output=True, text=True)
    lines = [shlex.split(line) for line in notes.read_text().splitlines()]
    return ended.returncode, [f"{line[1]} {line[2]}" if line[0] == "-m" else line[0] for line in lines], ended.stderr


ALL = [
    *("tools/fetch_smollm2.py", "tools/fetch_wiki_leads.py"),
    *("megatron_sip.prepare text", "megatron_sip.prepare dedup", "megatron_sip.prepare roles"),
    "megatron_sip.prepare judgements",
    "megatron_sip JUDGE",
    "megatron_sip.judge accuracy",
    "megatron_sip POLICY",
    *(2 * ["megatron_sip.evaluate generate", "megatron_sip.evaluate diversity", "megatron_sip.evaluate nll"]),
    *("megatron_sip.evaluate table", "megatron_sip.evaluation.report RUN/policy"),
]


def expected(folder: Path) -> list[str]:
    model = str(folder / "smollm2")
    names = {"JUDGE": model, "POLICY": model, "RUN": str(folder / "run")}
    shown = ALL
    for name, path in names.items():
        shown = [line.replace(name, path) for line in shown]
    return shown


def test_a_cycle_runs_each_stage_once_and_then_none(tmp_path: Path) -> None:
    assert cycle(tmp_path)[:2] == (0, expected(tmp_path))
    assert cycle(tmp_path)[:2] == (0, ALL[:2])


@pytest.mark.parametrize("command", range(3, len(ALL) + 1))
def test_one_that_fails_or_is_stopped_anywhere_goes_on_with_that_stage(command: int, tmp_path: Path) -> None:
    status, programs, said = cycle(tmp_path, FAILS=str(command))
    assert (status, programs) == (9, expected(tmp_path)[:command])
    assert "the same command continues" in said
    done = {path.name for path in (tmp_path / "run").glob("done/*")}
    status, programs, _ = cycle(tmp_path)
    assert status == 0
    again = programs[2:]
    assert again == expected(tmp_path)[-len(again) :]
    assert expected(tmp_path)[command - 1] in again
    starts = {"judgements": 5, "judge": 6, "accuracy": 7, "policy": 8, "evaluation": 9, "report": 15}
    assert len(ALL) - len(again) == max([2, *(starts[name] for name in starts if command > starts[name])])
    assert len(done) == sum(command > start for start in starts.values())


def test_a_trainer_that_was_stopped_ends_the_script_well_and_its_stage_is_not_done(tmp_path: Path) -> None:
    status, programs, said = cycle(tmp_path, STOPS="7")
    assert (status, programs) == (0, expected(tmp_path)[:7])
    assert "stopped before the end of 'judge'" in said
    assert cycle(tmp_path)[1] == [*ALL[:2], *expected(tmp_path)[6:]]


def test_a_folder_holds_one_cycle(tmp_path: Path) -> None:
    cycle(tmp_path, STOPS="7")
    status, programs, said = cycle(tmp_path, "--", "--lr", "1e-4")
    assert (status, programs) == (2, ALL[:2])
    assert "cycle of other settings" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "large"], "--size large: small or paper"),
        (["--size", "paper"], "needs --policy, --judge and --data"),
        (["--sise", "small"], "unknown option --sise"),
        (["--policy"], "--policy needs a value"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(words: list[str], message: str, tmp_path: Path) -> None:
    status, programs, said = cycle(tmp_path, *words)
    assert (status, programs) == (2, [])
    assert message in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["small", "paper"])
def test_a_dry_run_shows_commands_that_their_programs_understand(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    run, model = tmp_path / "run", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    texts = tmp_path / "text.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"{number} bottles of beer on the wall. " * 9}) + "\n" for number in range(40))
    )
    words = ["--size", size, "--policy", str(model), "--judge", str(model), "--data", str(texts), "--run-dir", str(run)]
    command = ["bash", "examples/cycle.sh", *words, "--dry-run", "--", "--lr", "2e-5"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not run.exists()
    lines = [shlex.split(line)[1:] for line in shown.splitlines() if not line.startswith("#")]
    for folder in ("judge", "policy"):  # which are there when the next stage reads them
        (run / folder / "hf").mkdir(parents=True)
        (run / folder / "hf" / "config.json").write_text("{}")
    (run / "judgements").mkdir()
    (run / "judgements" / "judgements.jsonl").write_text("{}\n")
    assert len(lines) == len(ALL) - 2
    trained = []
    for _, program, *rest in lines:
        if program == "megatron_sip.prepare" and rest[0] != "judgements":
            prepare(rest)  # the corpus, which the policy's flags are checked against
        elif program == "megatron_sip.prepare":
            prepare_command_line().parse_args(rest)
        elif program == "megatron_sip.judge":
            assert judge_command_line().parse_args(rest).judge_verdict == {"small": "soft", "paper": "hard"}[size]
        elif program == "megatron_sip.evaluate":
            evaluate_command_line().parse_args(rest)
        elif program == "megatron_sip":
            trained.append(check_flags([*understand(rest).flags, "--rollout-local", "1", "--hf-config", str(model)]))
    judge, policy = trained
    assert (judge.tasks, judge.objective) == ("judgements", "grpo")
    assert (policy.objective, policy.lr, policy.subset) == ("dpo", 2e-5, "policy")
    assert policy.teacher_model == str(run / "judge" / "hf")


class Job:
    """examples/cycle.sbatch in a folder, with a Python that waits until it is stopped, and a scontrol as told."""

    def __init__(self, folder: Path, scontrol: str) -> None:
        self.folder = folder
        (folder / "examples").mkdir()
        for name in ("cycle.sh", "slurm_job.sh", "slurm_servers.sh"):
            shutil.copy(REPO / "examples" / name, folder / "examples")
        programs = folder / ".venv" / "bin"  # where the job looks for Python
        programs.mkdir(parents=True)
        waits = "trap 'echo saved >> saved; exit 0' TERM; touch waiting; while true; do sleep 0.05; done"
        (programs / "python").write_text(f"#!/bin/bash\ncase $2 in megatron_sip.prepare) {waits} ;; esac\necho model\n")
        (programs / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> asked\n{scontrol}\n')
        for program in programs.iterdir():
            program.chmod(0o755)

    def stopped(self) -> int:
        """The job's status when it is told to stop while it works."""
        (self.folder / "waiting").unlink(missing_ok=True)
        environment = os.environ | {"SLURM_SUBMIT_DIR": str(self.folder), "SLURM_JOB_ID": "7"}
        command = ["bash", str(REPO / "examples" / "cycle.sbatch"), "--run-dir", "run"]
        job = subprocess.Popen(command, cwd=self.folder, env=environment)
        try:
            deadline = time.monotonic() + 30
            while not (self.folder / "waiting").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            job.terminate()
            return job.wait(30)
        finally:
            job.kill()

    def requeues(self) -> int:
        return (self.folder / "asked").read_text().splitlines().count("requeue incomplete 7")


def test_a_job_that_is_stopped_before_its_time_limit_saves_and_is_requeued_while_it_comes_further(
    tmp_path: Path,
) -> None:
    job = Job(tmp_path, "")
    assert [job.stopped() for _ in range(4)] == [0, 0, 0, 1]
    assert job.requeues() == 3
    checkpoints = tmp_path / "run" / "judge" / CHECKPOINTS_SUBFOLDER
    checkpoints.mkdir(parents=True)
    (checkpoints / TRACKER).write_text("25")
    assert (job.stopped(), job.requeues()) == (0, 4)
    for _ in range(3):
        job.stopped()
    for no_progress in (
        "text/.staged/half",
        "text/.a.staged",
        "text/.a.host.7.partial",
        "base/standard.jsonl.server.log",
    ):
        path = tmp_path / "run" / no_progress
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of what begins anew, or is longer at each start")
    assert (job.stopped(), job.requeues()) == (1, 6)
    for requeues, written in enumerate(
        ("judgements/.made.jsonl", "corpus/documents/policy/train/0.jsonl.zst"), start=7
    ):
        path = tmp_path / "run" / written
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("what a stage without checkpoints has written\n")
        assert (job.stopped(), job.requeues()) == (0, requeues)
    assert (tmp_path / "saved").read_text() == 11 * "saved\n"


@pytest.mark.parametrize(
    ("scontrol", "requeues"), [("echo JobId=7 JobState=COMPLETING Reason=None", 0), ("[[ $1 != requeue ]]", 1)]
)
def test_a_cancelled_job_is_not_requeued_and_one_that_slurm_does_not_requeue_has_not_failed(
    scontrol: str, requeues: int, tmp_path: Path
) -> None:
    job = Job(tmp_path, scontrol)
    assert (job.stopped(), job.requeues()) == (0, requeues)


def test_several_files_and_servers_and_no_model_where_none_is_needed(tmp_path: Path) -> None:
    words = ["--data", "a.jsonl", "b c.jsonl", "--teacher-url", "http://a", "http://b", "--policy", "p", "--judge", "j"]
    assert cycle(tmp_path, *words)[1][0] == "megatron_sip.prepare text"
    asked = [shlex.split(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert asked[0][3:6] == ["--data-path", f"{tmp_path}/a.jsonl", f"{tmp_path}/b c.jsonl"]
    assert [word for word in asked[3] if word.startswith("http")] == ["http://a", "http://b"]


def test_a_folder_that_was_killed_while_it_was_made_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cycle.txt").touch()
    assert cycle(tmp_path, STOPS="7")[0] == 0
    assert cycle(tmp_path, "--", "--lr", "1e-4")[0] == 2
