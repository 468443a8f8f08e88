"""Where a step's numbers are written: metrics.jsonl of the run folder, tensorboard, wandb and a line on the screen."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from megatron_sip.console import say
from megatron_sip.errors import DataError
from megatron_sip.files import write_atomically

AVERAGED_STEPS = 20
"""The time left is estimated from so many steps."""


class MetricsWriter:
    """Writes a step's numbers to metrics.jsonl, tensorboard and wandb, and the progress line to standard output.

    On resume, lines of steps after the loaded checkpoint are removed: each step stands in the file once.
    """

    def __init__(
        self, run_dir: Path, resume_step: int, total_steps: int, tensorboard: Any = None, wandb: Any = None
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        drop_steps_after(self.path, resume_step)
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        self._tensorboard = tensorboard
        self._wandb = wandb
        self._total_steps = total_steps
        self._durations: deque[float] | None = None  # after the first step, whose length says nothing of the others

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record `numbers` for `step` (1 is the first) everywhere and print the progress line.

        Raises OSError when a file does not take them, as on a full disk.
        """
        self._record(step, numbers)
        say(progress_line(step, self._total_steps, numbers, self._seconds_left(step, numbers)))

    def write_validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record what was measured of the weights after `step` (0: of the initial ones), in a line beside the step's own.

        Raises OSError as `write`.
        """
        self._record(step, numbers)
        say(validation_line(step, numbers))

    def _record(self, step: int, numbers: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)

    def _seconds_left(self, step: int, numbers: Mapping[str, float]) -> float | None:
        """How long the remaining steps will take when they are as long as the last ones; None after the first."""
        if self._durations is None:
            self._durations = deque(maxlen=AVERAGED_STEPS)
            return None
        self._durations.append(numbers.get("seconds/total", 0.0))
        return (self._total_steps - step) * sum(self._durations) / len(self._durations)

    def close(self) -> None:
        """Flush and close everything; the last steps would otherwise be missing from tensorboard and wandb."""
        with contextlib.suppress(OSError):  # of a full disk, already told by `write`
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def trained_steps(steps: Sequence[Mapping[str, float]]) -> int:
    """How many of a metrics.jsonl's steps were trained: step 0 is a validation of the initial weights."""
    return sum(step["step"] > 0 for step in steps)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The steps of a metrics.jsonl; lines that cannot be read (half-written by a killed run, or broken) are left out.

    Lines of the same step are one: a validation has a line of its own, and one of the initial weights is of step 0.

    Raises:
        DataError: there are lines, and none of them is a step.
    """
    lines = path.read_bytes().split(b"\n")
    found: dict[float, dict[str, float]] = {}
    for line in lines:
        if (record := _step_of(line)) is not None:
            found[record["step"]] = found.get(record["step"], {}) | record
    steps = list(found.values())
    if not steps and len(lines) > 1:
        raise DataError(
            f'{path}: no line is a step of a run, {{"step": 1, "loss": ...}}: another file, or a broken one'
        )
    return steps


def _step_of(line: bytes) -> dict[str, float] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return record if all(isinstance(value, int | float) for value in record.values()) else None


def drop_steps_after(path: Path, step: int) -> None:
    """Keep only the lines of steps up to `step`, replacing the file in one move; unreadable ones go to another file."""
    if not path.exists():
        return
    *lines, half = path.read_bytes().split(b"\n")
    records = [(line, _step_of(line)) for line in ([*lines, half] if _step_of(half) is not None else lines)]
    broken = [line for line, record in records if record is None and line.strip()]
    if broken:
        aside = path.with_name(f"{path.name}.unreadable")
        write_atomically(aside, (aside.read_bytes() if aside.exists() else b"") + b"\n".join([*broken, b""]))
        say(f"{path}: {len(broken)} lines cannot be read; they are now in {aside.name}")
    kept = [line + b"\n" for line, record in records if record is not None and record["step"] <= step]
    write_atomically(path, b"".join(kept))


def progress_line(step: int, total_steps: int, numbers: Mapping[str, float], seconds_left: float | None = None) -> str:
    """One line per step: step, loss, mean score by candidate kind, rollout chosen rate, what was lost, seconds by phase."""
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    if "loss" in numbers:
        parts.append(f"loss {numbers['loss']:.4f}")
    scores = [f"{name[6:]} {value:.3f}" for name, value in sorted(numbers.items()) if name.startswith("score/")]
    if scores:
        parts.append("score " + " ".join(scores))
    if "chosen_rate/rollout" in numbers:
        parts.append(f"rollout chosen {numbers['chosen_rate/rollout']:.2f}")
    if "reward_accuracy" in numbers:
        parts.append(f"accuracy {numbers['reward_accuracy']:.2f}")
    dropped = {name.removeprefix("dropped/"): n for name, n in numbers.items() if name.startswith("dropped/") and n}
    if dropped:
        reasons = ", ".join(f"{reason} {count:.0f}" for reason, count in dropped.items())
        parts.append(f"dropped {sum(dropped.values()):.0f} ({reasons})")
    missing, given = (counted(numbers, f"judge/verdicts{kind}/") for kind in ("-missing", ""))
    if missing:
        parts.append(f"verdicts missing {missing:.0f} of {missing + given:.0f}")
    order = ("rollout", "judge", "waiting", "reference", "train", "sync", "save")
    phases = [
        f"{phase} {numbers[f'seconds/{phase}']:.1f}" for phase in order if numbers.get(f"seconds/{phase}", 0) >= 0.05
    ]
    total = numbers.get("seconds/total")
    if total is not None:
        parts.append(f"{total:.1f} s" + (f" ({', '.join(phases)})" if phases else ""))
    if seconds_left:
        parts.append(f"{duration(seconds_left)} left")
    return " | ".join(parts)


def validation_line(step: int, numbers: Mapping[str, float]) -> str:
    """One line per validation: its step and its numbers, but for those by subset."""
    named = ((name.split("/")[1:], value) for name, value in numbers.items() if name.startswith("validation/"))
    shown = ", ".join(f"{' '.join(name)} {value:.3f}" for name, value in named if len(name) < 3)
    return f"validation at step {step}: {shown}"


def counted(numbers: Mapping[str, float], prefix: str) -> float:
    """The sum of the counts whose names start with `prefix`."""
    return sum(value for name, value in numbers.items() if name.startswith(prefix))


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
