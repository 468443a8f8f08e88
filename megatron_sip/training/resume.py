"""What may differ between a checkpoint and the run that continues from it, told from the arguments that it keeps.

Settings of optimizer, schedule and objective may: the new values hold from the next step on. The data and its cuts may not,
since the cursor would point at other tasks, nor what the optimizer's state on disk is laid out for.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from megatron_sip.checkpoints.folder import tracked_iteration
from megatron_sip.errors import DataError
from megatron_sip.hf.checkpoint_model import saved_arguments

LEARNING = (
    *("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_iters", "lr_warmup_fraction", "train_iters"),
    *("lr_wsd_decay_iters", "lr_wsd_decay_style", "decoupled_lr", "decoupled_min_lr", "global_batch_size"),
    *("weight_decay", "weight_decay_incr_style", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad"),
    *("objective", "dpo_beta", "dpo_nll_coef", "dpo_label_smoothing", "dpo_loss", "ref_update_interval"),
    *("grpo_length", "grpo_clip_low", "grpo_clip_high", "grpo_kl_coef", "grpo_spread_normalization", "grpo_oversample"),
    *("truncated_answers", "mismatch_correction", "max_staleness"),
)
"""Arguments of which new values win."""
TASKS = (
    *("tasks", "data_path", "split", "seq_length", "suffix_length", "task_mode", "min_prefix_length", "text_field"),
    *("prepend_bos", "seed", "subset"),
)
"""Arguments that decide which tasks there are and in which order."""
LABELLED = {
    "judgements": ("max_prompt_length", "judge_prefix_chars", "judge_verdict"),
    "rewrites": ("max_prompt_length", "judge_prefix_chars", "rewrite_prompt"),
    "thoughts": ("max_prompt_length",),
}
"""Those of labelled tasks, by --tasks; None says that one is not given."""
OPTIMIZER = ("optimizer", "bf16", "fp16", "use_distributed_optimizer", "apply_wd_to_qk_layernorm")
"""Arguments that decide what an optimizer keeps, and where."""
LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
"""Arguments that a distributed optimizer's state is cut by, unless --dist-ckpt-optim-fully-reshardable was given."""
NEW_RUN = "or start a new run from its weights with --pretrained-checkpoint {load} and another --save folder"


def saved_run(save: Path) -> Namespace | None:
    """The arguments kept in the checkpoint that a run in `save` continues from, with its `iteration`; None without one.

    None also when they cannot be read: whoever loads the checkpoint says why.
    """
    step = tracked_iteration(save)
    saved = None if step is None else saved_arguments(save)
    return None if saved is None else Namespace(**{"prepend_bos": "off", **vars(saved), "iteration": step})


def differences(
    saved: Namespace, present: Namespace, names: Iterable[str], *, none_is_a_value: bool = False
) -> list[str]:
    """The flags among `names` whose values are not the checkpoint's, as "--lr 0.0005 (was 0.001)".

    What either side does not know is not a difference, nor is None: Megatron fills some defaults only later. Of our own flags
    None may be a value.
    """
    changed = []
    for name in names:
        if not (hasattr(saved, name) and hasattr(present, name)):
            continue
        old, new = getattr(saved, name), getattr(present, name)
        if old != new and (none_is_a_value or None not in (old, new)):
            changed.append(f"--{name.replace('_', '-')} {_words(new)} (was {_words(old)})")
    return changed


def _words(value: object) -> str:
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def require_resumable(saved: Namespace, present: Namespace, task_fingerprint: str | None) -> None:
    """Refuse to continue on other tasks, by their fingerprint, or with an optimizer that cannot take the saved state over.

    Raises:
        DataError: names the flags, both values of each, and the way out.
    """
    way_out = NEW_RUN.format(load=present.load)
    changed = differences(saved, present, OPTIMIZER)
    for name in ("decoupled_lr",):  # with or without: the optimizer has other groups of parameters
        if (getattr(saved, name, None) is None) != (getattr(present, name, None) is None):
            changed.append(f"--{name.replace('_', '-')} {getattr(present, name)} (was {getattr(saved, name, None)})")
    if present.use_distributed_optimizer and not getattr(saved, "dist_ckpt_optim_fully_reshardable", False):
        changed += differences(saved, present, LAYOUT)
    if changed:
        raise DataError(
            f"the optimizer's state at step {saved.iteration} of {present.load} does not fit {', '.join(changed)}: continue "
            f"with the same flags, {way_out}"
        )
    if getattr(saved, "task_fingerprint", task_fingerprint) != task_fingerprint:
        flags = differences(saved, present, TASKS)
        flags += differences(saved, present, LABELLED.get(getattr(present, "tasks", ""), ()), none_is_a_value=True)
        what = (
            f"with {', '.join(flags)}"
            if flags
            else "the flags are the same, so the files or the tokenizer have changed"
        )
        raise DataError(
            f"step {saved.iteration} of {present.load} was trained on other data or cuts ({what}), and the cursor would "
            f"point at other tasks: continue with the same data, {way_out}"
        )


def what_is_new(saved: Namespace, present: Namespace) -> list[str]:
    """Lines for the log about a run that continues from `saved`: whose values changed, and whether anything is left."""
    lines = []
    changed = differences(saved, present, LEARNING)
    if changed:
        lines.append(f"from step {saved.iteration + 1} on with {', '.join(changed)}")
    if getattr(saved, "learnt", False):
        lines.append(
            f"nothing left to learn: {present.load} ended so at step {saved.iteration}; to go on with other tasks or rollouts "
            + NEW_RUN.format(load=present.load).removeprefix("or ")
        )
    if saved.iteration >= present.train_iters:
        lines.append(
            f"nothing left to train: {present.load} is at step {saved.iteration} of --train-iters {present.train_iters}"
        )
    return lines
