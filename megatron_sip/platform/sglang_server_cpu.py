"""SGLang's server on a machine without a GPU: the same, but it starts without importing what is of no use to it there.

    python -m megatron_sip.platform.sglang_server_cpu --model-path DIR --device cpu ...

Takes the arguments of `python -m sglang.launch_server`. SGLang spawns its processes, and each of them runs this module
first. SGLang would import Megatron, where it finds it, for its dumps of activations.
"""

from __future__ import annotations

import runpy

from megatron_sip.platform.hidden_packages import GPU_KERNELS, hide_packages

hide_packages(*GPU_KERNELS, "megatron.core")

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
