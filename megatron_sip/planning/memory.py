"""Bytes of a trainer rank by part, and what a server's memory leaves for keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sip.planning.shapes import BF16, ModelShape
from megatron_sip.planning.work import Training

GRADIENT, OPTIMIZER = 4, 12
"""Bytes a parameter: a float32 gradient; float32 master weights and Adam's two moments."""
LOGIT = 8
"""Bytes of a predicted token's logit: float32, and its gradient."""


@dataclass(frozen=True, slots=True)
class Parallel:
    """Processes of the trainer: tensor x pipeline x data, and what decides their memory.

    sequence: sequence parallelism. recompute: layers are computed again in backward. distributed: the optimizer's state is
    spread over the replicas. offload: the reference waits in host memory. chunk: logits held at a time, 0 for all.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    recompute: bool = False
    distributed: bool = False
    offload: bool = False
    chunk: int = 0

    @property
    def ranks(self) -> int:
        """Processes, one a GPU."""
        return self.tensor * self.pipeline * self.data


def rank_parameters(shape: ModelShape, parallel: Parallel) -> float:
    """Parameters of the fullest rank: of the first or the last stage, which has a table (a tied one too), or both."""
    layers = math.ceil(shape.layers / parallel.pipeline)
    tables = 2 if parallel.pipeline == 1 and not shape.tied else 1
    return (layers * shape.layer_parameters + tables * shape.table_parameters) / parallel.tensor


def trainer_memory(shape: ModelShape, work: Training, parallel: Parallel, rows: int) -> dict[str, float]:
    """Bytes of the fullest rank by part, with `rows` micro-batches a replica; without what libraries and fragments take."""
    parameters = rank_parameters(shape, parallel)
    reference = work.reference and not parallel.offload
    predicted = work.branches * work.suffix * max(1, work.row_length // (work.prefix + work.branches * work.suffix))
    columns = min(parallel.chunk or shape.vocab, math.ceil(shape.vocab / parallel.tensor))
    return {
        "weights": BF16 * parameters,
        "gradients": GRADIENT * parameters,
        "optimizer": OPTIMIZER * parameters / (parallel.data if parallel.distributed else 1),
        "reference": BF16 * parameters if reference else 0.0,
        "activations": activation_bytes(shape, parallel, work.row_length, rows),
        "logits": LOGIT * predicted * columns,
    }


def activation_bytes(shape: ModelShape, parallel: Parallel, tokens: int, rows: int) -> float:
    """What the rows under way keep for backward, by Korthikanti et al. (2022), section 4, for gated MLPs, grouped queries and
    attention that keeps no scores: of a layer the inputs of both norms and of what follows them, queries, keys, values, the
    attention's output, gate, up and their product. Recomputed, only a layer's input is kept, and one layer whole."""
    split = parallel.tensor if parallel.sequence else 1
    heads = (2 * shape.heads + 2 * shape.groups) * shape.head_dim
    layer = BF16 * tokens * (4 * shape.hidden / split + (heads + 3 * shape.ffn) / parallel.tensor)
    layers, in_flight = math.ceil(shape.layers / parallel.pipeline), min(parallel.pipeline, rows)
    if parallel.recompute:
        return layer + in_flight * layers * BF16 * tokens * shape.hidden / split
    return in_flight * layers * layer


def server_capacity(shape: ModelShape, memory: float, held: float) -> int:
    """How many sequences that hold `held` tokens each fit at once into the `memory` of one server; 0: not even the weights."""
    room = memory - shape.served_bytes
    return max(0, int(room // max(held * shape.kv_bytes, 1)))
