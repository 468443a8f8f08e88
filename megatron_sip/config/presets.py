"""Presets: files of flags that `--preset NAME` stands for.

    python -m megatron_sip.train --preset safety --lr 1e-5 ...     # later flags win

A preset file holds one flag with its values a line; `#` starts a comment, values are quoted as in a shell. It may
build on another one with a line `--preset NAME`. The presets that come with the project are the set-ups and ablations
of the paper, in preset_files/ beside this file; docs/presets.md says which is which.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

FLAG = "--preset"
PRESETS = Path(__file__).resolve().parent / "preset_files"


class PresetError(SystemExit):
    """A preset that cannot be used; the message names the file, the line and what would be right."""


def known_presets(folder: Path = PRESETS) -> list[str]:
    """Names that `--preset` accepts besides paths, sorted."""
    return sorted(path.stem for path in folder.glob("*.args"))


def expand_presets(argv: Sequence[str], folder: Path = PRESETS) -> list[str]:
    """`argv` with every `--preset NAME_OR_FILE` replaced in place by the flags of the file: what follows wins over it.

    A value with a slash or the ending .args is a path, relative to the working directory; anything else names a file of
    `folder`.

    Raises:
        PresetError: no value, no such preset, a line that is not a flag, or presets that include each other.
    """
    expanded: list[str] = []
    words = iter(argv)
    for word in words:
        if word == FLAG or word.startswith(FLAG + "="):
            value = word.partition("=")[2] if "=" in word else next(words, "")
            expanded += read_preset(_find(value, Path(), folder, "the command line"), folder)
        else:
            expanded.append(word)
    return expanded


def read_preset(path: Path, folder: Path = PRESETS, including: tuple[Path, ...] = ()) -> list[str]:
    """The flags of a preset file, with the presets it builds on expanded. Raises PresetError as `expand_presets`."""
    path = path.resolve()
    if path in including:
        circle = " -> ".join(included.name for included in (*including, path))
        raise PresetError(f"{path}: presets include each other: {circle}")
    flags: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise PresetError(f"{where}: {error}; quote values as in a shell") from None
        if not words:
            continue
        if not words[0].startswith("--"):
            raise PresetError(f"{where}: '{words[0]}' is no flag; a line is one flag (--name) with its values")
        if words[0] == FLAG or words[0].startswith(FLAG + "="):
            names = [words[0].partition("=")[2], *words[1:]] if "=" in words[0] else words[1:]
            if len(names) != 1:
                raise PresetError(f"{where}: --preset takes one name or file, not {len(names)}")
            flags += read_preset(_find(names[0], path.parent, folder, where), folder, (*including, path))
        else:
            flags += words
    return flags


def _find(name: str, beside: Path, folder: Path, where: str) -> Path:
    """The file that `name` stands for; paths are relative to `beside`."""
    is_path = "/" in name or name.endswith(".args")
    path = beside / name if is_path else folder / f"{name}.args"
    if name and not name.startswith("--") and path.is_file():
        return path
    known = ", ".join(known_presets(folder)) or f"none ({folder} is not there: give the path of a file instead)"
    wrong = f"there is no file {path}" if name and not name.startswith("--") else "--preset needs a name or a file"
    raise PresetError(f"{where}: {wrong}; known presets: {known}")
