#!/usr/bin/env bash
# Self-Improving Pretraining on this machine: real Megatron, real SGLang, a real post-trained teacher, real text.
#
#   examples/demo.sh [--run-dir runs/demo] [--data 'my/*.jsonl'] [-- more flags of megatron_sip.train]
#
# The policy is SmolLM2-135M, continued; its post-trained self is the teacher and judges by likelihood. Without --data the
# text is Python's own language reference. All else is the command for one node, megatron-sip, with the settings of demo.args.
# The same command again continues a stopped run.
set -euo pipefail
called_from=$PWD
cd "$(dirname "$0")/.."

absolute() { case "$1" in /*) echo "$1" ;; *) echo "$called_from/$1" ;; esac; }

run_dir=runs/demo
data=
while [ $# -gt 0 ]; do
    case "$1" in
        --run-dir) run_dir=$(absolute "$2"); shift 2 ;;
        --data) data=$(absolute "$2"); shift 2 ;;
        --) shift; break ;;
        *) echo "unknown option $1; usage: examples/demo.sh [--run-dir DIR] [--data FILES] [-- FLAGS]" >&2; exit 2 ;;
    esac
done

teacher=$(PYTHONWARNINGS=ignore python tools/fetch_smollm2.py)
mkdir -p "$run_dir"
if [ -z "$data" ]; then
    data=$run_dir/corpus.jsonl
    [ -f "$data" ] || python tools/write_demo_corpus.py --save "$data" > /dev/null
fi

shorter=()
if [ "$(python -c 'from megatron_sip.platform.number_format import bfloat16_pays; print(bfloat16_pays())')" = False ]; then
    echo "demo: without AVX-512 BF16 this processor computes in float32, so the run is shorter: 10 steps instead of 32, 48" \
        "held-out prefixes instead of 96"
    shorter=(--train-iters 10 --win-rate-prompts 48)
fi

exec python -m megatron_sip "$teacher" "$data" --teacher "$teacher" --run-dir "$run_dir" --preset examples/demo.args \
    --tensorboard-dir "$run_dir/tensorboard" "${shorter[@]}" "$@"
