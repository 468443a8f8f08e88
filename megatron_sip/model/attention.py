"""Megatron core attention over packed prefix trees: the drop-in for DotProductAttention in a layer spec."""

from __future__ import annotations

import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sip.kernels.tree_attention.cpu import tree_attention_cpu
from megatron_sip.kernels.tree_attention.dense import tree_attention_dense
from megatron_sip.kernels.tree_attention.flex import FlexTreeAttention


class PrefixTreeAttention(MegatronModule):
    """Token q attends to k iff both are in the same group, k <= q, and k is in the prefix or in q's own branch.

    Constructor and forward take what `megatron.core.transformer.dot_product_attention.DotProductAttention` takes. The
    tree arrives as `attention_mask`: the row's `layout`, int32 [B, 4] (`model.packing.PackedRow`). Being a tensor
    argument, it survives activation recomputation and travels to every pipeline stage with the micro-batch. Heads are
    already split over tensor parallel ranks and the sequence is already gathered when this is called, so neither needs
    anything here. There are no parameters.

    On CPU it runs `tree_attention_cpu`, on a GPU `flex` (float64 there: the dense mask). Giving all layers of a model
    one `flex` object, as `functools.partial(PrefixTreeAttention, flex=FlexTreeAttention())` in the layer spec does,
    lets them share the row's block mask.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        flex: FlexTreeAttention | None = None,
    ) -> None:
        super().__init__(config=config)
        _check_supported(config, attn_mask_type, attention_type, attention_dropout)
        self.layer_number = max(1, layer_number)
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        if config.apply_query_key_layer_scaling:
            self.softmax_scale /= self.layer_number
        self._flex = FlexTreeAttention() if flex is None else flex

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """query [S, 1, H, D], key and value [S, 1, G, D], attention_mask the layout int32 [B, 4] -> [S, 1, H * D].

        Raises:
            ValueError: more than one row in the micro-batch, or attention_mask is no layout.
        """
        if query.shape[1] != 1:
            raise ValueError(
                f"a packed row is a micro-batch of its own: --micro-batch-size must be 1, got {query.shape[1]}"
            )
        if attention_mask is None or attention_mask.dim() != 2 or attention_mask.shape[1] != 4:
            shape = None if attention_mask is None else tuple(attention_mask.shape)
            raise ValueError(f"attention_mask must be a packed row's layout, int32 [B, 4]; got shape {shape}")
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("prefix-tree attention takes neither attention_bias nor packed_seq_params")
        output = self.attend(query[:, 0], key[:, 0], value[:, 0], attention_mask, self.softmax_scale)
        return output.reshape(query.shape[0], 1, -1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float) -> Tensor:
        """Attention within a row's trees, arguments and result as `tree_attention_dense`, by what is best on the device."""
        if query.device.type == "cpu":
            return tree_attention_cpu(query, key, value, layout, scale)
        if query.dtype == torch.float64:
            return tree_attention_dense(query, key, value, layout, scale)
        return self._flex(query, key, value, layout, scale)


def _check_supported(
    config: TransformerConfig, attn_mask_type: AttnMaskType, attention_type: str, attention_dropout: float | None
) -> None:
    dropout = config.attention_dropout if attention_dropout is None else attention_dropout
    if dropout != 0.0:
        raise ValueError(f"prefix-tree attention has no dropout: pass --attention-dropout 0 (got {dropout})")
    if attn_mask_type != AttnMaskType.causal or attention_type != "self":
        raise ValueError(f"prefix-tree attention is causal self attention, got {attn_mask_type} {attention_type}")
    if config.context_parallel_size != 1:
        raise ValueError(f"--context-parallel-size must be 1 with prefix trees, got {config.context_parallel_size}")
    if config.window_size is not None or config.softmax_type != "vanilla":
        raise ValueError(
            "prefix-tree attention has no sliding window and only the vanilla softmax: "
            f"got window_size {config.window_size}, softmax_type {config.softmax_type}"
        )
