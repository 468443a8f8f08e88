"""What a Hugging Face model folder holds beside its weights, and the one writer of it.

Such files lie in every folder of weights that we write, and in hf/ beside a run's Megatron checkpoints.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from megatron_sip.files import write_atomically

HF_SUBFOLDER = "hf"
MODEL_FILES = (
    *("config.json", "generation_config.json", "*.py"),  # code: of models that bring their own
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "preprocessor_config.json",
    ),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json"),
    *("chat_template.jinja", "chat_template.json"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""What belongs to a model besides its weights, as patterns of names; a model card speaks of other weights."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")

POINTER_START = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(file: Path) -> None:
    """Raise ValueError when `file` is what git leaves of a large file that was not fetched."""
    with file.open("rb") as opened:
        if opened.read(len(POINTER_START)) == POINTER_START:
            raise ValueError(
                f"{file} is a git-LFS pointer, not the file itself: run `git lfs pull` in {file.parent}, or download it"
            )


def refuse_pointers(folder: Path) -> None:
    """`refuse_pointer` for config, tokenizer and what else is no weight; weights are looked at when they are read."""
    for file in model_files(folder):
        refuse_pointer(file)


def model_files(folder: Path) -> list[Path]:
    """The files of `folder` that MODEL_FILES names."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file())
    return [file for file in files if any(fnmatchcase(file.name, pattern) for pattern in MODEL_FILES)]


def write_model_files(source: Path, target: Path, *, renew: bool = False) -> None:
    """Write config, tokenizer and what else MODEL_FILES names of the model in `source` into `target`.

    What `target` has stays. With `renew` it goes first, since it may be another model's (of a run that ended before its first
    checkpoint), unless there are weights beside it: then it is somebody's model.
    """
    target.mkdir(parents=True, exist_ok=True)
    if renew and not target.samefile(source) and not any(file.suffix in WEIGHT_SUFFIXES for file in target.iterdir()):
        for file in model_files(target):
            file.unlink()
    for file in model_files(source):
        if not (target / file.name).exists():
            write_atomically(target / file.name, file.read_bytes())
