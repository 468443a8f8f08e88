"""What the benchmarks share: what the machine is and can do, timing of interleaved runs, and the report they write."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sip.platform.number_format import bfloat16_pays

REPO = Path(__file__).resolve().parents[1]
LINE_LENGTH = 120


def number_format() -> torch.dtype:
    """That in which the trainer computes on this machine."""
    return torch.bfloat16 if bfloat16_pays() else torch.float32


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, memory, threads, versions and allocator settings: whatever a figure depends on."""
    page_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts: dict[str, Any] = {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(page_bytes / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "heap_reuse": heap_reuse_active(),
    }
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields: dict[str, str] = {}
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        if "model name" in fields:
            return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return platform.processor() or platform.machine()


def heap_reuse_environment() -> dict[str, str]:
    """glibc settings under which freed blocks stay in the process, so that big tensors do not page-fault each time; those of
    `megatron-sip`."""
    return {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}


def heap_reuse_active() -> bool:
    """Whether this process was started with `heap_reuse_environment`."""
    return os.environ.get("MALLOC_MMAP_MAX_") == "0"


def resident_gb() -> float:
    """Resident memory of this process now."""
    return _resident_bytes() / 1e9


def peak_memory_gb(device: str = "cpu") -> float:
    """Highest resident memory of this process so far (CPU), or highest allocation since the last reset (CUDA)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@dataclass(frozen=True)
class Case:
    """One contestant. `prepare` runs before each timed `run`, outside the clock (it refills consumed buffers)."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Seconds over the timed runs."""

    median_s: float
    fastest_s: float
    slowest_s: float


def time_interleaved(cases: Sequence[Case], *, rounds: int, warmup: int = 2, device: str = "cpu") -> dict[str, Timing]:
    """Runs every case once a round, so that a slow phase of the machine hits all of them; name -> Timing."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for turn in range(warmup + rounds):
        for case in cases:
            case.prepare()
            _synchronise(device)
            start = time.perf_counter()
            case.run()
            _synchronise(device)
            if turn >= warmup:
                seconds[case.name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(runs), min(runs), max(runs)) for name, runs in seconds.items()}


def added_peak_gb(case: Case, device: str = "cpu") -> float:
    """Memory that one run needs beyond what was held before it (CPU: sampled resident memory, so nothing that the
    allocator had kept for reuse counts)."""
    case.prepare()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case.run()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    finished = threading.Event()
    before = _resident_bytes()
    highest = [before]

    def sample() -> None:
        while not finished.wait(0.0005):
            highest.append(max(highest.pop(), _resident_bytes()))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        case.run()
    finally:
        finished.set()
        sampler.join()
    return (highest[0] - before) / 1e9


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rewrite_case(nbytes: int, device: str = "cpu", name: str = "floor") -> Case:
    """Reads `nbytes` once and writes them back in place: what memory alone allows an op that consumes its input."""
    buffer = torch.ones(max(nbytes // 4, 1), dtype=torch.float32, device=device)
    return Case(name, buffer.neg_)


def copy_bandwidth(device: str = "cpu", nbytes: int = 1 << 29, rounds: int = 7) -> float:
    """Bytes a second, read plus written, of an in-place rewrite (CPU) or of a copy (CUDA)."""
    if device == "cpu":
        case = rewrite_case(nbytes, device)
    else:
        source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        case = Case("copy", lambda: target.copy_(source))
    return 2 * nbytes / time_interleaved([case], rounds=rounds, device=device)[case.name].median_s


def gemm_peak(dtype: torch.dtype, device: str = "cpu", size: int | None = None, rounds: int = 5) -> float:
    """FLOP/s of a large square matrix product in `dtype`, the ceiling for whatever is made of such products."""
    size = size or (8192 if device == "cuda" else 2048)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    case = Case("gemm", lambda: left @ right)
    return 2 * size**3 / time_interleaved([case], rounds=rounds, device=device)[case.name].median_s


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain table, first column left-aligned, the others right-aligned; floats with three digits."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]))
    return "\n".join(lines)


def write_report(path: Path, report: Mapping[str, Any], sort: bool = True) -> None:
    """JSON under benchmarks/results/, replaced as a whole; paths are from the repository's root or, at home, from ~.

    sort: by name, else in the report's own order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = laid_out(report, sort).replace(f'"{REPO}/', '"').replace(f'"{Path.home()}/', '"~/')
    path.write_text(text + "\n")


def laid_out(value: Any, sort: bool = True, indent: str = "", name: str = "") -> str:
    """JSON with as much in a line as fits, but for lists and objects that take several: each begins one."""
    flat = json.dumps(value, sort_keys=sort)
    if len(indent + name + flat) < LINE_LENGTH or not isinstance(value, dict | list) or not value:
        return name + flat
    inner, lines = indent + "  ", [""]
    keys = range(len(value)) if isinstance(value, list) else sorted(value) if sort else value
    for key in keys:
        text = laid_out(value[key], sort, inner, f"{json.dumps(key)}: " if isinstance(value, dict) else "") + ","
        if lines[-1] and len(inner + lines[-1] + text) < LINE_LENGTH and "\n" not in lines[-1] + text:
            lines[-1] += f" {text}"
        else:
            lines.append(text)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return name + opening + f"\n{inner}".join(lines).rstrip(",") + f"\n{indent}{closing}"
