"""The parts of a GPU day: which program with which sizes, and for how long at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

TINY_MODEL = "TINY"
"""Stands for the folder of the rehearsal's model."""
SANITIZERS = ("memcheck", "racecheck", "synccheck")


@dataclass(frozen=True)
class Part:
    """`program` is run by Python; with `report` it writes its figures to the file that --json (or that flag) names.

    bound_s: after which it is ended. needs: a command without which the part is left out.
    """

    name: str
    program: Sequence[str]
    bound_s: float
    report: str | None = "--json"
    needs: str | None = None
    before: Sequence[str] = field(default=())
    """Words before Python's own."""


@dataclass(frozen=True)
class Sizes:
    """What a GPU is given, or a CPU to rehearse."""

    device: str
    op: Sequence[str]
    linear: Sequence[str]
    attention: Sequence[str]
    model: str
    problem: Sequence[int]
    one_group_a_row: Sequence[int]
    steps: Sequence[str]
    flash: str


ON_GPU = Sizes(
    device="cuda",
    op=("--rows", "8192", "--vocab", "32000", "128256", "--rounds", "10"),
    linear=("--rows", "4096", "--hidden", "2048", "--vocab", "128256"),
    attention=(
        *("--heads", "16", "--key-heads", "16", "--head-dim", "128", "--dtypes", "bf16"),
        *("--shapes", "1920+2x128", "1920+16x128", "3584+16x512"),
    ),
    model="llama-1.4b",
    problem=(16, 1920, 2, 128, 4),
    one_group_a_row=(16, 1920, 2, 128, 1),
    steps=("--warm-up", "3", "--steps", "3"),
    flash="flash",
)
REHEARSED = Sizes(
    device="cpu",
    op=("--rows", "128", "--vocab", "300", "--rounds", "1", "--allocator", "default", "--dtypes", "float32"),
    linear=("--rows", "32", "--hidden", "32", "--vocab", "300", "--rounds", "1"),
    attention=(
        *("--heads", "2", "--key-heads", "2", "--head-dim", "32", "--dtypes", "fp32", "--rounds", "1"),
        *("--shapes", "48+2x8"),
    ),
    model=TINY_MODEL,
    problem=(4, 24, 2, 8, 2),
    one_group_a_row=(4, 24, 2, 8, 1),
    steps=("--warm-up", "1", "--steps", "1"),
    flash="dense",
)


def parts_of(sizes: Sizes) -> list[Part]:
    """In the order in which they are wanted: where time runs out, the last are left out."""
    on = ("--device", sizes.device)

    def check(name: str, *flags: str) -> tuple[str, ...]:
        return ("gpu_checks.py", name, *flags)

    def step(name: str, variant: str, problem: Sequence[int], attention: str = "own") -> Part:
        program = ("train_step_variant.py", variant, "--model", sizes.model, "--made-up", "--attention", attention)
        return Part(name, (*program, "--problem", *map(str, problem), *sizes.steps), 120, "--result")

    return [
        Part("machine", check("machine"), 60),
        Part("right: op", check("op"), 60),
        Part("right: attention, float32", check("attention", "--dtype", "float32"), 90),
        Part("right: attention, bfloat16", check("attention"), 90),
        Part("right: step, float32", check("step", "--dtype", "float32"), 90),
        Part("right: step, bfloat16", check("step"), 90),
        step("step: packed", "dpo_packed", sizes.problem),
        step("step: unpacked", "dpo_unpacked", sizes.problem),
        step(f"step: packed, {sizes.flash} attention", "dpo_packed", sizes.problem, sizes.flash),
        step("step: packed, one group a row", "dpo_packed", sizes.one_group_a_row),
        Part("no waiting for a row", check("syncs"), 90),
        Part("speed: op", ("logprob_op.py", *on, *sizes.op), 90),
        Part("speed: attention", ("attention.py", *on, *sizes.attention), 90),
        Part("speed: projection and op", ("linear_logprob.py", *on, *sizes.linear), 60),
        *(
            Part(f"sanitizer: {tool}", check("op"), 120, None, "compute-sanitizer", sanitizer(tool))
            for tool in SANITIZERS
        ),
    ]


def sanitizer(tool: str) -> tuple[str, ...]:
    """Of our kernels alone: torch's own products would take minutes under it."""
    return (
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "1",
        "--kernel-name",
        "kernel_substring=megatron_sip",
    )
