"""SGLang's server on a machine without a GPU: the same, but it starts without importing what is of no use to it there.

    python -m megatron_sip.platform.sglang_server_cpu --model-path DIR --device cpu ...

Takes the arguments of `python -m sglang.launch_server`. SGLang would import Megatron, where it finds it, for its dumps of
activations, all models that it knows, and everything once more in each of the processes that it spawns: here these are forks.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy

from megatron_sip.platform.hidden_packages import GPU_KERNELS, UNUSED, hide_packages

hide_packages(*GPU_KERNELS, *UNUSED, "megatron.core")
# It looks for a model there first, and imports all others for one that is not there.
os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", "megatron_sip.platform.sglang_models")


def fork_processes() -> None:
    """Let multiprocessing fork in this process from now on, whatever it is told. SGLang spawns because of CUDA.

    It starts its scheduler and detokenizer before the first thread, which a fork would be without.
    """
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *_args, **_options: None


def wait_for_no_gpu() -> None:
    """SGLang waits for a GPU once it has released memory, and a torch that is made for CUDA ends it where there is none."""
    import torch

    torch.cuda.synchronize = lambda *_: None


if __name__ == "__main__":
    fork_processes()
    wait_for_no_gpu()
    runpy.run_module("sglang.launch_server", run_name="__main__")
