"""How long packed rows are on GPUs: by memory, by the pipeline, by what there is to pack."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sip.planning.devices import DEVICES
from megatron_sip.planning.memory import Parallel, trainer_memory
from megatron_sip.planning.rows import ENOUGH_TOKENS, MEMORY_SHARE, default_row_length, row_length_on_gpus
from megatron_sip.planning.settings import read_command
from megatron_sip.planning.shapes import model_folder, read_shape
from megatron_sip.planning.work import Training, step_work

LLAMA = read_shape(model_folder("llama-1.4b"))
PAIRS = Training(examples=256, prefix=1920, suffix=128, branches=2, row_length=2176, reference=True)
ALONE = Parallel()


@pytest.mark.parametrize("gpu", ["A100", "H100", "H200"])
def test_rows_are_as_long_as_memory_has_room_for_whole_groups(gpu: str) -> None:
    memory = DEVICES[gpu].memory
    length = default_row_length(LLAMA, PAIRS, ALONE, memory)
    groups = length // PAIRS.row_length
    assert length == groups * PAIRS.row_length
    assert groups > 1

    def needed(count: int) -> float:
        row = replace(PAIRS, row_length=count * PAIRS.row_length)
        return sum(trainer_memory(LLAMA, row, ALONE, 1).values())

    assert needed(groups) <= MEMORY_SHARE * memory
    assert needed(groups + 1) > MEMORY_SHARE * memory or length + PAIRS.row_length > ENOUGH_TOKENS


def test_one_group_is_the_least_even_where_it_may_not_fit() -> None:
    assert default_row_length(LLAMA, PAIRS, ALONE, 1e9) == PAIRS.row_length


def test_no_row_is_longer_than_what_a_replica_has_nor_so_long_that_stages_idle() -> None:
    memory = 1e12
    few = replace(PAIRS, examples=6)
    assert default_row_length(LLAMA, few, ALONE, memory) == 6 * PAIRS.row_length
    assert default_row_length(LLAMA, few, Parallel(data=3), memory) == 2 * PAIRS.row_length
    assert default_row_length(LLAMA, PAIRS, ALONE, memory) == 7 * PAIRS.row_length <= ENOUGH_TOKENS
    staged = Parallel(pipeline=4, data=4)  # 64 pairs a replica, 16 rows
    assert default_row_length(LLAMA, PAIRS, staged, memory) == 4 * PAIRS.row_length
    assert default_row_length(LLAMA, PAIRS, Parallel(pipeline=4, data=64), memory) == PAIRS.row_length


def test_a_given_length_is_kept_and_shared_gpus_get_the_shortest() -> None:
    def length(*flags: str) -> int:
        settings = read_command(
            ["--hf-config", str(model_folder("llama-1.4b")), "--preset", "quality", *flags]
        ).settings
        return row_length_on_gpus(settings, ALONE, DEVICES["H200"].memory)

    assert length() > 2 * 2176
    assert length("--row-length", "2176") == 2176
    assert length("--row-length", "5000") == 5000


def test_every_token_of_a_document_that_is_learnt_has_logits() -> None:
    def training(*flags: str) -> Training:
        command = ["--hf-config", str(model_folder("llama-1.4b")), "--preset", "safety-baseline", *flags]
        return step_work(read_command(command).settings, 0.5).training

    suffixes, documents = training(), training("--sft-target", "document")
    assert (suffixes.prefix, suffixes.suffix) == (1920, 128)
    assert (documents.prefix, documents.suffix) == (1, 2047)
