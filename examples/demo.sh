#!/usr/bin/env bash
# Self-Improving Pretraining on this machine: real Megatron, real SGLang, a real post-trained teacher, real text.
#
#   examples/demo.sh [--run-dir runs/demo] [--data 'my/*.jsonl'] [-- more flags of megatron_sip.train]
#
# The policy is SmolLM2-135M, continued; its post-trained self is the teacher and judges by likelihood. Without --data the
# text is Python's own language reference. The same command again continues a stopped run.
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

models=$HOME/.cache/megatron_sip
teacher=$(python tools/fetch_smollm2.py --save "$models/SmolLM2-135M-Instruct")
policy=$models/SmolLM2-135M-dist-checkpoint
[ -f "$policy/latest_checkpointed_iteration.txt" ] || python tools/convert_checkpoint.py hf-to-megatron --load "$teacher" --save "$policy"
mkdir -p "$run_dir"
if [ -z "$data" ]; then
    data=$run_dir/corpus.jsonl
    [ -f "$data" ] || python tools/write_demo_corpus.py --save "$data"
fi

# Heap reuse: without it most of the time of large CPU tensors is page faults.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
export PYTHONWARNINGS=ignore
exec python -m megatron_sip.train \
    --pretrained-checkpoint "$policy" --save "$run_dir/checkpoints" --run-dir "$run_dir" \
    --data-path "$data" --split 60,0,40 --bf16 --fp32-residual-connection \
    --seq-length 128 --suffix-length 32 --row-length 640 \
    --objective dpo --candidates suffix rollout --num-rollouts 4 --dpo-beta 0.1 \
    --criteria likelihood=1 --teacher-model "$teacher" --rollout-local 1 \
    --global-batch-size 8 --train-iters 32 --lr 5e-5 --min-lr 5e-6 --lr-decay-style cosine --lr-warmup-iters 4 \
    --clip-grad 1.0 --weight-decay 0.0 --adam-beta2 0.95 --save-interval 16 \
    --tensorboard-dir "$run_dir/tensorboard" --wandb-project megatron_sip --wandb-exp-name demo \
    --wandb-save-dir "$run_dir" --logging-level 40 \
    --win-rate-prompts 96 --win-rate-temperature 1.0 "$@"
