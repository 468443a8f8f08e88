"""Stock SGLang on a machine without a GPU, through SGLang's own plug-in point for platforms.

    python -m sglang.launch_server --model-path DIR --device cpu --attention-backend torch_native \\
        --sampling-backend pytorch --disable-overlap-schedule

`pyproject.toml` declares `activate` in the entry-point group `sglang.srt.platforms`; SGLang calls it at start-up in
every process. With a GPU it declines and SGLang runs as if this package were not there.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from megatron_sip.kernels.bf16_gemm import bf16_gemm, bf16_kernels_apply
from megatron_sip.platform.sglang_cpu_attention import decode_attention, extend_attention

CPU_PLATFORM = "megatron_sip.platform.sglang_cpu:EagerCpuPlatform"


def has_accelerator() -> bool:
    """True when torch sees a GPU (CUDA, ROCm or XPU), so that SGLang must choose its own platform."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def activate() -> str | None:
    """Entry point: the platform class that SGLang is to load, or None when there is a GPU."""
    return None if has_accelerator() else CPU_PLATFORM


def _batched_attention(runner: Any) -> Any:
    """SGLang's torch_native backend for `runner`, its two loops over sequences replaced where ours apply."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class BatchedCpuAttention(TorchNativeAttnBackend):
        def _run_sdpa_forward_decode(self, *tensors: Any, **options: Any) -> Any:
            encoder_lens = tensors[-1]
            if encoder_lens is not None or options["sliding_window_size"] is not None:
                return super()._run_sdpa_forward_decode(*tensors, **options)
            return decode_attention(*tensors[:-1], scaling=options["scaling"])

        def _run_sdpa_forward_extend(self, *tensors: Any, **options: Any) -> Any:
            encoder_lens = tensors[-1]
            if encoder_lens is not None or options["sliding_window_size"] is not None or not options["causal"]:
                return super()._run_sdpa_forward_extend(*tensors, **options)
            return extend_attention(*tensors[:-1], scaling=options["scaling"])

    return BatchedCpuAttention(runner)


def _keep_residual_in_float32() -> None:
    """Let every RMSNorm hand on the residual stream unrounded, as SGLang does itself for on-policy Qwen.

    Rounding it to bf16 after each layer is the larger part of the difference to the trainer's log-probs.
    """
    from sglang.srt.layers.layernorm import RMSNorm

    construct = RMSNorm.__init__

    @wraps(construct)
    def construct_with_float32_residual(self: Any, *args: Any, **options: Any) -> None:
        construct(self, *args, **options)
        self.fp32_residual = True

    RMSNorm.__init__ = construct_with_float32_residual


def _project_in_float32_from_bf16() -> None:
    """Let --enable-fp32-lm-head compute float32 logits as on a GPU, from bf16 weights.

    SGLang's own CPU path makes a float32 copy of the whole output weight in every step.
    """
    from sglang.srt.layers.logits_processor import LogitsProcessor, should_apply_lm_head_quant_method

    stock = LogitsProcessor._compute_lm_head

    @wraps(stock)
    def compute(self: Any, hidden: Tensor, lm_head: Any, embedding_bias: Any = None, **options: Any) -> Tensor:
        weight = getattr(lm_head, "weight", None)
        if (
            self.use_fp32_lm_head
            and isinstance(weight, Tensor)
            and hidden.dtype == torch.bfloat16
            and bf16_kernels_apply(weight, hidden.shape[-1])
            and not hasattr(lm_head, "set_lora")
            and not should_apply_lm_head_quant_method(lm_head, getattr(lm_head, "quant_method", None))
        ):
            return bf16_gemm(hidden, weight)
        return stock(self, hidden, lm_head, embedding_bias, **options)

    LogitsProcessor._compute_lm_head = compute


def _platform_class() -> type:
    from sglang.srt.platforms.cpu import CpuSRTPlatform
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import PlatformCapabilities

    class EagerCpuPlatform(CpuSRTPlatform):
        """SGLang's CPU platform with plain torch kernels.

        It counts as out-of-tree, because the in-tree CPU platform takes for granted the AMX kernels of SGLang's own
        CPU build, which the wheel from the package index does not hold.
        """

        _enum = PlatformEnum.OOT
        capabilities = PlatformCapabilities(graph_capture=False)

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def get_dispatch_key_name(self) -> str:
            return "native"

        def init_backend(self) -> None:
            from sglang.srt.layers.attention.attention_registry import register_attention_backend

            register_attention_backend("torch_native")(_batched_attention)
            _keep_residual_in_float32()
            _project_in_float32_from_bf16()

    return EagerCpuPlatform


def __getattr__(name: str) -> type:
    # The class needs sglang as its base; this module is also imported by processes that must not load sglang.
    if name == "EagerCpuPlatform":
        return _platform_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
