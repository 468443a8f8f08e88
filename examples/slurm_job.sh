# shellcheck shell=bash
# What the sbatch scripts share: servers on their own nodes, the trainer on its own, a clean end. Sourced, not run.
#
#   settings -> servers (engines, teacher) -> health -> trainer -> stop servers -> requeue if time ran out
#
# SIGTERM to the batch script (sbatch --signal=B:TERM@SECONDS sends it before the time limit) goes on to the trainer, which
# saves the last finished step. The job is then requeued, and the same command continues at that step.

# Settings that rarely change; the scripts hold the others.
ENGINE_FLAGS="--mem-fraction-static=0.85"  # further SGLang flags, separated by spaces
TEACHER_FLAGS="--mem-fraction-static=0.85"
TRAINER_PORT=29500
ENGINE_PORT=30000
TEACHER_PORT=31000
START_MINUTES=30 # for the servers to load
SAVE_SECONDS=800 # for the trainer's last step and checkpoint; less than --signal=B:TERM@SECONDS of the job

dry_run=0
stop_requested=0
trainer_flags=()
server_pids=()
server_logs=()
trainer_pid=
hosts=()

fail() {
    echo "error: $*" >&2
    exit 1
}

# read_settings ARGUMENTS...: NAME=VALUE sets a variable of the settings, --dry-run only prints commands, what follows --
# goes to the trainer.
read_settings() {
    local name names=" VENV POLICY HF_CONFIG TEACHER_MODEL DATA RUN_DIR PRESET TRAINER_NODES ENGINE_NODES TEACHER_NODES \
GPUS_PER_NODE TENSOR_PARALLEL PIPELINE_PARALLEL ENGINE_TP TEACHER_TP SEQ_LENGTH WIN_RATE_PROMPTS ENGINE_FLAGS \
TEACHER_FLAGS TRAINER_PORT ENGINE_PORT TEACHER_PORT START_MINUTES SAVE_SECONDS "
    while (($#)); do
        case $1 in
            --dry-run) dry_run=1 ;;
            --)
                shift
                trainer_flags=("$@")
                return
                ;;
            *=*)
                name=${1%%=*}
                [[ $names == *" $name "* ]] || fail "'$name' is no setting; there are:$names"
                printf -v "$name" '%s' "${1#*=}"
                ;;
            *) fail "'$1': give settings as NAME=VALUE, --dry-run, or trainer flags after --" ;;
        esac
        shift
    done
}

# require NAME...: settings that must not be empty; a dry run shows their names instead.
require() {
    local name
    for name; do
        if ((dry_run)) && [[ -z ${!name} ]]; then
            printf -v "$name" '%s' "$name"
        fi
        [[ -n ${!name} ]] || fail "$name is not set: edit the script or add $name=... to the command"
    done
}

# The job's hosts, or made-up names when there is no job and the commands are only shown.
find_hosts() {
    local wanted=$((TRAINER_NODES + ENGINE_NODES + TEACHER_NODES))
    if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
        mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    elif ((dry_run)); then
        mapfile -t hosts < <(seq --format=node%03.0f "$wanted")
    else
        fail "this is no SLURM job: submit it with sbatch, or add --dry-run to see its commands"
    fi
    ((${#hosts[@]} == wanted)) || fail "the job has ${#hosts[@]} nodes, but TRAINER_NODES + ENGINE_NODES + \
TEACHER_NODES = $wanted: add --nodes=$wanted to sbatch"
}

# show WORD...: the words as a command line that a shell would read back.
show() {
    printf '%q' "$1"
    shift
    (($# == 0)) || printf ' %q' "$@"
    printf '\n'
}

# step HOSTS COUNT: the srun words of a job step with one task a node that sees all of the nodes' GPUs.
step() {
    step_words=(srun --overlap --nodes="$2" --ntasks="$2" --ntasks-per-node=1 --nodelist="$1"
        --gpus-per-node="$GPUS_PER_NODE" --cpu-bind=none)
}

# start_servers ROLE FIRST_HOST NODES TP PORT WORDS...: SGLang servers filling the GPUs of NODES hosts; sets server_urls.
start_servers() {
    local role=$1 first=$2 nodes=$3 tp=$4 port=$5 host slot log
    shift 5
    server_urls=()
    ((GPUS_PER_NODE % tp == 0)) || fail "$tp GPUs for each $role do not divide a node's $GPUS_PER_NODE GPUs"
    for host in "${hosts[@]:first:nodes}"; do
        for ((slot = 0; slot < GPUS_PER_NODE / tp; slot++)); do
            step "$host" 1
            # Every engine samples with a seed of its own: equal seeds would give equal rollouts.
            local command=("${step_words[@]}" env SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 SGLANG_RETURN_ORIGINAL_LOGPROB=1
                "$VENV/bin/python" -m sglang.launch_server --host=0.0.0.0
                --port=$((port + slot)) --tp-size="$tp" --base-gpu-id=$((slot * tp))
                --random-seed=$((1 + ${#server_urls[@]})) "$@")
            server_urls+=("http://$host:$((port + slot))")
            log=$RUN_DIR/logs/$role-$host-$slot.log
            if ((dry_run)); then
                echo "$(show "${command[@]}") >> $(printf '%q' "$log") 2>&1 &"
            else
                "${command[@]}" >> "$log" 2>&1 &
                server_pids+=($!)
                server_logs+=("$log")
            fi
        done
    done
}

# wait_healthy URL...: until all answer; gives up when a server has ended or START_MINUTES have passed.
wait_healthy() {
    local url index deadline=$((SECONDS + 60 * START_MINUTES))
    for url; do
        if ((dry_run)); then
            echo "# wait until $url/health answers"
            continue
        fi
        until curl --silent --fail --noproxy '*' --max-time 25 --output /dev/null "$url/health"; do
            ((stop_requested == 0)) || finish 0
            for index in "${!server_pids[@]}"; do
                kill -0 "${server_pids[index]}" 2> /dev/null || fail "a server ended while starting, see ${server_logs[index]}"
            done
            ((SECONDS < deadline)) || fail "$url was not healthy within $START_MINUTES minutes, see $RUN_DIR/logs"
            sleep 2
        done
    done
}

# train WORDS...: the trainer under torchrun on the first TRAINER_NODES hosts; returns its exit status.
train() {
    local status nodelist
    nodelist=$(IFS=, && echo "${hosts[*]:0:TRAINER_NODES}")
    step "$nodelist" "$TRAINER_NODES"
    # After a SIGTERM the step under way is finished and saved before torchrun may kill.
    local command=("${step_words[@]}" --kill-on-bad-exit=1
        env CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=8
        "$VENV/bin/torchrun" --nnodes="$TRAINER_NODES" --nproc-per-node="$GPUS_PER_NODE" --shutdown-timeout="$SAVE_SECONDS"
        --rdzv-backend=c10d --rdzv-id="${SLURM_JOB_ID:-0}" --rdzv-endpoint="${hosts[0]}:$TRAINER_PORT"
        -m megatron_sip.train "$@" "${trainer_flags[@]}")
    if ((dry_run)); then
        show "${command[@]}"
        return 0
    fi
    ((stop_requested == 0)) || return 0
    "${command[@]}" > >(tee -a "$RUN_DIR/logs/trainer.log") 2>&1 &
    trainer_pid=$!
    while true; do # a signal interrupts wait
        status=0
        wait "$trainer_pid" || status=$?
        kill -0 "$trainer_pid" 2> /dev/null || return "$status"
    done
}

stop_servers() {
    local pid seconds=0
    ((${#server_pids[@]} == 0)) && return
    kill -TERM "${server_pids[@]}" 2> /dev/null || true
    while ((seconds++ < 30)) && kill -0 "${server_pids[@]}" 2> /dev/null; do
        sleep 1
    done
    for pid in "${server_pids[@]}"; do
        kill -KILL "$pid" 2> /dev/null || true
    done
    server_pids=()
}

on_term() {
    stop_requested=1
    [[ -z $trainer_pid ]] || kill -TERM "$trainer_pid" 2> /dev/null || true
}

# finish STATUS: stop the servers; a job that was told to stop before its end goes back into the queue.
finish() {
    stop_servers
    ((stop_requested)) || exit "$1"
    if ! [[ $RUN_DIR/summary.json -nt $RUN_DIR/logs/started ]]; then # it is written after the last step
        echo "stopped before the end; requeueing job $SLURM_JOB_ID, which then continues"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit 0
}

# run_job HF_FOLDER POLICY_WORDS...: everything. HF_FOLDER holds the policy's config.json and tokenizer.
run_job() {
    local hf=$1 status=0 paths engine_flags teacher_flags engine_urls teacher_urls
    shift
    read -ra paths <<< "$DATA"
    read -ra engine_flags <<< "$ENGINE_FLAGS"
    read -ra teacher_flags <<< "$TEACHER_FLAGS"
    find_hosts
    if ((dry_run == 0)); then
        mkdir -p "$RUN_DIR/logs"
        touch "$RUN_DIR/logs/started"
        trap on_term TERM
        trap stop_servers EXIT
    fi

    # The trainer pushes its weights before the first rollout, so engines start with made-up ones. SGLang keeps two tokens
    # of its context in reserve.
    start_servers engine "$TRAINER_NODES" "$ENGINE_NODES" "$ENGINE_TP" "$ENGINE_PORT" --model-path="$hf" \
        --load-format=dummy --enable-fp32-lm-head --context-length=$((SEQ_LENGTH + 2)) --skip-server-warmup "${engine_flags[@]}"
    engine_urls=("${server_urls[@]}")
    start_servers teacher $((TRAINER_NODES + ENGINE_NODES)) "$TEACHER_NODES" "$TEACHER_TP" "$TEACHER_PORT" \
        --model-path="$TEACHER_MODEL" "${teacher_flags[@]}"
    teacher_urls=("${server_urls[@]}")
    wait_healthy "${engine_urls[@]}" "${teacher_urls[@]}"

    local words=(--preset "$PRESET" "$@" --data-path "${paths[@]}" --save "$RUN_DIR" --seq-length "$SEQ_LENGTH"
        --tensor-model-parallel-size "$TENSOR_PARALLEL" --pipeline-model-parallel-size "$PIPELINE_PARALLEL"
        --use-distributed-optimizer --overlap-grad-reduce --distributed-timeout-minutes 60
        --tensorboard-dir "$RUN_DIR/tensorboard" --win-rate-prompts "$WIN_RATE_PROMPTS")
    ((TENSOR_PARALLEL == 1)) || words+=(--sequence-parallel)
    ((ENGINE_NODES == 0)) || words+=(--rollout-url "${engine_urls[@]}")
    ((TEACHER_NODES == 0)) || words+=(--teacher-url "${teacher_urls[@]}")
    train "${words[@]}" || status=$?
    ((dry_run)) || finish "$status"
}
