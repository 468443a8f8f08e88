"""The folder hf/ that lies beside Megatron checkpoints: the model's Hugging Face files without its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

HF_SUBFOLDER = "hf"
WEIGHT_SUFFIXES = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5"),
    *(".msgpack", ".onnx", ".ot"),
)


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy everything of an HF folder but weights and what `target` has: config, generation config, tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and not (target / file.name).exists():
            shutil.copy2(file, target / file.name)
