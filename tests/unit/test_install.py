"""What a fresh clone offers: the Python that make finds, and console entries that exist."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
LOCKED = tomllib.loads((REPO / "uv.lock").read_text())["package"]


def test_the_lock_is_that_of_pyproject(tmp_path: Path) -> None:
    """As `make lint` asks: uv compares both without a network and a cache, wherever its user's packages come from."""
    [flags] = re.findall(r"uv lock (.*?) --python", (REPO / "Makefile").read_text())
    command = [str(Path(sys.executable).with_name("uv")), "lock", *shlex.split(flags), "--cache-dir", str(tmp_path)]
    environment = os.environ | {"UV_DEFAULT_INDEX": "https://mirror.example/simple"}
    done = subprocess.run(
        [*command, "--python", sys.executable], cwd=REPO, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_lock_has_public_addresses_and_hashes_only() -> None:
    others = [package for package in LOCKED if package["source"] != {"registry": "https://pypi.org/simple"}]
    assert [package["name"] for package in others] == ["megatron-sip"]
    for package in LOCKED:
        for file in [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]:
            assert file["url"].startswith("https://files.pythonhosted.org/"), package["name"]
            assert file["hash"].startswith("sha256:"), package["name"]


def test_make_installs_the_lock_s_versions_from_any_index(tmp_path: Path) -> None:
    """A package index or folder of the user's own has the same files under other addresses."""
    [flags] = re.findall(r"uv export (.*?) --python \S+ \$\(1\)", (REPO / "Makefile").read_text())
    command = [
        str(Path(sys.executable).with_name("uv")),
        "export",
        *shlex.split(flags),
        "--extra",
        "dev",
        "--group",
        "build",
    ]
    done = subprocess.run([*command, "--python", sys.executable], cwd=REPO, capture_output=True, text=True, timeout=60)
    requirements = [line for line in done.stdout.splitlines() if line and line[0] not in " #"]
    assert {"torch", "setuptools", "ninja", "ruff", "sglang"} <= {line.partition("==")[0] for line in requirements}
    assert [line for line in requirements if "==" not in line or "://" in line] == []


def fake_python(folder: Path, name: str, version: str) -> None:
    """A program that is Python `version` as far as the Makefile asks."""
    right = int(not version.startswith("3.12"))
    path = folder / name
    path.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then exit {right}; fi\necho Python {version}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{folder}:/usr/bin:/bin"}
    command = ["make", "-C", str(REPO), *words, f"VENV={folder / 'venv'}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("installed", "found"),
    [
        ({"python3": "3.11.9", "python3.12": "3.12.4"}, "python3.12"),
        ({"python3": "3.12.1", "python3.12": "3.11.9"}, "python3"),
        ({"python3": "3.13.0", "python3.12": "3.11.9", "python": "3.11.1"}, "python3"),
    ],
)
def test_make_takes_the_python_that_is_a_3_12(tmp_path: Path, installed: dict[str, str], found: str) -> None:
    fake_python(tmp_path, "python", "2.7.18")
    for name, version in installed.items():
        fake_python(tmp_path, name, version)
    done = make(tmp_path, "--eval", "show: ; @echo '$(PYTHON)'", "show")
    assert done.stdout.splitlines()[-1 if "Entering" not in done.stdout else 1] == found


def test_another_python_is_refused_with_the_one_that_is_needed(tmp_path: Path) -> None:
    fake_python(tmp_path, "mypython", "3.11.9")
    done = make(tmp_path, "install", f"PYTHON={tmp_path / 'mypython'}")
    assert done.returncode != 0
    assert f"Python 3.12 is needed, {tmp_path / 'mypython'} is Python 3.11.9" in done.stderr
    assert "make install PYTHON=/path/to/python3.12" in done.stderr
    assert "Traceback" not in done.stderr


def test_console_entries_exist() -> None:
    scripts = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]
    assert "megatron-sip" in scripts
    for target in scripts.values():
        module, _, function = target.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None, target
        assert spec.origin is not None
        assert f"def {function}(" in Path(spec.origin).read_text()
