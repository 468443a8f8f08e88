"""The cache of converted models: one conversion a state of the folder, by one process, there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.hf import converted as room
from megatron_sip.hf.converted import (
    ConversionFailedError,
    converted_checkpoint,
    exported_model,
    folder_key,
    is_hf_folder,
)
from megatron_sip.hf.families import tensor_maps, tensor_shape


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole HF folder of a few weights."""
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 5, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    folder = tmp_path / "model"
    config.save_pretrained(folder)
    names = [name for entry in tensor_maps(config) for name in entry.hf]
    save_file({name: torch.zeros(*tensor_shape(name, config).values()) for name in names}, folder / "model.safetensors")
    return folder


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were converted; the checkpoint is a stand-in that takes a moment to write."""
    done: list[Path] = []

    def convert(hf_dir: Path, target: Path, direction: str) -> None:
        assert direction == "hf-to-megatron"
        done.append(hf_dir)
        target.mkdir()
        time.sleep(0.1)
        (target / TRACKER).write_text("release")

    monkeypatch.setattr(room, "_convert", convert)
    return done


def test_many_that_ask_at_once_get_one_conversion(model: Path, tmp_path: Path, conversions: list[Path]) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(lambda _: converted_checkpoint(model, tmp_path / "cache"), range(16)))
    [entry] = found
    assert (entry / TRACKER).is_file()
    assert entry.parent == tmp_path / "cache"
    assert conversions == [model]


def edit_weights(folder: Path) -> None:
    """Other numbers in the same bytes, under the old time stamp, as a copy may keep it."""
    file = folder / "model.safetensors"
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def link_to_another_blob(folder: Path) -> None:
    """As a hub's cache is laid out: the name stays, and another blob lies behind it."""
    file = folder / "model.safetensors"
    blob = file.rename(folder.parent / "0f3a")
    file.symlink_to(blob)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (edit_weights, True),
        (link_to_another_blob, True),
        (lambda folder: (folder / "model.safetensors").touch(), True),
        (lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text() + "\n"), True),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), True),
        (lambda folder: (folder / "README.md").write_text("fine"), False),
    ],
)
def test_another_state_of_the_folder_is_converted_again(
    model: Path, tmp_path: Path, conversions: list[Path], change: Callable[[Path], object], again: bool
) -> None:
    first = converted_checkpoint(model, tmp_path / "cache")
    change(model)
    assert (converted_checkpoint(model, tmp_path / "cache") != first) == again
    assert len(conversions) == 1 + again


def test_two_folders_of_one_content_are_two_models(model: Path) -> None:
    copy = model.parent / "copy"
    copy.mkdir()
    for file in model.iterdir():
        os.link(file, copy / file.name)
    assert folder_key(copy) != folder_key(model)


def test_a_conversion_that_fails_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path, target: Path, direction: str) -> None:
        target.mkdir()
        (target / "half").write_text("written")
        raise ConversionFailedError("no space left")

    monkeypatch.setattr(room, "_convert", fail)
    with pytest.raises(ConversionFailedError, match="no space left"):
        converted_checkpoint(model, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_what_a_killed_conversion_left_is_removed(model: Path, tmp_path: Path, conversions: list[Path]) -> None:
    name = f"{model.name}-{folder_key(model)}"
    killed = tmp_path / "cache" / f".{name}-{socket.gethostname()}-x1"
    elsewhere = tmp_path / "cache" / f".{name}-another-host-x1"  # may be at work: locks need not reach across nodes
    emptied = tmp_path / "cache" / name  # by hand
    for folder in (killed, elsewhere, emptied):
        folder.mkdir(parents=True)
    entry = converted_checkpoint(model, tmp_path / "cache")
    assert (entry / TRACKER).is_file()
    assert not killed.exists()
    assert elsewhere.exists()


def test_a_folder_that_is_not_whole_starts_no_converter(model: Path, tmp_path: Path, conversions: list[Path]) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"model.safetensors .* no whole safetensors file"):
        converted_checkpoint(model, tmp_path / "cache")
    assert conversions == []


def test_the_converter_is_one_process_whatever_the_launcher_says(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun it would wait for ranks that never come. Its last line is the error's."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho noise\necho "megatron-sip-convert: $RANK$MASTER_ADDR$TORCHELASTIC_RUN_ID $*"\nexit 1\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    for name in ("RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "3")
    with pytest.raises(ConversionFailedError) as caught:
        converted_checkpoint(model, tmp_path / "cache")
    assert str(caught.value).startswith(f" -m megatron_sip.hf.convert hf-to-megatron --load {model} --save ")


@pytest.mark.parametrize(
    "end", ["echo Traceback '(most recent call last)'; echo OutOfMemoryError; exit 1", "kill -9 $$"]
)
def test_a_note_before_a_crash_is_not_taken_for_its_reason(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho 'megatron-sip-convert: rounds 3 tensors'\n{end}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ConversionFailedError, match=r"^the converter failed:\nmegatron-sip-convert: rounds 3 tensors"):
        converted_checkpoint(model, tmp_path / "cache")


def test_a_hugging_face_folder_is_told_from_a_checkpoint(model: Path, tmp_path: Path) -> None:
    assert is_hf_folder(model)
    assert not is_hf_folder(tmp_path)
    (model / TRACKER).write_text("release")
    assert not is_hf_folder(model)


def checkpoint(folder: Path, content: bytes, step: int = 100) -> Path:
    """As a run leaves it: the tracker, a step's files, the config; sums come later."""
    files = folder / f"iter_{step:07d}"
    files.mkdir(parents=True, exist_ok=True)
    (files / "__0_0.distcp").write_bytes(content)
    (files / ".metadata").write_bytes(b"m")
    (folder / TRACKER).write_text(str(step))
    return folder


@pytest.fixture
def exports(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that were exported; the export is the model, and holds what the checkpoint held."""
    done: list[Path] = []

    def convert(source: Path, target: Path, direction: str) -> None:
        assert direction == "megatron-to-hf"
        done.append(source)
        shutil.copytree(model, target)
        shutil.copy(source / f"iter_{int((source / TRACKER).read_text()):07d}" / "__0_0.distcp", target / "was")

    monkeypatch.setattr(room, "_convert", convert)
    return done


def test_each_checkpoint_has_one_export_that_all_share(tmp_path: Path, exports: list[Path]) -> None:
    """Two runs at one step, and a run that is trained anew in its folder, are other models."""
    cache = tmp_path / "cache"
    runs = [checkpoint(tmp_path / name / "checkpoints", name.encode()) for name in "AB"]
    found = [exported_model(run, cache) for run in (*runs, *runs)]
    assert [(one.folder / "was").read_text() for one in found] == ["A", "B", "A", "B"]
    assert exports == runs
    (runs[0] / "iter_0000100" / "checksums_00000.json").write_text("{}")  # comes while training goes on
    assert exported_model(runs[0], cache) == found[0]
    checkpoint(runs[0], b"C")
    anew = exported_model(runs[0], cache)
    assert (anew.step, (anew.folder / "was").read_text()) == ("100", "C")
    assert anew.key != found[0].key


def test_an_export_that_was_damaged_is_made_again(tmp_path: Path, exports: list[Path]) -> None:
    run = checkpoint(tmp_path / "run", b"A")
    weights = exported_model(run, tmp_path / "cache").folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    whole = exported_model(run, tmp_path / "cache").folder / "model.safetensors"
    assert whole == weights
    assert len(exports) == 2
    assert exported_model(run, tmp_path / "cache").folder == weights.parent
    assert len(exports) == 2


def test_a_run_that_saves_meanwhile_leaves_no_export(
    tmp_path: Path, exports: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, convert = checkpoint(tmp_path / "run", b"A"), room._convert

    def slow(source: Path, target: Path, direction: str) -> None:
        checkpoint(run, b"B", step=200)
        convert(source, target, direction)

    monkeypatch.setattr(room, "_convert", slow)
    with pytest.raises(ConversionFailedError, match="saved another step meanwhile"):
        exported_model(run, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
