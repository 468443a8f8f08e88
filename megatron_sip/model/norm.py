"""RMSNorm for the local (not Transformer Engine) layers."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import rms_norm

from megatron_sip.kernels import bf16_layers
from megatron_sip.kernels.bf16_gemm import bf16_kernels_apply


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with a Megatron norm's constructor, usable under sequence parallelism.

    Megatron refuses torch's norms there because nothing tells it to sum the weight's gradient over the tensor-parallel
    ranks, each of which sees a part of the sequence. The `sequence_parallel` mark on the weight does.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] in, the same shape in the weight's dtype out (`--fp32-residual-connection` feeds float32)."""
        assert self.eps is not None
        if x.dtype in (torch.bfloat16, torch.float32) and bf16_kernels_apply(self.weight, x.shape[-1]):
            return bf16_layers.rms_norm(x, self.weight, self.eps)
        weight = self.weight.to(x.dtype)
        return rms_norm(x, self.normalized_shape, weight, self.eps).to(self.weight.dtype)


class StandaloneRMSNorm(RMSNorm):
    """A norm that is a module of its own in Transformer Engine's layers too: the same entries in a checkpoint.

    Transformer Engine's modules keep an extra state (fp8 scales); a checkpoint without it would not load there.
    """

    def get_extra_state(self) -> None:
        """Nothing, as in Megatron's own linear layers."""

    def set_extra_state(self, state: object) -> None:
        """Ignore what Transformer Engine saved."""
