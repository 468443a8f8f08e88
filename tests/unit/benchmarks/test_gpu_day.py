"""The GPU day's parts are bounded, recorded one by one and end no others; what they run exists; one is rehearsed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_sip.planning.shapes import model_folder

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_day")


def program(folder: Path, name: str, source: str) -> tuple[str, ...]:
    path = folder / name
    path.write_text(source)
    return (str(path),)


def test_a_part_that_fails_or_hangs_is_recorded_and_ends_no_other(day: ModuleType, tmp_path: Path) -> None:
    write = "import pathlib, sys\npathlib.Path(sys.argv[2]).write_text('{\"figure\": 7}')\n"
    hang = "import subprocess, time\nsubprocess.Popen(['sleep', '60'])\ntime.sleep(60)\n"
    parts = [
        day.Part("fails", program(tmp_path, "fails.py", f"print({str(ROOT)!r})\nraise SystemExit('broken')\n"), 20),
        day.Part("hangs", program(tmp_path, "hangs.py", hang), 0.5),
        day.Part("lacks", program(tmp_path, "lacks.py", write), 20, needs="no-such-command"),
        day.Part("half", program(tmp_path, "half.py", write.replace("7}", "")), 20),
        day.Part("works", program(tmp_path, "works.py", write), 20),
    ]
    kept: list[dict[str, Any]] = []
    started = time.monotonic()
    outcomes = day.run_all(
        parts,
        lambda part, left: day.run(part, tmp_path, dict(os.environ), left),
        60,
        lambda outcomes: kept.append(json.loads(json.dumps(outcomes))),
    )
    assert time.monotonic() - started < 30
    assert [list(known) for known in kept] == [["fails", "hangs", "lacks", "half", "works"][: n + 1] for n in range(5)]
    assert "status 1" in outcomes["fails"]["trouble"]
    assert outcomes["fails"]["trouble"].endswith(".\nbroken\n")  # the checkout's path is none of the world's business
    assert outcomes["hangs"]["trouble"].startswith("not ended after 0 s")
    assert outcomes["lacks"]["trouble"] == "left out: no no-such-command here"
    assert outcomes["half"]["trouble"].startswith("its report is broken")
    assert outcomes["works"]["report"] == {"figure": 7}
    assert "trouble" not in outcomes["works"]


def test_what_time_is_not_left_for_is_left_out(day: ModuleType, tmp_path: Path) -> None:
    part = day.Part("late", program(tmp_path, "late.py", "raise SystemExit(1)\n"), 20)
    outcomes = day.run_all([part], lambda part, left: day.run(part, tmp_path, {}, left), 0.0, lambda _: None)
    assert outcomes == {"late": {"seconds": 0.0, "trouble": "left out: no time was left"}}


def test_every_part_runs_a_program_that_is_there_with_flags_that_it_has(day: ModuleType) -> None:
    names = set()
    for sizes in (day.ON_GPU, day.REHEARSED):
        parts = day.parts_of(sizes)
        names.add(tuple(part.name.replace(sizes.flash, "") for part in parts))
        for part in parts:
            source = (ROOT / "benchmarks" / part.program[0]).read_text(encoding="utf-8")
            flags = [word for word in (*part.program, *filter(None, [part.report])) if word.startswith("--")]
            assert [flag for flag in flags if f'"{flag}"' not in source] == [], part.name
    assert len(names) == 1  # the rehearsal leaves nothing out
    assert model_folder(day.ON_GPU.model).is_dir()


def test_a_part_of_the_rehearsal_works(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            "benchmarks/gpu_day.sh",
            "--rehearse",
            "--built",
            "--parts",
            "no waiting",
            "--json",
            str(tmp_path / "day.json"),
            "--work",
            str(tmp_path / "work"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "day.json").read_text())
    assert report["rehearsal"]
    assert report["parts"]["no waiting for a row"]["report"] == {"1 rows": 0, "3 rows": 0, "counted": False}


def test_a_day_keeps_what_an_earlier_one_found_and_does_not_take_one_without_kernels_for_the_gpu(
    day: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not day.FIGURES.is_relative_to(day.WORK)
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--work", str(tmp_path), "--json", str(tmp_path / "day.json")])
    with pytest.raises(SystemExit):
        day.main()
    assert day.prepare(tmp_path / "work", built=True, cuda=True)["MEGATRON_SIP_CUDA"] == "1"
    checks = importlib.import_module("gpu_checks")
    checks.require_kernels(["CPU"], "cpu")
    checks.require_kernels(["CPU", "CUDA"], "cuda")
    with pytest.raises(SystemExit, match="holds none for cuda, but for CPU"):
        checks.require_kernels(["CPU"], "cuda")
