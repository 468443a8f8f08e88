"""Builds the kernels in csrc/; everything else about the package is in pyproject.toml.

A C++ compiler is enough. With nvcc and a CUDA build of torch the CUDA kernels are built too, whether or not there is a
GPU; MEGATRON_SIP_CUDA=0 leaves them out and =1 insists on them.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup

CUDA_ARCHITECTURES = ("80", "90")

ROOT = Path(__file__).resolve().parent
X86 = platform.machine() in ("x86_64", "AMD64")
CPU_SOURCES = [
    "csrc/bindings.cpp",
    *sorted(
        f"csrc/cpu/{path.name}"
        for path in ROOT.glob("csrc/cpu/*.cpp")
        if X86 or not path.name.startswith(("bf16_", "tree_attention_"))
    ),
]
CUDA_SOURCES = ["csrc/cuda/logprob_cuda_ops.cpp", "csrc/cuda/logprob_cuda.cu"]


def cuda_toolkit() -> Path | None:
    """A toolkit with compiler, headers and run-time library, of the major version that torch was built with."""
    if torch.version.cuda is None:
        return None
    nvcc = shutil.which("nvcc")
    beside_nvcc = [Path(nvcc).resolve().parents[1]] if nvcc else []
    given = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    for root in [*given, *beside_nvcc, Path("/usr/local/cuda")]:
        needed = (root / "bin/nvcc", root / "include/cuda_runtime_api.h", root / "lib64/libcudart.so")
        if all(path.exists() for path in needed) and _major_version(needed[0]) == torch.version.cuda.split(".")[0]:
            return root
    return None


def _major_version(nvcc: Path) -> str | None:
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"release (\d+)\.", answer.stdout)
    return found.group(1) if found else None


def chosen_toolkit() -> Path | None:
    """The toolkit to build with, or None for a build without CUDA."""
    choice = os.environ.get("MEGATRON_SIP_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"MEGATRON_SIP_CUDA must be 0, 1 or auto, got {choice!r}")
    toolkit = cuda_toolkit() if choice != "0" else None
    if choice == "1" and toolkit is None:
        raise SystemExit(f"MEGATRON_SIP_CUDA=1 found no complete CUDA toolkit for torch's CUDA {torch.version.cuda}")
    print(f"CUDA kernels: {'from ' + str(toolkit) if toolkit else 'not built'}", file=sys.stderr)
    return toolkit


TOOLKIT = chosen_toolkit()
if TOOLKIT is not None:
    # torch reads it when the next line is imported.
    os.environ["CUDA_HOME"] = str(TOOLKIT)

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def kernels(cuda: bool) -> CppExtension | CUDAExtension:
    """The extension module `megatron_sip._kernels`."""
    # With trapping math GCC 12 vectorises no comparison for AVX2.
    cxx = ["-O3", "-std=c++20", "-fopenmp", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-g0"]
    if not cuda:
        return CppExtension(
            "megatron_sip._kernels",
            CPU_SOURCES,
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": cxx},
            extra_link_args=["-fopenmp"],
        )
    names = ",".join(f"sm_{number}" for number in CUDA_ARCHITECTURES)
    return CUDAExtension(
        "megatron_sip._kernels",
        CPU_SOURCES + CUDA_SOURCES,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("MEGATRON_SIP_CUDA_ARCHITECTURES", f'"{names}"')],
        extra_compile_args={
            "cxx": cxx,
            "nvcc": [
                "-O3",
                "-std=c++17",
                "--Werror=all-warnings",
                *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in CUDA_ARCHITECTURES),
                f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}",
            ],
        },
        extra_link_args=["-fopenmp"],
    )


setup(ext_modules=[kernels(TOOLKIT is not None)], cmdclass={"build_ext": BuildExtension})
