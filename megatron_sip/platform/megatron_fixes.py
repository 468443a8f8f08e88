"""Faults of the megatron-core wheel (0.19.2) that are mended on every machine, with CUDA or without."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_sip.kernels.bf16_gemm import add_weight_gradient


def mend_megatron() -> None:
    """Replace what ends or falsifies a run. Once per process, before Megatron is initialised."""
    _skip_dataset_helper_build()
    _let_torch_adam_resume()
    _let_new_settings_win()
    _let_transformer_engine_fuse_gradients()
    _let_synchronous_saves_report_in_place()


def _skip_dataset_helper_build() -> None:
    """Do not run `make` for Megatron's dataset helper where the installed wheel has no Makefile.

    The wheel carries the compiled helper but not its Makefile, and `initialize_megatron` ends the process when `make`
    fails. This concerns GPU machines as well.
    """
    from megatron.core.datasets import utils

    if not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None


def _let_torch_adam_resume() -> None:
    """Make the distributed optimizer's checkpoints load when torch's Adam is inside it (no Transformer Engine, no Apex).

    Four faults of Megatron 0.19.2 end or falsify a resumed run there: a fresh optimizer has no per-parameter state,
    of which `state_dict` wants the step; the reshardable formats hold no step, which loading looks up; loading float32
    parameters writes into a view that requires grad; and the restored step is one tensor shared by all parameters, so
    that each of them advances it for all.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer = distrib_optimizer.DistributedOptimizer
    sharded_state_dict, load_state_dict = optimizer.sharded_state_dict, optimizer.load_state_dict
    set_states = optimizer._set_main_param_and_optimizer_states

    def fill_then_shard(self: Any, model_state: Any, is_loading: bool = False, *args: Any, **kwargs: Any) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()  # the checkpoint overwrites them
        return sharded_state_dict(self, model_state, is_loading, *args, **kwargs)

    def load_then_unshare_step(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @torch.no_grad()  # in float32 the main parameters are views of the model's
    def set_states_but_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        set_states(self, model_param, {**tensors, "step": None})  # `load_state_dict` has set it

    optimizer.sharded_state_dict = fill_then_shard
    optimizer.load_state_dict = load_then_unshare_step
    optimizer._set_main_param_and_optimizer_states = set_states_but_step


def _let_new_settings_win() -> None:
    """Let optimizers be resumed with another learning rate, weight decay, betas or eps than their checkpoint's.

    Megatron looks the saved parameter groups up by values that include the learning rate (one that changed is a ValueError
    or a KeyError), and takes all other settings from the checkpoint, against the flags.
    """
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer import optimizer as plain

    kinds: tuple[Any, ...] = (
        plain.FP32Optimizer,
        plain.Float16OptimizerWithFloat16Params,
        distrib_optimizer.DistributedOptimizer,
    )
    for kind in kinds:
        kind.load_state_dict = _loading_under_new_settings(kind.load_state_dict)


def _let_transformer_engine_fuse_gradients() -> None:
    """Take away what forbids --gradient-accumulation-fusion with Transformer Engine where Apex is missing.

    Transformer Engine's layers add weight gradients to `main_grad` by themselves. Megatron's own output layer asks for Apex's
    kernel when it is made; ours never runs as a layer (`kernels.fp32_lm_head` takes its weight), so a slow one will do.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.tensor_parallel import layers

    if not HAVE_TE or layers._grad_accum_fusion_available:
        return
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=_accumulate_weight_gradient, wgrad_gemm_accum_fp16=_accumulate_weight_gradient
    )
    layers._grad_accum_fusion_available = True


def _accumulate_weight_gradient(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    add_weight_gradient(main_grad, grad_output, total_input)


def _let_synchronous_saves_report_in_place() -> None:
    """Spare every rank a process that only hands the results of a save back to the rank itself.

    Megatron spawns it for synchronous saves too, which run in the rank: seconds of the first save, in which it imports torch.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    save = TorchDistSaveShardedStrategy.save

    def save_in_place(self: Any, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        between_processes = filesystem_async._results_queue
        filesystem_async._results_queue = queue.Queue()
        try:
            save(self, sharded_state_dict, checkpoint_dir)
        finally:
            filesystem_async._results_queue = between_processes

    TorchDistSaveShardedStrategy.save = save_in_place


def _loading_under_new_settings(load_state_dict: Any) -> Any:
    def load(self: Any, state_dict: Any) -> None:
        inner = state_dict.get("optimizer", state_dict)  # a float32 optimizer's state is torch's own
        inner["param_groups"] = under_new_settings(self.optimizer.param_groups, inner["param_groups"])
        load_state_dict(self, state_dict)

    return load


def under_new_settings(present: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved parameter groups with the settings of the present ones, which are in the same order.

    What a group has learnt stays: its parameters, and the step that some optimizers keep there.
    """
    return [
        {**old, **{name: value for name, value in new.items() if name not in ("params", "step")}}
        for new, old in zip(present, saved, strict=True)
    ]
