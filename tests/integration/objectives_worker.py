"""One trainer step for each objective, for test_objectives_end_to_end.

    python tests/integration/objectives_worker.py POLICY_DIR REFERENCE_DIR PROBLEMS.json RESULT.pt

PROBLEMS.json is {name: [constants of ObjectiveSettings, examples]}.

Writes {name of the problem: {"loss", "gradients": by HF name}} of PolicyTrainer.train_step, with a reference of other weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity_worker import forget_megatron, prepare_for_cases
from transformers import AutoConfig

from megatron_sip.hf.standalone import initialize_megatron_for
from megatron_sip.metrics import flatten
from megatron_sip.records import Branch, Example
from megatron_sip.training.objectives.settings import ObjectiveSettings

FLAGS = (
    *("--global-batch-size", "4", "--calculate-per-token-loss", "--clip-grad", "0", "--rerun-mode", "disabled"),
    *("--no-check-for-nan-in-loss-and-grad", "--lr", "1e-3", "--train-iters", "2"),
)
CHUNKED_LOGITS, OFFLOADED, SPLIT = " with chunked logits", " with offloaded reference", " split over rows"
"""What may stand in a problem's name after its objective."""


def run_case(
    name: str, constants: dict[str, Any], policy_dir: str, reference_dir: str, examples: list[Example]
) -> dict:
    from megatron.training import get_args

    from megatron_sip.hf.weights import export_hf_weights, load_hf_weights
    from megatron_sip.training.leaders import LeaderExchange
    from megatron_sip.training.reference_model import build_reference
    from megatron_sip.training.trainer import PolicyTrainer, TrainerSettings

    hf_config = AutoConfig.from_pretrained(policy_dir)
    hf_config.dtype = torch.float32
    initialize_megatron_for(hf_config, list(FLAGS))
    args = get_args()
    args.logit_chunk_columns = 50 if name.endswith(CHUNKED_LOGITS) else 0
    settings = ObjectiveSettings(**constants)
    rows = TrainerSettings(160, 4, branches_per_row=2 if name.endswith(SPLIT) else None)
    trainer = PolicyTrainer(rows, settings, LeaderExchange(timeout_seconds=60), pad_id=0)
    load_hf_weights(trainer.model, policy_dir)
    trainer.optimizer.reload_model_params()
    reference = None
    if settings.needs_reference:
        reference = build_reference(trainer.model, offload=name.endswith(OFFLOADED))
        with reference.active(keep_changes=True) as chunks:
            load_hf_weights(chunks, reference_dir)
    metrics = flatten(trainer.train_step(examples, reference, 0))
    for chunk in trainer.model:  # the export knows the HF names: hand it the gradients as if they were the weights
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    gradients = {name: grad.clone() for name, grad in export_hf_weights(trainer.model, hf_config) if grad is not None}
    return {"loss": metrics["loss"], "gradients": gradients}


def main() -> None:
    policy_dir, reference_dir, problems_file, result = sys.argv[1:]
    prepare_for_cases()
    problems = json.loads(Path(problems_file).read_text())
    results = {}
    for name, (constants, records) in problems.items():
        examples = [Example(**{**record, "branches": [Branch(**b) for b in record["branches"]]}) for record in records]
        results[name] = run_case(name, constants, policy_dir, reference_dir, examples)
        forget_megatron()
    torch.save(results, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
