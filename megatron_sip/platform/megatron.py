"""Stock megatron-core (0.19.2, with `megatron.training`) made ready for the machine at hand.

    from megatron_sip.platform.megatron import machine_arguments, prepare_megatron, rendezvous_store
    prepare_megatron()
    args = parse_and_validate_args(args_defaults=...)   # with machine_arguments() put before the user's flags
    initialize_megatron(allow_no_cuda=True, store=rendezvous_store())

`megatron_fixes` is what every machine needs, `megatron_cpu` what stands in for a GPU. This folder is the only place of the
project that replaces anything in a library.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.distributed
from torch.distributed import HashStore

from megatron_sip.platform.hidden_packages import UNUSED, hide_packages
from megatron_sip.platform.megatron_cpu import import_megatron_for_cpu, stand_in_for_cuda
from megatron_sip.platform.megatron_fixes import mend_megatron


@functools.cache
def prepare_megatron() -> None:
    """Mend Megatron in this process, and where there is no CUDA give its calls a CPU meaning in this thread. Idempotent.

    Must run before Megatron is initialised and before a model is built, in every process of the run; on a CPU in the thread
    that builds and runs models.
    """
    hide_packages(*UNUSED)
    if torch.cuda.is_available():
        mend_megatron()
        return
    import_megatron_for_cpu()
    mend_megatron()
    stand_in_for_cuda()


def machine_arguments() -> list[str]:
    """Megatron's flags for what this machine lacks: CUDA, or with CUDA what Megatron itself does not find there.

    Put them before the user's own flags, so that the user's win where both are given.
    """
    if not torch.cuda.is_available():
        return arguments_for(cuda=False, transformer_engine=False, apex=False)
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.tensor_parallel import layers

    return arguments_for(cuda=True, transformer_engine=HAVE_TE, apex=layers._grad_accum_fusion_available)


def arguments_for(*, cuda: bool, transformer_engine: bool, apex: bool) -> list[str]:
    """`machine_arguments` of a machine with these parts."""
    if cuda and transformer_engine:
        # Megatron's own output layer, which is there with Transformer Engine too, fuses with Apex's kernel only.
        return [] if apex else ["--no-gradient-accumulation-fusion"]
    local_layers = ["--transformer-impl", "local", "--no-masked-softmax-fusion", "--no-persist-layer-norm"]
    if cuda:
        return [*local_layers, "--no-gradient-accumulation-fusion", "--no-rope-fusion"]
    return [
        *local_layers,
        *("--distributed-backend", "gloo"),
        "--use-cpu-initialization",
        "--disable-jit-fuser",  # its torch.compile graphs cost more than they save on small CPU runs
        "--no-bias-swiglu-fusion",
        "--no-bias-dropout-fusion",
    ]


def rendezvous_store() -> torch.distributed.Store | None:
    """Return the `store` for `initialize_megatron`: None under torchrun, else one in this process."""
    return None if torch.distributed.is_torchelastic_launched() or "MASTER_ADDR" in os.environ else HashStore()
