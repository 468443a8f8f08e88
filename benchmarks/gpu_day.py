"""Builds, checks and measures what needs a GPU, part by part, within a time; see gpu_day.sh.

Every part is a program of its own with a bound of its own. What it gave, or why it gave nothing, is in the JSON before the
next one begins; none ends the others. Exit status 1 where a part went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_day_parts import ON_GPU, REHEARSED, TINY_MODEL, Part, parts_of

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
WORK = ROOT / "build" / "gpu_day"
"""The package with the kernels that are built here: the checkout's own stay as they are. Every start removes it."""
FIGURES = ROOT / "build" / "gpu_day.json"
TAIL = 1500
"""Characters of a failed part's output that are kept."""
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 131, "tie_word_embeddings": False, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "dtype": "bfloat16",
}  # fmt: skip
"""The rehearsal's model."""


def build(work: Path) -> Part:
    """The kernels, into `work`."""
    program = ("setup.py", "build_ext", "--build-lib", str(work), "--build-temp", str(work / "objects"))
    return Part("build", program, 280, None)


@dataclass(frozen=True)
class Outcome:
    """Of a part. trouble: why it has no report, or a bad one; None when all is well."""

    seconds: float
    report: Any = None
    trouble: str | None = None


def run(part: Part, work: Path, environment: Mapping[str, str], left_s: float) -> Outcome:
    """Run a part for `left_s` at most, with its output and report in `work`; what goes wrong is in the outcome."""
    if left_s < 1:
        return Outcome(0.0, trouble="left out: no time was left")
    if part.needs is not None and shutil.which(part.needs) is None:
        return Outcome(0.0, trouble=f"left out: no {part.needs} here")
    result, log = work / "report.json", work / "output.log"
    result.unlink(missing_ok=True)
    command = [*part.before, sys.executable, *part.program, *((part.report, str(result)) if part.report else ())]
    bound, started = min(part.bound_s, left_s), time.monotonic()
    trouble: str | None = None
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(bound)
        except subprocess.TimeoutExpired:
            trouble = f"not ended after {bound:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if trouble is None and status:
        trouble = f"status {status}"
    report = None
    try:
        report = json.loads(result.read_text()) if result.exists() else None
    except ValueError as error:
        trouble = trouble or f"its report is broken, {error}"
    if trouble is not None:
        trouble += f": {without_paths(log.read_text(errors='replace')[-TAIL:])}"
    return Outcome(round(time.monotonic() - started, 1), report, trouble)


def without_paths(text: str) -> str:
    """Output as it may be published."""
    for path, name in ((str(ROOT), "."), (sys.prefix, "PYTHON"), (sys.base_prefix, "PYTHON"), (str(Path.home()), "~")):
        text = text.replace(path, name)
    return text


def install(wheels: Path, work: Path) -> Part:
    """A folder's wheels, beside what the machine has."""
    program = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(work / "site"))
    return Part("wheels", (*program, *map(str, sorted(wheels.resolve().glob("*.whl")))), 60, None)


def prepare(work: Path, built: bool, cuda: bool) -> dict[str, str]:
    """Lay out `work`, and what its programs need to find it; `built`: with the checkout's kernels, so that none are built.

    cuda: a build without kernels for a GPU is none.
    """
    shutil.rmtree(work, ignore_errors=True)
    (work / "tiny").mkdir(parents=True)
    (work / "tiny" / "config.json").write_text(json.dumps(TINY))
    ignored = ["__pycache__"] if built else ["__pycache__", "*.so"]
    shutil.copytree(ROOT / "megatron_sip", work / "megatron_sip", ignore=shutil.ignore_patterns(*ignored))
    paths = [str(work), str(work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_DEVICE_MAX_CONNECTIONS": "1"} | (
        {"MEGATRON_SIP_CUDA": "1"} if cuda else {}
    )


def run_all(
    parts: Sequence[Part], do: Callable[[Part, float], Outcome], seconds: float, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """What became of each part, by name; `keep` gets all that is known after each."""
    end, outcomes = time.monotonic() + seconds, dict[str, Any]()
    for part in parts:
        outcome = do(part, end - time.monotonic())
        outcomes[part.name] = {name: value for name, value in vars(outcome).items() if value is not None}
        print(f"{part.name}: {outcome.seconds:.0f} s, {outcome.trouble or 'done'}".splitlines()[0], flush=True)
        keep(outcomes)
    return outcomes


def median_s(report: Mapping[str, Any]) -> float:
    """Seconds of a step."""
    return statistics.median(report["seconds"])


def compared(outcomes: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The other steps as multiples of the packed one: time and peak memory."""
    reports = {
        name: outcome["report"]
        for name, outcome in outcomes.items()
        if name.startswith("step:") and "report" in outcome
    }
    packed = reports.pop("step: packed", None)
    if packed is None:
        return {}
    return {
        name: {"time": median_s(report) / median_s(packed), "memory": report["peak_gb"] / packed["peak_gb"]}
        for name, report in reports.items()
    }


def headline(name: str, report: Any, machine: Mapping[str, Any]) -> str:
    """The figures of a part that a line has room for."""
    if not isinstance(report, dict):
        return ""
    if name.startswith("step:"):
        speed = report["flops"] / median_s(report)
        mfu = f"MFU {speed / machine['sheet_flops']:.0%}, " if machine.get("sheet_flops") else ""
        shares = f"{mfu}{speed / machine['gemm_peak_flops']:.0%} of a large product's speed"
        return f"{median_s(report):.3f} s, {shares}, peak {report['peak_gb']:.1f} GB"
    if name.startswith(("right:", "no waiting")):
        return ", ".join(f"{key} {value:.2g}" for key, value in report.items())
    if "ratios" in report:
        return "; ".join(f"{case}: {short(ratios)}" for case, ratios in report["ratios"].items())
    return f"{report.get('gpu', report.get('processor'))}, kernels for {report.get('kernels')}"


def short(ratios: Any) -> str:
    return " ".join(f"{k} {v:.2f}" for k, v in ratios.items()) if isinstance(ratios, dict) else f"{ratios:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--built", action="store_true", help="with the kernels that the checkout has; builds none")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="install these, without an index, beside what is there"
    )
    parser.add_argument("--json", type=Path, default=FIGURES, help="where all figures go")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="made anew; nothing in it is kept")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only those whose names begin so")
    args = parser.parse_args()
    sizes, json_file, work = (REHEARSED if args.rehearse else ON_GPU), args.json.resolve(), args.work.resolve()
    if json_file.is_relative_to(work):
        parser.error(f"--json {args.json}: lies in {args.work}, which every start removes")
    parts = [install(args.wheels, work)] if args.wheels else []
    parts += [] if args.built else [build(work)]
    parts += [part for part in parts_of(sizes) if not args.parts or part.name.startswith(tuple(args.parts))]
    if not parts:
        parser.error(f"--parts {' '.join(args.parts)}: there are {', '.join(part.name for part in parts_of(sizes))}")
    started, environment = time.monotonic(), prepare(work, args.built, cuda=not args.rehearse)
    hidden = {} if not args.rehearse else {"CUDA_VISIBLE_DEVICES": ""}

    def do(part: Part, left_s: float) -> Outcome:
        ours = part.name not in ("wheels", "build")
        program = (str(BENCHMARKS / part.program[0]), *part.program[1:]) if ours else part.program
        program = tuple(str(work / "tiny") if word == TINY_MODEL else word for word in program)
        whole = Part(part.name, program, part.bound_s, part.report, part.needs, part.before)
        return run(whole, work, environment | hidden, left_s)

    def keep(outcomes: dict[str, Any]) -> None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        report = {"rehearsal": args.rehearse, "parts": outcomes, "of the packed step": compared(outcomes)}
        json_file.write_text(json.dumps(report, indent=1) + "\n")

    outcomes = run_all(parts, do, 60 * args.minutes - (time.monotonic() - started), keep)
    machine = outcomes.get("machine", {}).get("report", {"gemm_peak_flops": float("nan")})
    width = max(map(len, outcomes))
    for name, outcome in outcomes.items():
        trouble = outcome.get("trouble", "")
        said = trouble.splitlines()[0] if trouble else headline(name, outcome.get("report"), machine)
        print(f"{name:<{width}}  {outcome['seconds']:>6.1f} s  {said}")
    for name, ratios in compared(outcomes).items():
        print(f"{name}: {ratios['time']:.2f} times the packed step's time, {ratios['memory']:.2f} times its memory")
    failed = [
        name for name, outcome in outcomes.items() if not outcome.get("trouble", "left out").startswith("left out")
    ]
    if failed:
        raise SystemExit(f"went wrong: {', '.join(failed)}; {json_file.name} has their last lines")


if __name__ == "__main__":
    main()
