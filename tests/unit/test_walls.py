"""The walls between the rooms, checked from the source: who may import what, who may take `args`, how long a thing may be."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_sip"

ROOMS = [
    *("errors", "console", "files", "child_processes", "step_watch", "stop_signal", "records", "metrics"),
    *("checkpoints", "kernels", "data", "platform", "model", "serving", "hf", "judge", "rollout"),
    *(
        "experience",
        "training",
        "corpus",
        "prepare",
        "config",
        "evaluation",
        "one_node",
        "planning",
        "time_sharing",
        "open_measurements",
        "open_servers",
        "open_tasks",
        "open_trainer",
        "run_state",
        "run",
        "gathering",
        "train",
    ),
    *("evaluate", "plan", "__main__"),
]
"""Bottom to top: a room imports only rooms before it. Files beside the rooms count as rooms of their own, and a room's
`__main__`, which is a command line, stands with the package's own."""

PURE = [
    *(
        "records",
        "metrics",
        "checkpoints",
        "data",
        "serving",
        "judge",
        "rollout",
        "experience",
        "corpus",
        "prepare",
        "evaluation",
        "planning",
    ),
    *("training.objectives", "model.packing", "model.tensor_parallel"),
]
"""Rooms and modules that import neither Megatron nor SGLang, themselves or through what they import."""

TAKE_ARGS = ("config", "train", "run", "run_state", "model.gpt")
"""Where a function may take `args`: flags are read there, and Megatron calls model providers with them."""

MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60


def python_files(*places: str) -> list[Path]:
    return [file for place in places for file in sorted((ROOT / place).rglob("*.py"))]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """A module's name below the package: `judge.cache`, `records`; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in python_files("megatron_sip")}


def room_of(name: str) -> str:
    return "__main__" if name.endswith(".__main__") else name.split(".")[0]


def within(name: str, places: list[str] | tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no function's body, nothing that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(child)


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Full names of what these nodes import; `from a import b` gives both a and a.b."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def own_imports(name: str, lazy: bool) -> set[str]:
    """Which modules of the package `name` imports; with `lazy` also inside functions and for type checkers."""
    tree = tree_of(MODULES[name])
    found = imported(ast.walk(tree) if lazy else at_import(tree))
    own = {full.removeprefix("megatron_sip.") for full in found if full.startswith("megatron_sip.")}
    return {other for other in own if other in MODULES} - {name}


def foreign_imports(name: str, lazy: bool) -> set[str]:
    tree = tree_of(MODULES[name])
    packages = {full.split(".")[0] for full in imported(ast.walk(tree) if lazy else at_import(tree))}
    return packages & {"megatron", "sglang"}


def test_every_room_has_its_place() -> None:
    assert {room_of(name) for name in MODULES if name} == set(ROOMS)
    assert len(set(ROOMS)) == len(ROOMS)
    assert [place for place in (*PURE, *TAKE_ARGS) if not any(within(name, [place]) for name in MODULES)] == []


def test_no_import_points_up() -> None:
    """Lazy imports inside functions count too; an order of rooms in which all point down leaves room for no circle."""
    upward = {
        (name, other)
        for name in MODULES
        if name
        for other in own_imports(name, lazy=True)
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(name))
    }
    assert upward == set()


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, PURE)])
def test_pure_rooms_import_neither_megatron_nor_sglang(name: str) -> None:
    assert foreign_imports(name, lazy=True) == set()
    seen, waiting = {name}, [name]
    while waiting:
        module = waiting.pop()
        assert foreign_imports(module, lazy=False) == set(), f"{name} comes to import {module}"
        waiting += own_imports(module, lazy=False) - seen
        seen |= own_imports(module, lazy=False)


def test_kernels_know_torch_alone() -> None:
    for name in MODULES:
        if room_of(name) == "kernels":
            assert foreign_imports(name, lazy=True) == set()
            assert {room_of(other) for other in own_imports(name, lazy=True)} <= {"kernels"}, name


def test_only_the_platform_plug_in_imports_sglang() -> None:
    importing = {name for name in MODULES if "sglang" in foreign_imports(name, lazy=True)}
    assert importing == {"platform.sglang_cpu", "platform.sglang_models.policies"}


def test_args_end_in_config() -> None:
    """Components take their own settings."""
    taking = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and any(arg.arg == "args" for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
        and not within(name, (*TAKE_ARGS, "platform"))  # a torch function's arguments are called so, too
    }
    assert taking == set()


@pytest.mark.parametrize("path", python_files("megatron_sip", "tools", "benchmarks", "evidence"), ids=str)
def test_no_file_and_no_function_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or node.lineno) - node.lineno < MAX_FUNCTION_LINES, node.name


def assigned_foreign_attributes(path: Path) -> list[str]:
    """Assignments to attributes of imported modules or their classes: `module.name = ...` or setattr(module, ...)."""
    tree = tree_of(path)
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


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) != "platform"])
def test_only_the_platform_replaces_parts_of_libraries(name: str) -> None:
    assert [found for found in assigned_foreign_attributes(MODULES[name]) if "sys.argv" not in found] == []
