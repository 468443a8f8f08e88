"""The policy: Megatron's GPTModel over packed prefix trees, returning log-probs of the branch tokens only.

    model, optimizer, scheduler = setup_model_and_optimizer(ModelType.encoder_or_decoder, model_provider)
    token_logprobs = row_logprobs(model[0], row)      # float32 [L] on the last pipeline stage

A packed row is one micro-batch of size 1. Its layout travels as `attention_mask` to `PrefixTreeAttention`; rotary
angles are looked up by position id, since every branch restarts at the end of its prefix; the output layer runs only
on the hidden states that predict a branch token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sip.kernels.fp32_lm_head import fp32_lm_head
from megatron_sip.kernels.linear_logprob import linear_token_logprobs
from megatron_sip.kernels.logprob import token_logprobs
from megatron_sip.kernels.tree_attention.flex import FlexTreeAttention
from megatron_sip.model.attention import PrefixTreeAttention
from megatron_sip.model.embedding import embed_into_main_grad
from megatron_sip.model.mlp import SwiGLUMLP
from megatron_sip.model.norm import RMSNorm, StandaloneRMSNorm
from megatron_sip.model.packing import PackedRow
from megatron_sip.model.tensor_parallel import AttentionShape, tensor_parallel_faults


class PolicyModel(GPTModel):
    """GPTModel whose rotary angles follow the position ids, over layers with prefix-tree attention.

    Takes GPTModel's arguments, and `unpadded_vocab_size`: Megatron pads the vocabulary, and the entries from this one
    on are left out of the softmax. With `logit_chunk_columns` the logits of so many vocabulary entries exist at a time
    (0: all). `embed_into_main_grad` says that nothing waits for autograd to finish the embedding's gradient
    (`--overlap-grad-reduce` does). Use it through `row_logprobs`.
    """

    def __init__(
        self,
        *args: Any,
        unpadded_vocab_size: int,
        logit_chunk_columns: int = 0,
        embed_into_main_grad: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.unpadded_vocab_size = unpadded_vocab_size
        self.logit_chunk_columns = logit_chunk_columns
        self._embed_into_main_grad = embed_into_main_grad and self.pg_collection.tp.size() == 1

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, decoder_input: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        """GPTModel's, with the angles [S, 1, 1, d] of the row picked by its position ids int64 [1, S].

        A token's position is never larger than its index in the row, so Megatron's table of S angles covers it.
        """
        if decoder_input is None and self.pre_process and self._embed_into_main_grad:
            decoder_input = self._embedded(input_ids)
        decoder_input, angles, *rest = super()._preprocess(input_ids, position_ids, decoder_input, *args, **kwargs)
        return (decoder_input, angles.index_select(0, position_ids[0]), *rest)

    def _embedded(self, input_ids: Tensor) -> Tensor | None:
        """What the embedding makes of input_ids int64 [1, S], [S, 1, H]; None where Megatron's own way is needed."""
        weight = self.embedding.word_embeddings.weight
        if weight.device.type != "cpu" or getattr(weight, "main_grad", None) is None:
            return None
        hidden = embed_into_main_grad(weight, input_ids[0])[:, None]
        return self.embedding.embedding_dropout(hidden.float() if self.config.fp32_residual_connection else hidden)

    def suffix_logprobs(self, hidden_states: Tensor, row: PackedRow, output_weight: Tensor | None) -> Tensor:
        """Log-probs, float32 [L], of the row's targets from the last layer's hidden states [S(/tp), 1, H].

        The same on every tensor-parallel rank. Only the states at `predictor_positions` are projected on the vocabulary.
        """
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # Each rank's gradient of the gathered states is complete after the head's all-reduce: backward only splits.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=group
            )
        predicting = hidden_states[:, 0].index_select(0, row.predictor_positions)
        weight = self.output_layer.weight if output_weight is None else output_weight
        vocab_start = group.rank() * weight.shape[0]
        if self.logit_chunk_columns:
            return linear_token_logprobs(
                predicting,
                weight,
                row.logit_rows,
                row.targets,
                tp_group=group,
                vocab_start=vocab_start,
                vocab_size=self.unpadded_vocab_size,
                chunk_columns=self.logit_chunk_columns,
            )
        logits = fp32_lm_head(predicting, weight, group)
        return token_logprobs(
            logits,
            row.logit_rows,
            row.targets,
            tp_group=group,
            vocab_start=vocab_start,
            vocab_size=self.unpadded_vocab_size,
        )


def row_logprobs(model: torch.nn.Module, row: PackedRow) -> Tensor:
    """Run one packed row through a (possibly wrapped) PolicyModel stage.

    Args:
        model: what `setup_model_and_optimizer` or `get_model` returned for this stage.
        row: the micro-batch, on the model's device.

    Returns:
        On the last pipeline stage the log-prob of each target, float32 [L], equal on all tensor-parallel ranks; the
        slice `branch_offsets[b]:branch_offsets[b + 1]` belongs to branch b. Elsewhere the stage's hidden states.
    """
    return model(
        input_ids=row.tokens[None],
        position_ids=row.position_ids[None],
        attention_mask=row.layout,
        output_processor=_suffix_logprobs,
        output_processor_context=(_unwrapped(model), row),
    )


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> PolicyModel:
    """Build this rank's part of the policy from Megatron's global arguments (for `megatron.training.get_model`).

    Raises:
        ValueError: an argument asks for what packed rows cannot do (see `check_arguments`).
    """
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    args = get_args()
    check_arguments(args)
    config = config or core_transformer_config_from_args(args)
    # From the model's vocabulary, not from args.padded_vocab_size: a tokenizer may know fewer tokens than the model.
    padded_vocab_size = calculate_padded_vocab_size(
        args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, logging_enabled=False
    )
    return PolicyModel(
        config=config,
        transformer_layer_spec=block_submodules(config, vp_stage),
        vocab_size=padded_vocab_size,
        unpadded_vocab_size=args.vocab_size,
        logit_chunk_columns=getattr(args, "logit_chunk_columns", 0),  # the converter parses Megatron's flags only
        embed_into_main_grad=not args.overlap_grad_reduce,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def block_submodules(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of one stage with prefix-tree attention: Transformer Engine's where it is installed, else local."""
    if config.transformer_impl == "transformer_engine" and HAVE_TE and torch.cuda.is_available():
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        norm: Any = TENorm
    else:
        layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        norm = StandaloneRMSNorm
        layer.submodules.input_layernorm = RMSNorm  # these two are fused into Transformer Engine's linear layers
        layer.submodules.pre_mlp_layernorm = RMSNorm
        # The specification is a partial of a class method: the same arguments for our subclass.
        layer.submodules.mlp = partial(SwiGLUMLP.as_mlp_submodule, **layer.submodules.mlp.keywords)
        if config.qk_layernorm:
            layer.submodules.self_attention.submodules.q_layernorm = norm
            layer.submodules.self_attention.submodules.k_layernorm = norm
    # On a GPU the layers share one block mask per row.
    core_attention = partial(PrefixTreeAttention, flex=FlexTreeAttention())
    layer.submodules.self_attention.submodules.core_attention = core_attention
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=norm)


OTHER_MATHEMATICS = (
    ("--rotary-percent", "rotary_percent", 1.0),
    ("--rotary-interleaved", "rotary_interleaved", None),
    ("--rotary-seq-len-interpolation-factor", "rotary_seq_len_interpolation_factor", None),
    ("--no-rope-freq", "no_rope_freq", None),
    ("--apply-layernorm-1p", "layernorm_zero_centered_gamma", None),
    ("--apply-residual-connection-post-layernorm", "apply_residual_connection_post_layernorm", None),
    ("--qk-l2-norm", "qk_l2_norm", None),
    ("--attention-output-gate", "attention_output_gate", None),
    ("--glu-linear-offset", "glu_linear_offset", 0.0),
    ("--activation-func-clamp-value", "activation_func_clamp_value", None),
    ("--mtp-num-layers", "mtp_num_layers", None),
    ("--multi-latent-attention", "multi_latent_attention", None),
)
"""Flags, and their values in all policies. Most others change no weight's shape: nothing would tell that the trainer learns
another function than the engines, and the export, compute."""


def check_arguments(args: Any) -> None:
    """Raise ValueError, naming flag and mend, when Megatron's arguments ask for what packed rows cannot do."""
    wrong = [
        (args.position_embedding_type != "rope", "--position-embedding-type must be rope"),
        (args.normalization != "RMSNorm", "--normalization must be RMSNorm"),
        (args.micro_batch_size != 1, "--micro-batch-size must be 1: a packed row is a micro-batch"),
        (args.context_parallel_size != 1, "--context-parallel-size must be 1: a prefix tree is not split over ranks"),
        (args.use_mup, "--use-mup is not supported: the suffix-only output layer does not scale logits"),
        (args.num_experts is not None, "--num-experts is not supported: the policy is a dense model"),
        (args.vocab_size is None, "--vocab-size is needed: entries that Megatron adds as padding are masked"),
        (args.attention_dropout != 0, "--attention-dropout must be 0: prefix-tree attention has none"),
        (args.window_size is not None, "--window-size is not supported: prefix-tree attention has no sliding window"),
        (args.softmax_type != "vanilla", "--softmax-type must be vanilla with prefix-tree attention"),
    ]
    for flag, name, usual in OTHER_MATHEMATICS:
        value = getattr(args, name)
        differs = value is not None and value is not False and value != usual
        wrong.append((differs, f"{flag} is not supported: no policy of ours has it; leave it out"))
    attention = AttentionShape(
        heads=args.num_attention_heads,
        groups=args.num_query_groups or args.num_attention_heads,
        head_dim=args.kv_channels,
    )
    messages = [message for is_wrong, message in wrong if is_wrong]
    messages += tensor_parallel_faults(attention, args.ffn_hidden_size, args.tensor_model_parallel_size)
    if messages:
        raise ValueError("; ".join(messages))


def _suffix_logprobs(
    *, hidden_states: Tensor, output_weight: Tensor | None, context: tuple[PolicyModel, PackedRow], **_: Any
) -> Tensor:
    """GPTModel's `output_processor`: called on the last pipeline stage instead of the output layer and the loss."""
    model, row = context
    return model.suffix_logprobs(hidden_states, row, output_weight)


def _unwrapped(model: torch.nn.Module) -> PolicyModel:
    while not isinstance(model, PolicyModel):
        model = model.module  # type: ignore[assignment]
    return model
