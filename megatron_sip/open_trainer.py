"""A run's trainer, with rows as long as its settings and, where they leave it open, the GPUs' memory say."""

from __future__ import annotations

import torch
from megatron.training.global_vars import get_args

from megatron_sip.config.settings import Settings
from megatron_sip.console import say
from megatron_sip.planning.memory import Parallel
from megatron_sip.planning.rows import row_length_on_gpus
from megatron_sip.platform.megatron import slow_parts
from megatron_sip.training.leaders import LeaderExchange
from megatron_sip.training.trainer import PolicyTrainer, TrainerSettings


def open_trainer(settings: Settings, exchange: LeaderExchange) -> PolicyTrainer:
    """Policy, optimizer and schedule, at the checkpoint that Megatron's arguments name."""
    row_length = _row_length(settings, exchange)
    for line in slow_parts() if settings.run.rank == 0 else ():
        say(line)
    if settings.run.rank == 0 and row_length != settings.row_length:
        say(f"rows: of up to {row_length:,} tokens, by the GPUs' memory; --row-length makes them shorter")
    how = TrainerSettings(row_length, settings.run.prompts, get_args().align_grad_reduce, settings.branches_per_row)
    # Padding is masked: any id does that the embedding has, and a tokenizer's own may lie outside it.
    return PolicyTrainer(how, settings.objective, exchange, pad_id=0)


def _row_length(settings: Settings, exchange: LeaderExchange) -> int:
    """Tokens of a packed row, the same on every rank."""
    args = get_args()
    if not torch.cuda.is_available() or not (args.bf16 or args.fp16):
        return settings.row_length
    parallel = Parallel(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        data=exchange.num_replicas,
        sequence=args.sequence_parallel,
        recompute=args.recompute_granularity == "full",
        distributed=args.use_distributed_optimizer,
        offload=settings.reference.offload,
        chunk=args.logit_chunk_columns,
    )
    memory = min(exchange.all_gather(torch.cuda.get_device_properties().total_memory))
    return row_length_on_gpus(settings, parallel, memory)
