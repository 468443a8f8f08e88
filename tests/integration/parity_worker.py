"""Runs policies at several parallel layouts in one torchrun and writes what each gave, for test_model_parity.

    torchrun --nproc-per-node 4 tests/integration/parity_worker.py CASES.json RESULTS_DIR

CASES.json is a list of cases: {"name", "hf_dir", "examples", "flags", "row_length", "import", "steps", "save", "text"}.
Each builds model and optimizer as the trainer does (its flags may load a checkpoint), takes the weights from hf_dir if
"import" (and saves them as a checkpoint where the flags say), trains "steps" steps on all examples, saves a resumable
checkpoint if "save", and writes losses, log-probs and digests of the exported weights to RESULTS_DIR/NAME.RANK.json.
Before training, rank 0 writes the logits of the token ids "text", if there are any, to RESULTS_DIR/NAME.logits.pt.
"""

import gc
import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sip.hf.standalone import initialize_megatron_for
from megatron_sip.model.packing import build_row
from megatron_sip.platform.megatron import prepare_megatron
from megatron_sip.records import Branch, Example


def main() -> None:
    cases, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    prepare_for_cases()
    for case in cases:
        result = run_case(case, results)
        (results / f"{case['name']}.{dist.get_rank()}.json").write_text(json.dumps(result))
        forget_megatron()
    dist.destroy_process_group()


def run_case(case: dict, results: Path) -> dict:
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.training import get_args
    from megatron.training.checkpointing import save_checkpoint
    from megatron.training.training import setup_model_and_optimizer
    from transformers import AutoConfig

    from megatron_sip.hf.weights import export_hf_weights, load_hf_weights
    from megatron_sip.model.gpt import model_provider

    hf_config = AutoConfig.from_pretrained(case["hf_dir"])
    hf_config.dtype = torch.float32
    initialize_megatron_for(hf_config, [*case["flags"], "--global-batch-size", "12", "--calculate-per-token-loss"])
    args = get_args()
    model, optimizer, scheduler = setup_model_and_optimizer(ModelType.encoder_or_decoder, model_provider)
    if case["import"]:
        load_hf_weights(model, case["hf_dir"])
        optimizer.reload_model_params()
        if args.save:
            save_checkpoint(0, model, None, None, 0, release=True)
    if case["text"]:
        logits = logits_of(case["text"], model)
        if dist.get_rank() == 0:
            torch.save(logits, results / f"{case['name']}.logits.pt")
    losses = []
    for _ in range(case["steps"]):
        optimizer.zero_grad()
        logprobs, loss = train_step(case, model)
        losses.append(loss)
        _, grad_norm, _ = optimizer.step()
        scheduler.step(increment=args.global_batch_size)
    if case["save"]:
        save_checkpoint(args.iteration + case["steps"], model, optimizer, scheduler, 0)
    digests, of_each_replica = (
        {name: digest(tensor) for name, tensor in exported if tensor is not None}
        for exported in (
            export_hf_weights(model, hf_config),
            export_hf_weights(model, hf_config, every_replica=True),
        )
    )
    return {
        "replica": parallel_state.get_data_parallel_rank(),
        "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
        "logprobs": logprobs,
        "losses": losses,
        "grad_norm": float(grad_norm),
        "digests": digests,
        "digests_of_each_replica": of_each_replica,
    }


@torch.no_grad()
def logits_of(ids: list[int], model: list) -> torch.Tensor:
    """[len(ids), vocabulary] after each token, from Megatron's own output layer; without pipeline stages."""
    example = Example(task_index=0, prefix_ids=ids[:1], branches=[Branch(ids[1:], "chosen", "suffix")])
    row = build_row([example], (0,), -(-len(ids) // 16) * 16, pad_id=0)
    logits = model[0](
        input_ids=row.tokens[None],
        position_ids=row.position_ids[None],
        attention_mask=row.layout,
        runtime_gather_output=True,
    )
    return logits[0, : len(ids)].clone()


def train_step(case: dict, model: list) -> tuple[dict[str, list[float]], float | None]:
    """Forward and backward over this replica's rows; log-probs by example and the mean loss, on the last stage."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    from megatron_sip.model.gpt import row_logprobs

    get_model_config(model[0]).finalize_model_grads_func = finalize_model_grads
    examples = [
        Example(
            task_index=0,
            prefix_ids=entry["prefix"],
            branches=[Branch(ids, "chosen", "suffix") for ids in entry["branches"]],
        )
        for entry in case["examples"]
    ]
    # Two examples share a row, and one row is a filler, as an uneven step has.
    contents = [(0, 1), (2,), (3,), ()]
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = contents[replica::replicas]
    logprobs = {}

    def forward_step(iterator, chunk):
        indices = next(iterator)
        row = build_row(examples, indices, case["row_length"], pad_id=0)

        def loss_function(token_logprobs):
            if indices:
                logprobs[",".join(map(str, indices))] = token_logprobs.tolist()
            return -token_logprobs.sum(), torch.tensor(len(token_logprobs), dtype=torch.int), {}

        return row_logprobs(chunk, row), loss_function

    for chunk in model:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(mine),
        model=model,
        num_microbatches=len(mine),
        seq_length=case["row_length"],
        micro_batch_size=1,
        forward_only=False,
    )
    if not parallel_state.is_pipeline_last_stage():
        return {}, None
    flat = [value for values in logprobs.values() for value in values]
    sums = torch.tensor([-sum(flat), len(flat)], dtype=torch.float64)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    return logprobs, float(sums[0] / sums[1])


def digest(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()}"


def prepare_for_cases() -> None:
    """What `prepare_megatron` does, and no more of what is half of a small case: Megatron reads its own sources for the texts
    of --help, and prints six hundred lines of arguments."""
    prepare_megatron()
    from megatron.training import arguments
    from megatron.training.argument_utils import ArgumentGroupFactory

    ArgumentGroupFactory._get_field_docstrings = lambda *_: {}
    arguments._print_args = lambda *_: None


def forget_megatron() -> None:
    """Drop Megatron's global state but the process group of all, so that the next case can have other sizes.

    A group of gloo has a thread that wakes a hundred times a second: those of 20 cases would take most of the time.
    """
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import destroy_global_vars

    parallel_state.destroy_model_parallel()
    destroy_global_vars()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()  # models and optimizers hold on to them in cycles
    gc.freeze()  # what is left, modules above all, is not looked at again: a collection took a second


if __name__ == "__main__":
    main()
