"""The walls between the rooms, checked from the source: who may import what."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_sip"
PLAIN = [
    *("records.py", "experience/maker.py", "data", "judge", "evaluation", "rollout/pool.py", "serving/launch.py"),
    *("experience/selection.py", "model/packing.py", "training/objectives.py", "metrics.py"),
]


def python_files(*places: str) -> list[Path]:
    found: list[Path] = []
    for place in places:
        path = PACKAGE / place
        assert path.exists(), f"the wall names {place}, which is gone"
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return found


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.add(node.module or "")
    return names


def imports_package(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imported_modules(path))


@pytest.mark.parametrize("path", python_files(*PLAIN), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_plain_rooms_import_neither_megatron_nor_sglang(path: Path) -> None:
    assert not imports_package(path, "megatron")
    assert not imports_package(path, "sglang")


@pytest.mark.parametrize("path", python_files("."), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_platform_plug_in_imports_sglang(path: Path) -> None:
    if path != PACKAGE / "platform" / "sglang_cpu.py":
        assert not imports_package(path, "sglang")


def assigned_foreign_attributes(path: Path) -> list[str]:
    """Assignments to attributes of imported modules or their classes: `module.name = ...` or setattr(module, ...)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    foreign: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in {"megatron", "sglang", "torch"}:
            foreign |= {alias.asname or alias.name for alias in node.names}
    found = []
    for node in ast.walk(tree):
        is_setattr = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr"
        places = node.args[:1] if is_setattr else []  # type: ignore[attr-defined]
        if isinstance(node, ast.Assign):
            places = [target.value for target in node.targets if isinstance(target, ast.Attribute)]
        for place in places:
            root = place
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in foreign:
                found.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", python_files("."), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_platform_replaces_parts_of_libraries(path: Path) -> None:
    if path.parent != PACKAGE / "platform":
        assert [found for found in assigned_foreign_attributes(path) if "sys.argv" not in found] == []
