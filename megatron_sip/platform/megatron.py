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
import importlib.metadata
import os

import torch
import torch.distributed
from packaging.version import Version
from torch.distributed import HashStore

from megatron_sip.kernels.extension import missing_cuda_kernels
from megatron_sip.platform.hidden_packages import UNUSED, hide_packages
from megatron_sip.platform.megatron_cpu import import_megatron_for_cpu, stand_in_for_cuda
from megatron_sip.platform.megatron_fixes import mend_megatron

TRANSFORMER_ENGINE = ("2.8", "2.21")
"""Versions from the first on and before the last have what megatron-core 0.19.2 imports; the extra `gpu` has the same bounds.

Read in the newest of them, not run; `transformer_engine.pytorch.fp8` is to go in some later one.
"""


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
        return arguments_for(cuda=False, transformer_engine=False)
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return arguments_for(cuda=True, transformer_engine=HAVE_TE)


def arguments_for(*, cuda: bool, transformer_engine: bool) -> list[str]:
    """`machine_arguments` of a machine with these parts."""
    if cuda and transformer_engine:
        return []
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


def slow_parts() -> list[str]:
    """Lines for the user: what is slow on this machine with CUDA for want of a package, and how to get it."""
    if not torch.cuda.is_available():
        return []
    from megatron.core.extensions.transformer_engine import HAVE_TE

    try:
        installed = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    lines = (transformer_engine_line(installed, HAVE_TE), missing_cuda_kernels())
    return [line for line in lines if line is not None]


def transformer_engine_line(installed: str | None, loaded: bool) -> str | None:
    """What is wrong with Transformer Engine of the `installed` version (None: none), which Megatron has `loaded` or not."""
    first, last = TRANSFORMER_ENGINE
    wanted = f"{first} or later, before {last}"
    if installed is None:
        return f"no Transformer Engine: Megatron's own layers run, which are slower; make install-gpu installs it ({wanted})"
    if not loaded:
        return (
            f"Transformer Engine {installed} does not load, so Megatron's own layers run, which are slower; "
            f'python -c "import transformer_engine.pytorch.fp8" says why (this Megatron wants {wanted})'
        )
    if not Version(first) <= Version(installed) < Version(last):
        return f"Transformer Engine {installed}: this Megatron is made for {wanted}; make install-gpu installs one"
    return None


def rendezvous_store() -> torch.distributed.Store | None:
    """Return the `store` for `initialize_megatron`: None under torchrun, else one in this process."""
    return None if torch.distributed.is_torchelastic_launched() or "MASTER_ADDR" in os.environ else HashStore()
