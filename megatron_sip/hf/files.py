"""The safetensors of a Hugging Face folder, known by their headers and checked before a weight is read. No Megatron here.

tensors = checked_tensors(hf_dir, AutoConfig.from_pretrained(hf_dir))     # name -> file, shape, dtype
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from megatron_sip.hf.families import EMBEDDING, OUTPUT, architecture, tensor_maps, tensor_shape
from megatron_sip.hf.folder import refuse_pointer

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What weights may be stored in, by its name in safetensors; anything else is quantised."""
COMPARED_ROWS = 4096


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_hf_config(hf_dir: Path) -> Any:
    """The folder's transformers config. Raises ValueError, naming config.json, when it is not there or not sound."""
    file = hf_dir / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    refuse_pointer(file)
    try:
        return AutoConfig.from_pretrained(hf_dir)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def checked_tensors(hf_dir: Path, hf_config: Any) -> dict[str, StoredTensor]:
    """The tensors to be read, by name: whole files, and exactly the tensors, of exactly the sizes, that the config asks for.

    Reads headers only; and both tables of a tied model whose files hold two.

    Raises:
        FileNotFoundError: no safetensors, or a file of the index is missing (named).
        ValueError: a file is a git-LFS pointer or cut short, a tensor is missing, unexpected, held twice, of another size
            (with the config's field) or quantised; or the architecture is not supported.
    """
    architecture(hf_config)  # of weights that nobody could load it does not matter what is wrong with them
    stored = stored_tensors(hf_dir)
    _check_names(stored, hf_config, hf_dir)
    expected = {name: tensor_shape(name, hf_config) for entry in tensor_maps(hf_config) for name in entry.hf}
    tied_copy = OUTPUT.hf[0] if hf_config.tie_word_embeddings and OUTPUT.hf[0] in stored else None
    if tied_copy is not None:
        expected[tied_copy] = tensor_shape(tied_copy, hf_config)
    _check_shapes(stored, expected)
    for name in expected:
        if stored[name].dtype not in DTYPES:
            raise ValueError(
                f"{stored[name].file}: {name} is {stored[name].dtype}; only {', '.join(DTYPES)} convert: give the model "
                "before it was quantised"
            )
    if tied_copy is not None and not _equal(stored[EMBEDDING.hf[0]], EMBEDDING.hf[0], stored[tied_copy], tied_copy):
        raise ValueError(
            f"{hf_dir}: config.json ties the embeddings (tie_word_embeddings), but {tied_copy} and {EMBEDDING.hf[0]} "
            "differ: set tie_word_embeddings to false there, or leave the tensor out"
        )
    return {name: stored[name] for name in expected if name != tied_copy}


def stored_tensors(hf_dir: Path) -> dict[str, StoredTensor]:
    """The tensors of the folder's safetensors files. Raises FileNotFoundError and ValueError as `checked_tensors`."""
    by_index = _index(hf_dir)
    single = hf_dir / WEIGHTS_FILE
    if by_index is None:
        if not single.exists():
            raise FileNotFoundError(
                f"{hf_dir} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; save the model as safetensors"
            )
        return _header(single)
    if single.exists() and single not in by_index.values():
        raise ValueError(f"{hf_dir} holds two sets of weights, {WEIGHTS_FILE} and {INDEX_FILE}: remove one of them")
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(by_index.values())):
        if not file.exists():
            raise FileNotFoundError(f"{file}, which {INDEX_FILE} names, does not exist: download it")
        for name, tensor in _header(file).items():
            if name in stored:
                raise ValueError(f"{name} lies in two files, {stored[name].file} and {file}: keep one of them")
            stored[name] = tensor
    absent = sorted(name for name, file in by_index.items() if name not in stored or stored[name].file != file)
    if absent:
        raise ValueError(f"{by_index[absent[0]]} lacks {absent[0]}, which {INDEX_FILE} says it holds")
    return stored


def rounding(stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> str | None:
    """What to tell the user when not every value of the files has room in `dtype`; None when nothing is rounded."""
    counts = Counter(
        str(DTYPES[t.dtype]) for t in stored.values() if t.dtype in DTYPES and rounds(DTYPES[t.dtype], dtype)
    )
    if not counts:
        return None
    found = ", ".join(f"{count} tensors from {name}" for name, count in sorted(counts.items()))
    return f"rounds {found} to {dtype}, the dtype in config.json: to keep every bit, change it there"


def rounds(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether values of `source` can change when they become `target`."""
    return torch.promote_types(source, target) != target


def _index(hf_dir: Path) -> dict[str, Path] | None:
    """The file of each tensor by the index, None without one."""
    path = hf_dir / INDEX_FILE
    if not path.exists():
        return None
    refuse_pointer(path)
    try:
        return {name: hf_dir / file for name, file in json.loads(path.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of safetensors ({type(error).__name__}: {error})") from None


def _header(file: Path) -> dict[str, StoredTensor]:
    refuse_pointer(file)
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
            return {name: StoredTensor(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as error:
        size = file.stat().st_size
        raise ValueError(f"{file} ({size:,} bytes) is no whole safetensors file ({error}): download it again") from None


def _check_names(stored: Mapping[str, StoredTensor], hf_config: Any, hf_dir: Path) -> None:
    expected = {name for entry in tensor_maps(hf_config) for name in entry.hf}
    ignorable = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    if hf_config.tie_word_embeddings:
        ignorable |= set(OUTPUT.hf)
    missing, unexpected = expected - set(stored), set(stored) - expected - ignorable
    if missing or unexpected:
        raise ValueError(
            f"{hf_dir}: the tensors are not those of its config: "
            f"missing {sorted(missing)[:5]}, unexpected {sorted(unexpected)[:5]}"
        )


def _check_shapes(stored: Mapping[str, StoredTensor], expected: Mapping[str, Mapping[str, int]]) -> None:
    wrong = [name for name, shape in expected.items() if stored[name].shape != tuple(shape.values())]
    if not wrong:
        return
    name, fields = wrong[0], expected[wrong[0]]
    found = stored[name].shape
    differing = [f for (f, size), n in zip(fields.items(), found, strict=False) if size != n] or list(fields)
    asked = ", ".join(f"{field} = {fields[field]}" for field in differing)
    more = f" ({len(wrong) - 1} more tensors do not fit)" if len(wrong) > 1 else ""
    raise ValueError(
        f"{stored[name].file}: {name} is {list(found)}, config.json makes it {list(fields.values())} ({asked}){more}: config "
        "and weights are not of one model"
    )


def _equal(first: StoredTensor, first_name: str, second: StoredTensor, second_name: str) -> bool:
    """Whether two tables of one shape are the same, some rows at a time."""
    with safe_open(first.file, framework="pt") as a, safe_open(second.file, framework="pt") as b:
        one, other = a.get_slice(first_name), b.get_slice(second_name)
        return all(
            torch.equal(one[row : row + COMPARED_ROWS], other[row : row + COMPARED_ROWS])
            for row in range(0, first.shape[0], COMPARED_ROWS)
        )
