"""Which model a checkpoint is of: every argument that makes another one is named, nothing else."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen3Config
from workers import LLAMA3_ROPE

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.errors import DataError
from megatron_sip.hf.families import architecture, flag_of
from megatron_sip.platform.megatron import prepare_megatron

prepare_megatron()  # before anything imports Megatron

from megatron_sip.hf import checkpoint_model  # noqa: E402
from megatron_sip.hf.checkpoint_model import describe_rounding, differing, saved_arguments  # noqa: E402

LLAMA = architecture(LlamaConfig(num_key_value_heads=8, rope_parameters=LLAMA3_ROPE))


def saved(**changed: Any) -> argparse.Namespace:
    """What Megatron keeps of a checkpoint of LLAMA."""
    names = {checkpoint_model.SAVED_NAMES.get(name, name): value for name, value in LLAMA.items()}
    return argparse.Namespace(**(names | {"group_query_attention": True} | changed))


@given(st.data())
def test_each_number_that_differs_is_named_with_both_values(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(LLAMA)))
    other = not LLAMA[name] if isinstance(LLAMA[name], bool) else LLAMA[name] * 2
    [difference] = differing(saved(**{checkpoint_model.SAVED_NAMES.get(name, name): other}), LLAMA)
    assert difference == f"{flag_of(name)} {other} there, {LLAMA[name]} here"


def test_the_same_model_has_no_difference() -> None:
    assert differing(saved(), LLAMA) == []


def test_another_family_of_the_same_sizes_differs() -> None:
    config = Qwen3Config(**dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_hidden_layers"), 4))
    wanted = architecture(config)
    found = argparse.Namespace(**(wanted | {"qk_layernorm": False}))
    assert differing(found, wanted) == ["--qk-layernorm False there, True here"]


def test_what_an_older_checkpoint_does_not_say_is_not_held_against_it() -> None:
    assert differing(argparse.Namespace(num_layers=LLAMA["num_layers"], vocab_size=None), LLAMA) == []


def test_without_query_groups_every_head_has_its_own() -> None:
    found = saved(group_query_attention=False, num_query_groups=1)
    assert differing(found, LLAMA) == ["--num-query-groups 32 there, 8 here"]


def test_another_model_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_model, "saved_arguments", lambda _: saved(hidden_size=64, vocab_size=520))
    with pytest.raises(DataError) as caught:
        checkpoint_model.require_same_model(tmp_path, LLAMA, "hf/config.json")
    assert str(caught.value) == (
        f"{tmp_path} holds another model than hf/config.json: --hidden-size 64 there, 4096 here, "
        "--vocab-size 520 there, 32000 here"
    )


@pytest.mark.parametrize("tracker", [None, "", "release", "12", "x"])
def test_a_checkpoint_that_cannot_be_read_is_for_its_loader_to_name(tmp_path: Path, tracker: str | None) -> None:
    if tracker is not None:
        (tmp_path / TRACKER).write_text(tracker)
        (tmp_path / "iter_0000012").mkdir()
        (tmp_path / "iter_0000012" / "metadata.json").write_text('{"sharded_backend": "torch_dist"')
    assert saved_arguments(tmp_path) is None


@pytest.mark.parametrize(("source", "rounded"), [(torch.float32, True), (torch.float16, True), (torch.bfloat16, False)])
def test_a_checkpoint_of_more_precision_than_is_asked_for_is_told(source: torch.dtype, rounded: bool) -> None:
    note = describe_rounding(source, torch.bfloat16)
    assert (note is not None) == rounded
    assert note is None or f"{source} to torch.bfloat16" in note


class Evil:
    """Writes to a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "code of whoever made the checkpoint ran")


def test_a_checkpoint_can_run_code_and_documentation_and_converter_say_so(tmp_path: Path) -> None:
    checkpoint = tmp_path / "release"
    checkpoint.mkdir()
    (tmp_path / TRACKER).write_text("release")
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    assert saved_arguments(tmp_path) is None
    assert (tmp_path / "mark").exists()
    root = Path(__file__).parents[3]
    for place in ("docs/training.md", "megatron_sip/hf/convert.py"):
        assert "A Megatron checkpoint holds pickles" in (root / place).read_text()
