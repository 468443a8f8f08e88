"""Megatron's MLP with the gate and its product in one pass where our bfloat16 kernels run."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.nn.functional import silu

from megatron_sip.kernels.bf16_gemm import bf16_kernels_apply
from megatron_sip.kernels.bf16_layers import swiglu


class SwiGLUMLP(MLP):
    """Drop-in for `MLP` in a layer spec; anything but a plain bfloat16 SwiGLU on CPU goes Megatron's way."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[S, 1, H] -> ([S, 1, H], no bias), as `MLP.forward`."""
        if per_token_scale is not None or not self._is_plain_swiglu():
            return super().forward(hidden_states, per_token_scale, **kwargs)
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up))

    def _is_plain_swiglu(self) -> bool:
        config = self.config
        return (
            config.gated_linear_unit
            and config.activation_func is silu
            and not config.add_bias_linear
            and config.activation_func_clamp_value is None
            and config.glu_linear_offset == 0.0
            and bf16_kernels_apply(self.linear_fc2.weight, width=self.linear_fc2.weight.shape[1])
        )
