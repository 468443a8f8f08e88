"""What stands in for a GPU where there is none: megatron-core (0.19.2, with `megatron.training`) on CPU and gloo.

Megatron names the device "cuda" in its factories, seeds, streams and type checks. Those names are given a CPU meaning here,
once per process, before Megatron initialises; `platform.megatron` calls it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_sip.platform.fused_kernels_cpu import offer_fused_kernels
from megatron_sip.platform.hidden_packages import GPU_KERNELS, hide_packages

CPU = torch.device("cpu")


def stand_in_for_cuda() -> None:
    """Give Megatron's CUDA calls a CPU meaning in this process and thread. Once per process.

    The device names are mapped by a `TorchFunctionMode`, which is per thread: build and run models in the calling thread.
    """
    _replace_cuda_runtime()
    _replace_random_state()
    offer_fused_kernels()
    _CudaNamesMeanCpu().__enter__()  # for the life of the process


def import_megatron_for_cpu() -> None:
    """Import Megatron without packages that need a GPU, and with its fused functions as plain ones.

    That is what `--disable-jit-fuser` means, but Megatron reads that flag when the modules that hold them are imported
    already, and torch's compiler with them: another four seconds, in every process of a run.
    """
    hide_packages(*GPU_KERNELS)
    compiled = torch.compile
    torch.compile = _as_it_is
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compiled


def _as_it_is(model: Callable[..., Any] | None = None, **_options: Any) -> Callable[..., Any]:
    """Takes the place of `torch.compile` as a decorator, with options or without."""
    return _as_it_is if model is None else model


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Maps `device="cuda"` to the CPU, `.cuda()` to the identity, `.type()` to the names that optimizers check."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.backward:  # the mode is off inside a handler, but backward hooks need it
            grad = kwargs.pop("gradient", None)
            with self:
                return torch.autograd.backward(args[0], grad, **kwargs)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and any(_is_cuda(arg) for arg in args[1:]):
            args = (args[0], *(CPU if _is_cuda(arg) else arg for arg in args[1:]))
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _NoEvent:
    """Stands for `torch.cuda.Event`: CPU work is finished when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _NoEvent) -> float:
        return 0.0

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    synchronize = record = wait = _nothing


class _NoStream(_NoEvent):
    """Stands for `torch.cuda.Stream`."""

    def record_event(self, event: _NoEvent | None = None) -> _NoEvent:
        return event or _NoEvent()

    wait_stream = wait_event = _NoEvent._nothing


class _CpuProperties:
    """What Megatron reads of `torch.cuda.get_device_properties`."""

    name = "cpu"
    major = 10  # the newest generation: older ones make Megatron ask for CUDA_DEVICE_MAX_CONNECTIONS=1
    minor = 0
    multi_processor_count = 1
    total_memory = 0


def _no_operation() -> Callable[..., None]:
    """A new function that does nothing. New each time: torch's compiler keeps one rule a function object."""
    return lambda *args, **kwargs: None


def _replace_cuda_runtime() -> None:
    """Point the functions of `torch.cuda` that Megatron calls unconditionally at CPU equivalents."""
    replacements: dict[str, Any] = {
        "current_device": lambda: CPU,
        "device_count": lambda: 1,  # Megatron sets up model parallelism and seeds only for a positive count
        "set_device": _no_operation(),
        "get_device_properties": lambda *_: _CpuProperties(),
        "get_device_capability": lambda *_: (_CpuProperties.major, _CpuProperties.minor),
        "get_device_name": lambda *_: _CpuProperties.name,
        "synchronize": _no_operation(),
        "empty_cache": _no_operation(),
        "reset_peak_memory_stats": _no_operation(),
        "memory_stats": lambda *_: {},
        "Stream": _NoStream,
        "Event": _NoEvent,
        "current_stream": lambda *_: _NoStream(),
        "default_stream": lambda *_: _NoStream(),
        "set_stream": _no_operation(),
        "stream": lambda *_: contextlib.nullcontext(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)


def _replace_random_state() -> None:
    """Let the CUDA random state be that of the CPU generator, for Megatron's tracker and checkpoints."""
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    cuda_modules: tuple[Any, ...] = (torch.cuda, torch.cuda.random)
    for module in cuda_modules:
        module.get_rng_state = get_state
        module.set_rng_state = set_state
        module.manual_seed = manual_seed
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
