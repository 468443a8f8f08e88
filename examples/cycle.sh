#!/usr/bin/env bash
# The whole cycle on this machine: text -> judgements -> judge -> policy -> evaluation -> report: docs/training-a-judge.md.
#
#   examples/cycle.sh [--size small|paper] [--run-dir runs/cycle] [--policy HF_DIR] [--judge HF_DIR]
#                     [--data FILE ...] [--teacher-url URL ...] [--dry-run] [-- more flags of the policy's trainer]
#
# small (the default): SmolLM2-135M-Instruct as policy and as judge, Wikipedia leads, no GPU. paper: the paper's settings, for a node
# with GPUs; --policy, --judge and --data are needed, and --teacher-url names servers of a model that spoils texts for the
# judge to find (else rules do). The paper's protocol of judging takes weeks on one node; behind --, --judge-schedule circulant_bt
# --judge-verdict soft makes it days. The same command again goes on: a stage that is done has a file in RUN_DIR/done and is left out, all
# others continue where they were. The next round starts from this one's models: --policy RUN_DIR/policy/hf --judge RUN_DIR/judge/hf.
set -euo pipefail
called_from=$PWD
cd "$(dirname "$0")/.."

fail() { echo "error: $*" >&2 && exit 2; }
absolute() { case "$1" in /* | "") echo "$1" ;; *) echo "$called_from/$1" ;; esac; }

size=small run_dir=runs/cycle policy='' judge='' data=() teacher_urls=() dry_run=0
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) dry_run=1; shift; continue ;;
        --) shift; break ;;
        --size | --run-dir | --policy | --judge | --data | --teacher-url) [[ $# -gt 1 && $2 != --* ]] || fail "$1 needs a value" ;;
        *) fail "unknown option $1; usage: examples/cycle.sh [--size small|paper] [--run-dir DIR] [--policy HF_DIR]" \
            "[--judge HF_DIR] [--data FILE ...] [--teacher-url URL ...] [--dry-run] [-- FLAGS]" ;;
    esac
    case "$1" in
        --size) size=$2 && shift ;;
        --run-dir) run_dir=$(absolute "$2") && shift ;;
        --policy) policy=$(absolute "$2") && shift ;;
        --judge) judge=$(absolute "$2") && shift ;;
        --data) while [[ $# -gt 1 && $2 != --* ]]; do data+=("$(absolute "$2")") && shift; done ;;
        --teacher-url) while [[ $# -gt 1 && $2 != --* ]]; do teacher_urls+=("$2") && shift; done ;;
    esac
    shift
done

case "$size" in
    small)
        cut=(--seq-length 64 --suffix-length 20)
        shares=(--role-shares '50,50,0' --split '80,10,10')
        judgements=(--corrupt shuffle --criterion examples/short_quality.txt --seq-length 40 --suffix-length 20
            --min-prefix-length 20)
        judging=(--preset examples/train_judge.args) verdict=soft # as the preset's
        training=(--preset examples/cycle.args)
        samples=64
        ;;
    paper)
        [[ -n $policy && -n $judge && ${#data[@]} -gt 0 ]] || fail "--size paper needs --policy, --judge and --data"
        cut=(--seq-length 2048 --suffix-length 128)
        shares=(--role-shares '90,5,5' --split '98,1,1')
        judgements=(--corrupt swap-sentences swap-entities numbers "${cut[@]}")
        judging=(--preset judge) verdict=hard
        training=(--preset quality-16 --teacher-reasoning-tokens 0)
        samples=1000
        ;;
    *) fail "--size $size: small or paper" ;;
esac
[ ${#teacher_urls[@]} = 0 ] || judgements+=(--corrupt teacher --teacher-url "${teacher_urls[@]}") # the last --corrupt counts

stopped=0
trap 'stopped=1' TERM # what runs gets it too, of its process group, and is waited for

# run WORDS...: a command, shown before it runs; with --dry-run only shown.
run() {
    local status=0
    printf '%q ' "$@" && echo
    ((dry_run == 0)) || return 0
    "$@" || status=$?
    ((stopped == 0)) || { echo "stopped: the same command continues" >&2 && exit 0; }
    ((status == 0)) || { echo "error: status $status; the same command continues" >&2 && exit "$status"; }
}

# stage NAME FUNCTION RESULT...: unless it is done; done when the results are there. A trainer that was stopped ends well without them.
stage() {
    local name=$1 result
    [ ! -e "$run_dir/done/$name" ] || return 0
    echo "# $name"
    "$2"
    shift 2
    ((dry_run == 0)) || return 0
    for result; do
        [ -e "$run_dir/$result" ] || { echo "stopped before the end of '$name': the same command continues" >&2 && exit 0; }
    done
    mkdir -p "$run_dir/done"
    touch "$run_dir/done/$name"
}

make_corpus() {
    run python -m megatron_sip.prepare text --data-path "${data[@]}" --out "$run_dir/text"
    run python -m megatron_sip.prepare dedup --data-path "$run_dir/text" --out "$run_dir/distinct"
    run python -m megatron_sip.prepare roles --data-path "$run_dir/distinct" --out "$run_dir/corpus" "${shares[@]}"
}

make_judgements() {
    run python -m megatron_sip.prepare judgements --task quality --data-path "$run_dir/corpus" --hf-config "$judge" \
        "${judgements[@]}" --out "$run_dir/judgements"
}

train_judge() {
    run python -m megatron_sip "$judge" "$run_dir/judgements/judgements.jsonl" --run-dir "$run_dir/judge" "${judging[@]}"
}

ask_judge() {
    run python -m megatron_sip.judge accuracy "$run_dir/judgements/judgements.jsonl" --split test --model "$run_dir/judge/hf" \
        --judge-verdict "$verdict" --save "$run_dir/judge/accuracy.json"
}

train_policy() {
    run python -m megatron_sip "$policy" "$run_dir/corpus" --subset policy --teacher "$run_dir/judge/hf" \
        --run-dir "$run_dir/policy" "${training[@]}" "${flags[@]}"
}

# Numbers that ask no judge: the run's own comparison is by the judge that it learnt from, and one of another model needs servers.
evaluate() {
    local name model
    for name in base trained; do
        model=$policy
        [ $name = base ] || model=$run_dir/policy/hf
        run python -m megatron_sip.evaluate generate --model "$model" --data-path "$run_dir/corpus" --subset policy \
            --samples "$samples" --dataset standard "${cut[@]}" --output "$run_dir/$name/standard.jsonl"
        run python -m megatron_sip.evaluate diversity "$run_dir/$name/standard.jsonl" --output "$run_dir/$name/diversity.json"
        run python -m megatron_sip.evaluate nll --model "$model" --data-path "$run_dir/corpus" --subset policy \
            --samples "$samples" "${cut[@]}" --output "$run_dir/$name/nll.json"
    done
}

report() {
    run python -m megatron_sip.evaluate table "$run_dir/base" "$run_dir/trained" --output "$run_dir/tables.html"
    run python -m megatron_sip.evaluation.report "$run_dir/policy"
}

flags=("$@")
if [ "$size" = small ] && ((dry_run == 0)); then
    [[ -n $policy && -n $judge ]] || model=$(PYTHONWARNINGS=ignore python tools/fetch_smollm2.py)
    [ ${#data[@]} -gt 0 ] || data=("$(python tools/fetch_wiki_leads.py)")
fi
policy=${policy:-${model:-SMOLLM2}} judge=${judge:-${model:-SMOLLM2}}
[ ${#data[@]} -gt 0 ] || data=(WIKI_LEADS)

# Markers say what is done, not with what: another cycle needs another folder.
if ((dry_run == 0)); then
    mkdir -p "$run_dir"
    given=$(printf '%q ' "$size" "$policy" "$judge" "${data[@]}" "${teacher_urls[@]:-}" "${flags[@]}")
    [ -s "$run_dir/cycle.txt" ] || { echo "$given" > "$run_dir/cycle.txt.new" && mv "$run_dir/cycle.txt.new" "$run_dir/cycle.txt"; }
    [ "$(cat "$run_dir/cycle.txt")" = "$given" ] || fail "$run_dir holds a cycle of other settings, see cycle.txt there: give another --run-dir"
fi

stage corpus make_corpus corpus/manifest.json
stage judgements make_judgements judgements/manifest.json
stage judge train_judge judge/summary.json judge/hf/config.json
stage accuracy ask_judge judge/accuracy.json
stage policy train_policy policy/summary.json policy/hf/config.json
stage evaluation evaluate base/nll.json trained/nll.json
stage report report tables.html policy/report.html
echo "# done: $run_dir/tables.html, $run_dir/policy/report.html; next round: --policy $run_dir/policy/hf --judge $run_dir/judge/hf"
