"""One command for one node: from a Hugging Face model and texts to a trained Hugging Face model.

    megatron-sip HF_DIR 'my/*.jsonl' --teacher HF_DIR2 [--preset NAME] [--run-dir DIR] [flags of the trainer]

It converts the model into a cache, divides this node's GPUs between trainer, engines and teachers (without GPUs all run on the
CPU), starts everything, trains, and writes the trained model to RUN_DIR/hf. The same command again continues the run. Ctrl-C
and SIGTERM reach the trainer, which saves its last step. For several nodes see examples/*.sbatch.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.config.checks import explained, refuse
from megatron_sip.config.early_checks import check_flags, words_by_flag
from megatron_sip.config.needs import Needs
from megatron_sip.config.presets import FLAG as PRESET_FLAG
from megatron_sip.config.presets import expand_presets
from megatron_sip.console import log_tail, say
from megatron_sip.errors import ArgumentError
from megatron_sip.files import move_into_place
from megatron_sip.hf.converted import converted_checkpoint
from megatron_sip.hf.folder import HF_SUBFOLDER
from megatron_sip.one_node.layout import Demand, Layout, LayoutError, plan_layout
from megatron_sip.one_node.ranks import LocalRanks
from megatron_sip.serving.launch import PASSIVE_WAITING

PROGRAM = "megatron-sip"
USAGE = f"usage: {PROGRAM} HF_DIR 'my/*.jsonl' --teacher HF_DIR2 [--preset NAME] [--run-dir DIR] [flags of the trainer]"
DEFAULT_PRESET = "continual"
CHECKPOINTS_SUBFOLDER = "checkpoints"
"""Of the run's folder; examples/cycle.sbatch looks there how far a stage has come."""
GPU_MEMORY = (
    "import json, torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
    "print(json.dumps([torch.cuda.get_device_properties(i).total_memory for i in range(n)]))"
)
CPU_ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30), **PASSIVE_WAITING}
"""Heap reuse: without it most of the time of large CPU tensors is page faults. Trainer and servers share the cores."""
GPU_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
"""Megatron demands it for tensor parallelism on GPUs before Blackwell."""


OWN_FLAGS = {
    "--save": "checkpoints lie in RUN_DIR/checkpoints, from where the trained model is exported; give --run-dir",
    "--hf-config": "the first word names the model",
    "--pretrained-checkpoint": "the first word names the model, which is converted once and kept",
    "--data-path": "texts come behind the model",
    "--colocate": "this command gives engines GPUs of their own, or shares one; it is for the trainer started by hand",
}
"""Flags of the trainer that this command gives itself."""


@dataclass(frozen=True, slots=True)
class Request:
    """The command line, understood. words: as it was typed. flags: the trainer's, with presets expanded."""

    words: list[str]
    model: Path
    run_dir: Path
    flags: list[str]


def main() -> None:
    """Convert, divide, start, train, export; exits with the trainer's status, or 130 on a Ctrl-C while there is none."""
    try:
        run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)


def run(words: Sequence[str]) -> None:
    """`main` for the words of a command line."""
    if not words or words[0] in ("-h", "--help"):
        say(f"{__doc__}\nUnless given: --preset {DEFAULT_PRESET}, --run-dir runs/NAME_OF_HF_DIR. The trainer's flags: "
            "python -m megatron_sip.train --help")  # fmt: skip
        return
    request = understand(words)
    model = ["--hf-config", str(request.model)]
    flags = check_flags([*request.flags, *local_servers(request.flags), *model])
    trainer = [sys.executable, "-m", "megatron_sip.train"]
    if flags.dry_run or flags.help_megatron:
        sys.exit(LocalRanks([*trainer, *request.flags, *model]).wait())
    needs = Needs.from_args(flags)
    wanted = ((flags.teacher_model, needs.teacher), (flags.rewriter_model, needs.rewriter))
    teachers = [Path(model) for model, is_needed in wanted if model is not None and is_needed]
    demand = Demand(
        policy_bytes=weight_bytes(request.model),
        teacher_bytes=max(map(weight_bytes, teachers), default=0),
        prompts=flags.global_batch_size or 0,
        engines=needs.engines and not flags.rollout_url,
        teacher=flags.teacher_model is not None and needs.teacher,
        rewriter=flags.rewriter_model is not None and needs.rewriter,
        samples=needs.samples,
        judges=needs.judges or needs.rewriter,
        own_engines=flags.rollout_local if "--rollout-local" in request.flags else 0,
        own_teachers=flags.teacher_replicas if "--teacher-replicas" in request.flags else 0,
        own_tensor=flags.tensor_model_parallel_size if "--tensor-model-parallel-size" in request.flags else 0,
        own_pipeline=flags.pipeline_model_parallel_size if "--pipeline-model-parallel-size" in request.flags else 0,
        shares=flags.local_server_memory is not None,
    )
    layout, on_gpus = lay_out(demand)
    say(f"layout: {layout}" + ("" if on_gpus else ", on the CPU"))
    with explained(str(request.model)):
        checkpoint = ["--pretrained-checkpoint", str(converted_checkpoint(request.model))]
    given = [*request.flags, *layout_flags(layout, request.flags), *checkpoint]
    own_choice = {name: os.environ.get(name, value) for name, value in CPU_ENVIRONMENT.items()}
    environment = GPU_ENVIRONMENT if on_gpus else own_choice
    command = [*trainer, *given, "--started-as", shlex.join([PROGRAM, *request.words])]
    status = LocalRanks(command, layout.trainers, environment).wait()
    if status < 0:
        said = f"the trainer was ended by signal {-status}; its log's last lines:"
        say("\n".join([said, *last_lines(request.run_dir)]))
    if status:
        sys.exit(status if status > 0 else 128 - status)
    if (request.run_dir / "summary.json").is_file():  # and not when it was stopped
        export(request.run_dir)


def understand(words: Sequence[str]) -> Request:
    """The command line as a request.

    Raises:
        ArgumentError: no model or no text is named, the model's folder is none, or a flag is this command's own.
    """
    chunks = words_by_flag(words)
    texts = [word for flag, values in chunks if not flag for word in values]
    named = {flag: values for flag, values in chunks if flag in ("--teacher", "--run-dir")}
    rest = [word for flag, values in chunks if flag and flag not in named for word in (flag, *values)]
    if len(texts) < 2:
        raise ArgumentError(f"a model folder and texts come first\n{USAGE}")
    for flag, values in named.items():
        if len(values) != 1:
            raise ArgumentError(f"{flag} takes one folder, not {len(values)}: quote patterns of files; {USAGE}")
    refuse(f"{flag}: {instead}" for flag, instead in OWN_FLAGS.items() if flag in expand_presets(rest))
    model = Path(texts[0])
    if not (model / "config.json").is_file():
        raise ArgumentError(
            f"{model}: no config.json there; the first word is the folder of a Hugging Face model, "
            "such as `hf download NAME --local-dir DIR` makes"
        )
    run_dir = Path(named.get("--run-dir", [f"runs/{model.resolve().name}"])[0])
    teacher = ["--teacher-model", *named["--teacher"]] if "--teacher" in named else []
    preset = [] if any(flag == PRESET_FLAG for flag, _ in chunks) else [PRESET_FLAG, DEFAULT_PRESET]
    folders = ["--save", str(run_dir / CHECKPOINTS_SUBFOLDER), "--run-dir", str(run_dir)]
    flags = expand_presets([*preset, *folders, "--data-path", *texts[1:], *teacher, *rest])
    return Request(list(words), model, run_dir, flags)


def local_servers(flags: Sequence[str], engines: int = 1) -> list[str]:
    """Engines of this node, unless others are named."""
    return [] if "--rollout-url" in flags or "--rollout-local" in flags else ["--rollout-local", str(engines)]


def layout_flags(layout: Layout, flags: Sequence[str]) -> list[str]:
    """The trainer's flags that make `layout` of it; those that the user gave stay."""
    wanted = local_servers(flags, layout.engines) if layout.engines else []
    if layout.teachers > 1 and "--teacher-replicas" not in flags:
        wanted += ["--teacher-replicas", str(layout.teachers)]
    if "--tensor-model-parallel-size" not in flags:
        wanted += ["--tensor-model-parallel-size", str(layout.tensor_parallel)]
    if layout.server_memory is not None and "--local-server-memory" not in flags:
        wanted += ["--local-server-memory", str(layout.server_memory)]
    return wanted


def lay_out(demand: Demand) -> tuple[Layout, bool]:
    """The layout for this node, and whether it has GPUs. Raises ArgumentError when the models do not fit."""
    answer = subprocess.run([sys.executable, "-c", GPU_MEMORY], capture_output=True, text=True, check=True)
    gpus = json.loads(answer.stdout.splitlines()[-1])
    try:
        return plan_layout(gpus, demand), bool(gpus)
    except LayoutError as error:
        raise ArgumentError(str(error)) from None


def weight_bytes(folder: Path) -> int:
    """The size of an HF folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def export(run_dir: Path) -> None:
    """Write the last checkpoint as an HF folder RUN_DIR/hf, unless that is newer. Exits with the converter's status."""
    checkpoints, target = run_dir / CHECKPOINTS_SUBFOLDER, run_dir / HF_SUBFOLDER
    exported = target / "config.json"
    if exported.is_file() and exported.stat().st_ctime_ns > (checkpoints / TRACKER).stat().st_mtime_ns:
        return
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    say(f"exporting the trained model to {target}")
    run_converter(checkpoints, partial)
    shutil.rmtree(target, ignore_errors=True)
    move_into_place(partial, target)
    say(f"the trained model is in {target}")


def run_converter(checkpoints: Path, target: Path) -> None:
    """Export in a process of its own; its errors are its own to tell."""
    converter = [sys.executable, "-m", "megatron_sip.hf.convert", "megatron-to-hf"]
    status = LocalRanks([*converter, "--load", str(checkpoints), "--save", str(target)]).wait()
    if status:
        sys.exit(status if status > 0 else 128 - status)


def last_lines(run_dir: Path) -> list[str]:
    """The end of the trainer's log."""
    path = run_dir / "logs" / "output.log"
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return log_tail(file)


if __name__ == "__main__":
    main()
