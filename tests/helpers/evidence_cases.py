"""What a study's commands are to their programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from tiny_tokenizer import byte_level_tokenizer
from transformers import LlamaConfig

from evidence.asking import command_line as asking_command_line
from evidence.study import PYTHON, ROOT, SERVED_URL, Part, Place
from evidence.toxicity_text import command_line as toxicity_text_command_line
from megatron_sip.config.early_checks import check_flags
from megatron_sip.evaluate import command_line as evaluate_command_line
from megatron_sip.judge.__main__ import command_line as judge_command_line
from megatron_sip.one_node.command import understand
from megatron_sip.prepare.__main__ import command_line as prepare_command_line

COMMAND_LINES = {
    "evidence.asking": asking_command_line,
    "evidence.toxicity_text": toxicity_text_command_line,
    "megatron_sip.evaluate": evaluate_command_line,
    "megatron_sip.judge": judge_command_line,
    "megatron_sip.prepare": prepare_command_line,
}


def small_place(folder: Path, seeds: tuple[int, ...] = (1, 2, 3)) -> Place:
    """Where a study would work, with a model's folder without weights and one lead."""
    model = folder / "model"
    byte_level_tokenizer().save_pretrained(model)
    LlamaConfig(vocab_size=320).save_pretrained(model)
    (model / "model.safetensors").write_bytes(b"")
    (folder / "leads.jsonl").write_text(json.dumps({"text": "A lead."}) + "\n")
    return Place(folder / "run", seeds, smollm2=model, wiki_leads=folder / "leads.jsonl")


def understood(parts: Iterable[Part], model: Path, texts: Path) -> list[str]:
    """The programs of all commands, each of which takes its flags; others than trainer and evaluation are only named.

    model, texts: an HF folder and JSON lines that stand for those which earlier commands make.
    """
    programs = []
    for words in (list(words) for part in parts for words in part.commands):
        if words[0] != PYTHON:
            assert os.access(ROOT / words[0], os.X_OK)
            programs.append(words[0])
            continue
        program, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
        programs.append(program)
        if program in COMMAND_LINES:
            COMMAND_LINES[program]().parse_args([word.replace(SERVED_URL, "http://127.0.0.1:1") for word in rest])
        elif program == "megatron_sip":
            request = understand([str(model), str(texts), *rest[2:]])
            check_flags([*request.flags, "--hf-config", str(model), "--rollout-local", "1"])
    return programs
