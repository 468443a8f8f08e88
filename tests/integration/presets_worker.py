"""One training step of each preset in one process, for test_presets_step.

    python tests/integration/presets_worker.py SETUP.json RESULTS.jsonl

SETUP.json: {"flags": flags that every preset gets after its own, "cases": {name: further flags}}. A case's name is that
of its preset, or PRESET:WHAT. Each case is set up as `python -m megatron_sip.train` does, and makes its step with the same
calls; the line that it writes holds what the step was made of.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity_worker import forget_megatron, prepare_for_cases

from megatron_sip.config.parse import parse_arguments
from megatron_sip.config.settings import Settings
from megatron_sip.metrics import flatten
from megatron_sip.platform.megatron import rendezvous_store
from megatron_sip.stop_signal import StopSignal


def run_case(name: str, flags: list[str]) -> dict[str, Any]:
    """Parse, set up, one step; Megatron's global state is that of this case until `forget_megatron`."""
    from megatron.training.initialize import initialize_megatron

    from megatron_sip.run import set_up

    began = time.monotonic()
    settings = Settings.from_args(parse_arguments(["--preset", name.split(":")[0], *flags]))
    initialize_megatron(allow_no_cuda=True, store=rendezvous_store())
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        run = set_up(settings, stack)
        assert run.leader is not None
        ready = time.monotonic()
        experience = run.make_experience(stop)
        assert experience is not None
        judged = time.monotonic()
        before = master_weights(run.trainer.optimizer)
        metrics = flatten(run.trainer.train_step(experience.examples, run.reference, run.state.iteration))
        after = master_weights(run.trainer.optimizer)
    return {
        "preset": name,
        "objective": settings.objective.objective,
        "examples": [[[b.role for b in e.branches], [b.kind for b in e.branches]] for e in experience.examples],
        "metrics": {**flatten(experience.metrics), **metrics},
        "changed": sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True)) / len(before),
        "seconds": [ready - began, judged - ready, time.monotonic() - judged],
    }


def master_weights(optimizer: Any) -> list[torch.Tensor]:
    """Copies of what the optimizer updates: the float32 weights behind bfloat16 ones."""
    return [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]


def main() -> None:
    setup, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    prepare_for_cases()
    for name, flags in setup["cases"].items():
        folder = results.with_name(name.replace(":", "-"))
        result = run_case(name, [*setup["flags"], "--save", str(folder), *flags])
        with results.open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        forget_megatron()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
