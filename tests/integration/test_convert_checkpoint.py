"""megatron-sip-convert as a user runs it: HF -> Megatron -> HF bit for bit, and what it says of bad input."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import train
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralConfig
from workers import run_program

from megatron_sip.hf.converted import converted_checkpoint
from megatron_sip.hf.shards import buckets

MODULE = "megatron_sip.hf.convert"  # the console entry's; torchrun starts it as well


def convert(*arguments: str | Path, processes: int = 1, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    return run_program("-m", MODULE, *map(str, arguments), processes=processes, fresh=fresh)


def succeed(*arguments: str | Path, processes: int = 1, fresh: bool = False) -> None:
    done = convert(*arguments, processes=processes, fresh=fresh)
    assert done.returncode == 0, done.stdout[-6000:]


def assert_same_model(original: Path, converted: Path) -> None:
    """Every tensor equal in name, dtype and bits; config and tokenizer load in transformers as the original's."""
    expected, actual = (read_tensors(folder) for folder in (original, converted))
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert AutoConfig.from_pretrained(converted).to_dict() == {
        **AutoConfig.from_pretrained(original).to_dict(),
        "_name_or_path": str(converted),
    }
    text = "Größe, 日本語 and a plain sentence."
    assert AutoTokenizer.from_pretrained(converted)(text) == AutoTokenizer.from_pretrained(original)(text)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def smollm2_checkpoint(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "smollm2"
    succeed("hf-to-megatron", "--load", smollm2_dir, "--save", folder)
    return folder


def test_smollm2_round_trip_is_bit_identical(smollm2_dir: Path, smollm2_checkpoint: Path, tmp_path: Path) -> None:
    succeed("megatron-to-hf", "--load", smollm2_checkpoint, "--save", tmp_path / "hf")
    assert_same_model(smollm2_dir, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_split_over_tensor_and_pipeline_ranks(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Written by two tensor-parallel ranks, read by two pipeline stages, each of which writes its own file."""
    tensor, pipeline = (f"--{kind}-model-parallel-size" for kind in ("tensor", "pipeline"))
    split, whole = tmp_path / "split", tmp_path / "hf"
    succeed("hf-to-megatron", "--load", tiny_llama_dir, "--save", split, tensor, "2", processes=2, fresh=True)
    succeed("megatron-to-hf", "--load", split, "--save", whole, pipeline, "2", processes=2)
    assert_same_model(tiny_llama_dir, tmp_path / "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["model.embed_tokens.weight"] == "model-00001-of-00002.safetensors"
    assert index["weight_map"]["lm_head.weight"] == "model-00002-of-00002.safetensors"


def test_a_run_starts_from_a_hugging_face_folder(
    tiny_llama_dir: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step at learning rate 0 leaves its weights as they were; whoever asks for the checkpoint later finds it."""
    model = ("--pretrained-checkpoint", str(tiny_llama_dir), "--data-path", str(corpus))
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        shown = train(tmp_path / "run", *model, "--objective", "sft", "--train-iters", "1", "--lr", "0")
    cache = tmp_path / ".cache" / "megatron_sip" / "checkpoints"
    entry = converted_checkpoint(tiny_llama_dir, cache)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == [entry]
    assert f"converting {tiny_llama_dir} into {entry}" in shown
    succeed("megatron-to-hf", "--load", tmp_path / "run", "--save", tmp_path / "hf")
    assert_same_model(tiny_llama_dir, tmp_path / "hf")


def edited(folder: Path, target: Path, **fields: object) -> Path:
    """A copy of an HF folder whose config says something else."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vocab_size": 49144}, r"model.embed_tokens.weight is \[49152, 64\], .* \[49144, 64\] \(vocab_size = 49144\)"),
        ({"intermediate_size": 96}, r"gate_proj.weight is \[128, 64\], .* \[96, 64\] \(intermediate_size = 96\)"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_neither_cut_nor_padded(
    tiny_llama_dir: Path, tmp_path: Path, fields: dict[str, object], named: str
) -> None:
    folder = edited(tiny_llama_dir, tmp_path / "edited", **fields)
    done = convert("hf-to-megatron", "--load", folder, "--save", tmp_path / "new")
    assert done.returncode == 1
    assert re.search(named, done.stdout.splitlines()[-1])
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_that_is_not_the_config_s_is_neither_cut_nor_padded(
    smollm2_checkpoint: Path, smollm2_dir: Path, tmp_path: Path
) -> None:
    """Megatron would load what there is of a vocabulary of another size, and fill the rest."""
    folder = edited(smollm2_dir, tmp_path / "edited", vocab_size=49280)
    done = convert("megatron-to-hf", "--load", smollm2_checkpoint, "--save", tmp_path / "new", "--hf-dir", folder)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"megatron-sip-convert: {smollm2_checkpoint} holds another model than {folder}/config.json: "
        "--vocab-size 49152 there, 49280 here"
    ]
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_named(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(smollm2_checkpoint, folder)
    shard = max((folder / "release").iterdir(), key=lambda path: path.stat().st_size)
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    done = convert("megatron-to-hf", "--load", folder, "--save", tmp_path / "hf")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"megatron-sip-convert: --load {folder} is damaged: {shard} has another checksum than when it was saved"
    ]


def test_rounding_is_told_in_both_directions(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = edited(tiny_llama_dir, tmp_path / "edited", dtype="bfloat16")
    done = convert("hf-to-megatron", "--load", folder, "--save", tmp_path / "narrow")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "megatron-sip-convert: rounds 21 tensors from torch.float32 to torch.bfloat16, the dtype in config.json: to keep every "
        "bit, change it there",
        f"megatron-sip-convert: wrote {tmp_path / 'narrow'}",
    ]
    done = convert("megatron-to-hf", "--load", tmp_path / "narrow", "--save", tmp_path / "new", "--dtype", "float16")
    assert done.returncode == 0
    assert "rounds the checkpoint's torch.bfloat16 to torch.float16" in done.stdout.splitlines()[0]
    assert AutoConfig.from_pretrained(tmp_path / "new").dtype == torch.float16


def test_a_checkpoint_keeps_its_precision_whatever_the_config_says(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """A policy that was trained in float32 from a bfloat16 model: rounding would lose what a small learning rate taught."""
    assert convert("hf-to-megatron", "--load", tiny_llama_dir, "--save", tmp_path / "wide").returncode == 0
    config = edited(tiny_llama_dir, tmp_path / "narrow", dtype="bfloat16")
    done = convert("megatron-to-hf", "--load", tmp_path / "wide", "--save", tmp_path / "hf", "--hf-dir", config)
    assert (done.returncode, done.stdout) == (0, f"megatron-sip-convert: wrote {tmp_path / 'hf'}\n")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama_dir, tmp_path / "hf"))
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert AutoConfig.from_pretrained(tmp_path / "hf").dtype == torch.float32


def test_shards_are_cut_at_the_size_limit() -> None:
    weights = [("a", torch.zeros(3)), ("b", None), ("c", torch.zeros(2)), ("d", torch.zeros(9)), ("e", torch.zeros(1))]
    assert [[name for name, _ in bucket] for bucket in buckets(weights, 20)] == [["a", "c"], ["d"], ["e"]]


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_missing_source_is_named(direction: str, tmp_path: Path) -> None:
    done = convert(direction, "--load", tmp_path / "nowhere", "--save", tmp_path / "new", fresh=True)
    assert done.returncode == 1
    assert str(tmp_path / "nowhere") in done.stdout
    assert "--load" in done.stdout.splitlines()[-1]


def test_unsupported_architecture_is_named_with_those_supported(tmp_path: Path) -> None:
    MistralConfig(architectures=["MistralForCausalLM"]).save_pretrained(tmp_path / "mistral")
    done = convert("hf-to-megatron", "--load", tmp_path / "mistral", "--save", tmp_path / "new")
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert "MistralForCausalLM" in last
    assert "LlamaForCausalLM" in last
    assert not (tmp_path / "new").exists()


def test_destination_that_holds_a_checkpoint_is_kept(smollm2_dir: Path, smollm2_checkpoint: Path) -> None:
    tracker = smollm2_checkpoint / "latest_checkpointed_iteration.txt"
    written = tracker.stat().st_mtime_ns
    done = convert("hf-to-megatron", "--load", smollm2_dir, "--save", smollm2_checkpoint)
    assert done.returncode == 1
    assert f"--save {smollm2_checkpoint} already holds files" in done.stdout
    assert tracker.stat().st_mtime_ns == written


def test_parallel_sizes_without_torchrun_say_how_to_launch(tiny_llama_dir: Path, tmp_path: Path) -> None:
    done = convert(
        *("hf-to-megatron", "--load", tiny_llama_dir, "--save", tmp_path / "new"),
        *("--tensor-model-parallel-size", "2"),
    )
    assert done.returncode == 1
    assert "torchrun --nproc-per-node 2" in done.stdout.splitlines()[-1]
