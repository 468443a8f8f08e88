"""How long a packed row may be on a GPU: several groups, where memory has room for them."""

from __future__ import annotations

from dataclasses import replace

from megatron_sip.config.settings import Settings
from megatron_sip.planning.memory import Parallel, trainer_memory
from megatron_sip.planning.shapes import ModelShape, read_shape
from megatron_sip.planning.work import Training, step_work

MEMORY_SHARE = 0.6
"""Of a GPU's memory that the parts of `trainer_memory` may take: the rest is for libraries, fragments and what they leave out.
Guessed, until a GPU has been measured."""
ENOUGH_TOKENS = 16384
"""Of a row: a longer one makes matrix products no faster."""
ROWS_A_STAGE = 4
"""Micro-batches that each pipeline stage should have of a step: fewer leave it idle."""


def default_row_length(shape: ModelShape, training: Training, parallel: Parallel, memory: float) -> int:
    """Tokens of a row on GPUs of `memory` bytes: a multiple of `training.row_length`, which holds one group.

    As many groups as fit into the memory, but no more than ENOUGH_TOKENS, nor than leave the stages of a pipeline
    ROWS_A_STAGE rows each, nor than a replica has; at least one.
    """
    groups = max(1, training.examples // parallel.data)
    if parallel.pipeline > 1:
        groups //= ROWS_A_STAGE * parallel.pipeline
    for count in range(min(groups, ENOUGH_TOKENS // training.row_length), 1, -1):
        longer = replace(training, row_length=count * training.row_length)
        if sum(trainer_memory(shape, longer, parallel, parallel.pipeline).values()) <= MEMORY_SHARE * memory:
            return longer.row_length
    return training.row_length


def row_length_on_gpus(settings: Settings, parallel: Parallel, memory: float) -> int:
    """--row-length, or the default of this run on GPUs of `memory` bytes; the shortest where servers share them."""
    if settings.row_length_given or settings.local_servers.share_gpus:
        return settings.row_length
    training = step_work(settings, answer_share=1.0).training
    return default_row_length(read_shape(settings.run.hf_config), training, parallel, memory)
