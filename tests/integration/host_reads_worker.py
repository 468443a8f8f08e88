"""What a training step reads from the host's side, for steps of one row and of three, for test_host_reads_per_row.

    python tests/integration/host_reads_worker.py HF_DIR RESULT.json

Builds policy, optimizer and reference as a run does; RESULT.json: {objective: [reads of a step of one row, of three rows]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from parity_worker import forget_megatron, prepare_for_cases
from transformers import AutoConfig

from megatron_sip.hf.standalone import initialize_megatron_for
from megatron_sip.model.packing import build_row
from megatron_sip.records import Branch, Example
from megatron_sip.training.objectives.settings import ObjectiveSettings

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

from host_reads import HostReads

FLAGS = (
    *("--global-batch-size", "4", "--calculate-per-token-loss", "--no-check-for-nan-in-loss-and-grad"),
    *("--attention-dropout", "0", "--hidden-dropout", "0"),
)
OBJECTIVES = (ObjectiveSettings("dpo", nll_coef=0.1), ObjectiveSettings("grpo", kl_coef=0.1))
EXAMPLES = [
    Example(
        task,
        list(range(5, 25)),
        [
            Branch([30, 31, 32], "chosen", "rollout", advantage=1.0, engine_logprobs=[-4.0, -5.0, -6.0]),
            Branch([33, 34], "rejected", "suffix", advantage=-1.0),
        ],
    )
    for task in range(3)
]


def reads_of_steps(hf_dir: str, objective: ObjectiveSettings) -> list[dict[str, int]]:
    from megatron_sip.hf.weights import load_hf_weights
    from megatron_sip.training.leaders import LeaderExchange
    from megatron_sip.training.reference_model import build_reference
    from megatron_sip.training.trainer import PolicyTrainer, TrainerSettings

    hf_config = AutoConfig.from_pretrained(hf_dir)
    hf_config.dtype = torch.float32
    args = initialize_megatron_for(hf_config, list(FLAGS))
    args.logit_chunk_columns = 0
    trainer = PolicyTrainer(TrainerSettings(48, 4), objective, LeaderExchange(timeout_seconds=60), pad_id=0)
    load_hf_weights(trainer.model, hf_dir)
    trainer.optimizer.reload_model_params()
    reference = build_reference(trainer.model)
    found = []
    for count in (1, 1, 3):  # the first step makes the optimizer's state
        rows = [build_row(EXAMPLES, [index], 32, 0) for index in range(count)]
        with HostReads() as log:
            trainer.train_rows(EXAMPLES[:count], rows, reference, 0)
        found.append(dict(log.reads))
    return found[1:]


def main() -> None:
    prepare_for_cases()
    reads = {}
    for objective in OBJECTIVES:
        reads[objective.objective] = reads_of_steps(sys.argv[1], objective)
        forget_megatron()
    Path(sys.argv[2]).write_text(json.dumps(reads))


if __name__ == "__main__":
    main()
