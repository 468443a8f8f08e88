#!/usr/bin/env bash
# Everything that waits for a GPU, in ten minutes: builds csrc/ against the torch that is there (2.11 or newer, with CUDA), checks
# the kernels and a training step against float64, measures them, and writes one JSON. Needs no SGLang and no network.
# Without nvcc there is nothing to check: the build and the op's check then go wrong. Figures: build/gpu_day.json, unless --json says.
#
#   benchmarks/gpu_day.sh [--wheels DIR] [--json FILE] [--work DIR] [--minutes N] [--parts NAME ...]
#   benchmarks/gpu_day.sh --rehearse [--built]     # the same programs on a CPU with tiny shapes
#
# --wheels: a folder with megatron-core's wheel and whatever else of its needs the machine lacks. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" benchmarks/gpu_day.py "$@"
