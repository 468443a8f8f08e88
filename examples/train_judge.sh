#!/usr/bin/env bash
# A judge, from raw text to a served model, on this machine: docs/training-a-judge.md.
#
#   examples/train_judge.sh [--run-dir runs/judge] [-- more flags of megatron_sip.train]
#
# SmolLM2-135M-Instruct learns by GRPO which of two texts is a piece of a Wikipedia lead and which is the same piece with its words
# shuffled. The same command again continues a stopped run, and ends with the figures of a finished one.
set -euo pipefail
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
run_dir=
while [ $# -gt 0 ]; do
    case "$1" in
        --run-dir) run_dir=$(absolute "$2"); shift 2 ;;
        --) shift; break ;;
        *) echo "unknown option $1; usage: examples/train_judge.sh [--run-dir DIR] [-- FLAGS]" >&2; exit 2 ;;
    esac
done
cd "$(dirname "$0")/.."
run_dir=${run_dir:-runs/judge}
records=$run_dir/records/judgements.jsonl

trap : TERM # what runs gets it too, of its process group, and is waited for

model=$(PYTHONWARNINGS=ignore python tools/fetch_smollm2.py)
leads=$(python tools/fetch_wiki_leads.py)
python -m megatron_sip.prepare judgements --task quality --corrupt shuffle --criterion examples/short_quality.txt \
    --data-path "$leads" --role-shares 0,1,0 --split 87,13,0 --max-documents 3200 \
    --hf-config "$model" --seq-length 40 --suffix-length 20 --min-prefix-length 20 --out "$run_dir/records"

python -m megatron_sip.train --preset examples/train_judge.args --pretrained-checkpoint "$model" --rollout-local 1 \
    --data-path "$records" --save "$run_dir" "$@"
[ -f "$run_dir/summary.json" ] || { echo "stopped: the same command continues" >&2; exit 0; }

# What stands there may be a part, after a kill, or of a run that was then continued.
step=$(cat "$run_dir/latest_checkpointed_iteration.txt")
if [ "$(cat "$run_dir/judge/step.txt" 2> /dev/null)" != "$step" ]; then
    rm -rf "$run_dir/judge" "$run_dir/accuracy_after.json"
    megatron-sip-convert megatron-to-hf --load "$run_dir" --save "$run_dir/judge"
    echo "$step" > "$run_dir/judge/step.txt"
fi
for name in before after; do
    judge=$model
    [ $name = before ] || judge=$run_dir/judge
    [ -f "$run_dir/accuracy_$name.json" ] || python -m megatron_sip.judge accuracy "$records" --split valid --model "$judge" \
        --save "$run_dir/accuracy_$name.json"
done
python benchmarks/judge_training.py "$run_dir" --json "$run_dir/judge_training.json" --figure "$run_dir/judge_training.png"
