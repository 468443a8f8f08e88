"""The package as a wheel, installed and run where no checkout is: data files and console entries are in it.

The extension is not compiled again, which takes minutes; the built one is put where setup.py would have.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from workers import save_tiny_llama

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.kernels.extension import extension

REPO = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, "MEGATRON_SIP_CUDA": "0", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def built_wheel(folder: Path) -> Path:
    folder.mkdir()
    for name in SOURCES:
        shutil.copy2(REPO / name, folder)
    shutil.copytree(REPO / "megatron_sip", folder / "megatron_sip", ignore=shutil.ignore_patterns("_kernels*", "__py*"))
    library = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/megatron_sip"
    (folder / library).mkdir(parents=True)
    if extension is not None:
        shutil.copy2(str(extension.__file__), folder / library)
    run(sys.executable, "setup.py", "-q", "build_py", "bdist_wheel", "--skip-build", cwd=folder)
    [wheel] = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of console entries of an environment with the wheel, and beside it all that the package needs."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(sys.executable, *install, built_wheel(folder / "source"), cwd=folder)
    [found] = run(python, "-c", "import megatron_sip; print(megatron_sip.__file__)", cwd=folder).splitlines()
    assert Path(found).is_relative_to(packages)
    return python.parent


def test_the_trainer_explains_itself_and_finds_its_presets(entries: Path, tmp_path: Path) -> None:
    assert "--candidates" in run(entries / "megatron-sip-train", "--help", cwd=tmp_path)
    assert "--criteria" in run(entries / "megatron-sip-evaluate", "compare", "--help", cwd=tmp_path)
    save_tiny_llama(tmp_path / "model", 0)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "A text."}) + "\n")
    servers = ("--rollout-url", "http://127.0.0.1:9", "--teacher-url", "http://127.0.0.1:9")
    told = run(
        *(entries / "megatron-sip-train", "--preset", "safety", "--dry-run", *servers, "--seq-length", "256"),
        *("--data-path", "text.jsonl", "--save", "run", "--hf-config", "model"),
        cwd=tmp_path,
    )
    assert "safety" in told
    assert "judgements" in told


def test_the_converter_converts(entries: Path, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model", 0)
    told = run(
        *(entries / "megatron-sip-convert", "hf-to-megatron", "--load", "model", "--save", "checkpoint"), cwd=tmp_path
    )
    assert told.splitlines()[-1] == "megatron-sip-convert: wrote checkpoint"
    assert (tmp_path / "checkpoint" / TRACKER).read_text() == "release"
    assert (tmp_path / "checkpoint" / "hf" / "config.json").is_file()


def test_records_are_prepared(entries: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"The {i} bridges at Norwick fell.", "safe": i % 2 == 0}) for i in range(10)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    source = ("--data-path", "text.jsonl", "--no-cut", "--role-shares", "0,1,0")
    run(
        *(entries / "megatron-sip-prepare", "judgements", "--task", "quality", "--corrupt", "shuffle", *source),
        *("--out", "quality", "--format", "sip", "nemo-gym"),
        cwd=tmp_path,
    )
    assert len((tmp_path / "quality" / "judgements.jsonl").read_text().splitlines()) == 20
    assert "Conclusion: Option 1" in (tmp_path / "quality" / "nemo-gym" / "train.jsonl").read_text()
