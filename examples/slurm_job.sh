# shellcheck shell=bash
# What the sbatch scripts share: servers on their own nodes, the trainer on its own, a clean end. Sourced, not run.
#
#   settings -> servers (engines, teacher, rewriter) -> health -> trainer -> stop servers -> requeue if there is more to do
#
# SIGTERM to the batch script (sbatch --signal=B:TERM@SECONDS sends it before the time limit) goes on to the trainer as
# SIGUSR1, upon which it saves the last finished step. The job is then requeued, and the same command continues there. So it
# does when the trainer failed after a step. A server that ends is started again.

# Settings that rarely change; the scripts hold the others.
ENGINE_FLAGS="--mem-fraction-static=0.85"  # further SGLang flags, separated by spaces
TEACHER_FLAGS="--mem-fraction-static=0.85"
REWRITER_FLAGS="--mem-fraction-static=0.85"
SERVER_ADDRESS= # where servers listen; empty: at their node's name. 0.0.0.0 (all networks) if a node takes its own name for loopback
TRAINER_PORT= # empty ports: of this job alone, by its id, so that jobs that share a host do not meet
ENGINE_PORT=
TEACHER_PORT=
REWRITER_PORT=
START_MINUTES=30 # for the servers to load
SAVE_SECONDS=800 # for the trainer's last step and checkpoint; less than --signal=B:TERM@SECONDS of the job
MAX_RESTARTS=3   # requeues of a job that comes no further than its last checkpoint
RESTART_SECONDS=5     # until a server that ended is started again
MAX_SERVER_FAILURES=5 # in a row, each within 10 minutes: the server is given up

dry_run=0
stop_requested=0
trainer_flags=()
server_pids=()
server_logs=()
trainer_pid=
first_checkpoint=0
hosts=()

fail() {
    echo "error: $*" >&2
    exit 1
}

# Settings that are numbers; COUNTS may be 0. Checked before any arithmetic, which would run what is written in them.
COUNTS="ENGINE_NODES TEACHER_NODES REWRITER_NODES WIN_RATE_PROMPTS MAX_RESTARTS RESTART_SECONDS"
NUMBERS="TRAINER_NODES GPUS_PER_NODE TENSOR_PARALLEL PIPELINE_PARALLEL ENGINE_TP TEACHER_TP REWRITER_TP SEQ_LENGTH \
TRAINER_PORT ENGINE_PORT TEACHER_PORT REWRITER_PORT START_MINUTES SAVE_SECONDS MAX_SERVER_FAILURES"

check_numbers() {
    local name
    for name in $COUNTS $NUMBERS; do
        [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "$name=${!name}: a whole number is needed"
        [[ ${!name} != 0 || " $COUNTS " == *" $name "* ]] || fail "$name=0: at least 1 is needed"
    done
}

# read_settings ARGUMENTS...: NAME=VALUE sets a variable of the settings, --dry-run only prints commands, what follows --
# goes to the trainer.
read_settings() {
    local name names=" VENV POLICY HF_CONFIG TEACHER_MODEL REWRITER_MODEL DATA RUN_DIR PRESET ENGINE_FLAGS TEACHER_FLAGS \
REWRITER_FLAGS SERVER_ADDRESS $COUNTS $NUMBERS "
    while (($#)); do
        case $1 in
            --dry-run) dry_run=1 ;;
            --)
                shift
                trainer_flags=("$@")
                break
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
    set_ports
    check_numbers
}

# Ports that were not given: of each role 20 from one on that the job's id decides, below those that systems give to clients.
set_ports() {
    local name port=$((10000 + 80 * (${SLURM_JOB_ID:-0} % 280)))
    for name in TRAINER_PORT ENGINE_PORT TEACHER_PORT REWRITER_PORT; do
        [[ -n ${!name} ]] || printf -v "$name" '%s' "$port"
        port=$((port + 20))
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
    local wanted=$((TRAINER_NODES + ENGINE_NODES + TEACHER_NODES + REWRITER_NODES))
    if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
        mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    elif ((dry_run)); then
        mapfile -t hosts < <(seq --format=node%03.0f "$wanted")
    else
        fail "this is no SLURM job: submit it with sbatch, or add --dry-run to see its commands"
    fi
    ((${#hosts[@]} == wanted)) || fail "the job has ${#hosts[@]} nodes, but TRAINER_NODES + ENGINE_NODES + \
TEACHER_NODES + REWRITER_NODES = $wanted: add --nodes=$wanted to sbatch"
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

# await PID: the exit status of a child; a signal that this shell traps does not end the wait.
await() {
    local status
    while true; do
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2> /dev/null || return "$status"
    done
}

# keep_serving LOG WORDS...: a server, started again whenever it ends, until that happens too often. While the job waits for
# its servers to load, the first end is final: most likely a setting is wrong. Runs in a subshell; SIGTERM ends both.
keep_serving() {
    local log=$1 child='' failures=0 stopping=0 started status
    shift
    trap 'stopping=1; [[ -z $child ]] || kill -TERM "$child" 2> /dev/null || true' TERM
    while true; do
        started=$SECONDS
        "$@" >> "$log" 2>&1 &
        child=$!
        ((stopping == 0)) || kill -TERM "$child" 2> /dev/null || true # it came before the child was known
        status=0
        await "$child" || status=$?
        ((stopping == 0)) || exit 0
        [[ -e $RUN_DIR/logs/servers_ready ]] || exit 1
        ((SECONDS - started < 600)) || failures=0
        failures=$((failures + 1))
        if ((failures == MAX_SERVER_FAILURES)); then
            echo "error: a server ended $failures times in a row and is given up, see $log" >&2
            exit 1
        fi
        echo "a server ended with status $status and is started again, see $log" >&2
        sleep "$RESTART_SECONDS" &
        child=$!
        await "$child" || true
        ((stopping == 0)) || exit 0
    done
}

# require_free HOST PORT: nobody listens there; one of an earlier start of this job may still be ending.
require_free() {
    local seconds=0
    # shellcheck disable=SC2016  # for the inner shell
    while timeout 5 bash -c 'exec 3<> "/dev/tcp/$0/$1"' "$1" "$2" 2> /dev/null; do
        ((seconds++ < 30)) || fail "port $2 of $1 belongs to another program: set ENGINE_PORT, TEACHER_PORT or REWRITER_PORT"
        sleep 1
    done
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
                "$VENV/bin/python" -m sglang.launch_server --host="${SERVER_ADDRESS:-$host}"
                --port=$((port + slot)) --tp-size="$tp" --base-gpu-id=$((slot * tp))
                --log-level-http=warning # no line for each of millions of requests
                --random-seed=$((1 + ${#server_urls[@]})) "$@")
            server_urls+=("http://$host:$((port + slot))")
            log=$RUN_DIR/logs/$role-$host-$slot.log
            ((dry_run)) || require_free "$host" $((port + slot)) # or this run would train on another's server
            if ((dry_run)); then
                echo "$(show "${command[@]}") >> $(printf '%q' "$log") 2>&1 &"
            else
                keep_serving "$log" "${command[@]}" &
                server_pids+=($!)
                server_logs+=("$log")
            fi
        done
    done
}

# require_servers: all that were started are still there.
require_servers() {
    local index
    for index in "${!server_pids[@]}"; do
        kill -0 "${server_pids[index]}" 2> /dev/null || give_up "a server ended while starting, see \
${server_logs[index]}, which ends with:" "$(tail -n 20 "${server_logs[index]}" 2>&1)"
    done
}

# wait_healthy URL...: until all answer; gives up when a server has ended or START_MINUTES have passed.
wait_healthy() {
    local url deadline=$((SECONDS + 60 * START_MINUTES))
    for url; do
        if ((dry_run)); then
            echo "# wait until $url/health answers"
            continue
        fi
        until curl --silent --fail --noproxy '*' --max-time 25 --output /dev/null "$url/health"; do
            ((stop_requested == 0)) || finish 0
            require_servers
            ((SECONDS < deadline)) || give_up "$url was not healthy within $START_MINUTES minutes, see $RUN_DIR/logs"
            sleep 2
        done
    done
    ((dry_run)) || require_servers # what answered may not have been ours
    ((dry_run)) || touch "$RUN_DIR/logs/servers_ready"
}

# train WORDS...: the trainer under torchrun on the first TRAINER_NODES hosts; returns its exit status.
train() {
    local nodelist
    nodelist=$(IFS=, && echo "${hosts[*]:0:TRAINER_NODES}")
    step "$nodelist" "$TRAINER_NODES"
    # torchrun passes on the signals that it handles; then the workers have SAVE_SECONDS to finish a step and save it. Its
    # own status is then 1, also after a good save.
    # shellcheck disable=SC2016  # for the shell on each node
    local command=("${step_words[@]}" --kill-on-bad-exit=1
        env CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=8
        # torchrun would guess by the host's name who hosts the rendezvous; where a node is called otherwise, nobody would.
        bash -c '[[ ${SLURMD_NODENAME:-} == "$0" ]] && host=1 || host=0; exec "$1" --rdzv-conf="is_host=$host" "${@:2}"'
        "${hosts[0]}"
        "$VENV/bin/torchrun" --nnodes="$TRAINER_NODES" --nproc-per-node="$GPUS_PER_NODE" --shutdown-timeout="$SAVE_SECONDS"
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
        --rdzv-backend=c10d --rdzv-id="${SLURM_JOB_ID:-0}" --rdzv-endpoint="${hosts[0]}:$TRAINER_PORT"
        -m megatron_sip.train "$@" "${trainer_flags[@]}")
    if ((dry_run)); then
        show "${command[@]}"
        return 0
    fi
    ((stop_requested == 0)) || return 0
    "${command[@]}" > >(tee -a "$RUN_DIR/logs/trainer.log") 2>&1 &
    trainer_pid=$!
    ((stop_requested == 0)) || kill -USR1 "$trainer_pid" 2> /dev/null || true # it came before the trainer was known
    await "$trainer_pid"
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

# On SIGTERM srun would kill its tasks with SIGKILL at once; SIGUSR1 it forwards.
on_term() {
    ((stop_requested == 0)) || return 0
    stop_requested=1
    [[ -z $trainer_pid ]] || kill -USR1 "$trainer_pid" 2> /dev/null || true
}

# The iteration that the run can continue at, 0 if none was saved.
checkpoint() {
    local iteration
    iteration=$(cat "$RUN_DIR/latest_checkpointed_iteration.txt" 2> /dev/null) || true
    [[ $iteration =~ ^[0-9]+$ ]] || iteration=0
    echo "$iteration"
}

# Whether the command can work: the trainer has finished a step, or the job was requeued before. Its exit status does not
# tell, since torchrun ends with 1 whatever happened.
has_worked() {
    local last
    ((${SLURM_RESTART_COUNT:-0} == 0)) || return 0
    [[ $RUN_DIR/metrics.jsonl -nt $RUN_DIR/logs/started ]] || return 1
    last=$(sed -n 's/^{"step": \([0-9]*\),.*/\1/p' "$RUN_DIR/metrics.jsonl" | tail -n 1)
    ((${last:-0} > first_checkpoint))
}

# requeue REASON: the job back into the queue; fails when that did not help MAX_RESTARTS times at the same checkpoint.
requeue() {
    local record requeued
    record="job $SLURM_JOB_ID at checkpoint $(checkpoint)"
    requeued=$(grep --count --line-regexp --fixed-strings -e "$record" "$RUN_DIR/logs/requeued" 2> /dev/null) || true
    if ((${requeued:-0} >= MAX_RESTARTS)); then
        echo "error: $1; not requeued any more, after ${requeued} times at checkpoint $(checkpoint)" >&2
        return 1
    fi
    echo "$record" >> "$RUN_DIR/logs/requeued"
    echo "$1; requeueing job $SLURM_JOB_ID, which then continues"
    scontrol requeue incomplete "$SLURM_JOB_ID" # not when it was cancelled
}

# finish STATUS: stop the servers; a job with more to do goes back into the queue.
finish() {
    local status=$1
    stop_servers
    if ((stop_requested)); then
        ! [[ $RUN_DIR/summary.json -nt $RUN_DIR/logs/started ]] || exit 0 # it is written after the last step
        requeue "stopped before the end" || exit 1
        exit 0
    fi
    if ((status != 0)) && has_worked && requeue "failed with status $status"; then
        exit 0
    fi
    exit "$status"
}

# give_up MESSAGE LINE...: as `fail`, once servers were started.
give_up() {
    echo "error: $1" >&2
    shift
    (($# == 0)) || printf '%s\n' "$@" >&2
    finish 1
}

# read_data: DATA as the array `paths`. One path (or weight) a line when it has several lines, which may hold spaces; else
# separated by spaces. A word that names nothing would only show once all servers have loaded.
read_data() {
    local path
    if [[ $DATA == *$'\n'* ]]; then
        mapfile -t paths < <(sed '/^[[:space:]]*$/d' <<< "$DATA")
    else
        read -ra paths <<< "$DATA"
    fi
    ((dry_run == 0)) || return 0
    for path in "${paths[@]}"; do
        [[ $path =~ ^[0-9]+([.][0-9]*)?$ || -e $path || -e $path.bin ]] || names_files "$path" || fail "DATA: there is no \
file '$path'. Files are separated by spaces; paths that hold some stand in lines of their own: DATA=\$'a b.jsonl\\nc.jsonl'"
    done
}

# names_files PATTERN: whether it matches any file.
names_files() (
    shopt -s globstar
    compgen -G "$1" > /dev/null
)

# run_job HF_FOLDER POLICY_WORDS...: everything. HF_FOLDER holds the policy's config.json and tokenizer.
run_job() {
    local hf=$1 status=0 paths engine_flags teacher_flags rewriter_flags engine_urls teacher_urls rewriter_urls
    shift
    read -ra engine_flags <<< "${ENGINE_FLAGS//$'\n'/ }"
    read -ra teacher_flags <<< "${TEACHER_FLAGS//$'\n'/ }"
    read -ra rewriter_flags <<< "${REWRITER_FLAGS//$'\n'/ }"
    find_hosts
    read_data
    if ((dry_run == 0)); then
        mkdir -p "$RUN_DIR/logs"
        rm -f "$RUN_DIR/logs/servers_ready"
        touch "$RUN_DIR/logs/started"
        first_checkpoint=$(checkpoint)
        trap on_term TERM
        trap stop_servers EXIT
    else
        echo "# the servers, each of them started again when it ends"
    fi

    # The trainer pushes its weights before the first rollout, so engines start with made-up ones. SGLang takes no prompt
    # that comes nearer than eight tokens to the end of its context.
    start_servers engine "$TRAINER_NODES" "$ENGINE_NODES" "$ENGINE_TP" "$ENGINE_PORT" --model-path="$hf" \
        --load-format=dummy --dtype=bfloat16 --enable-fp32-lm-head --context-length=$((SEQ_LENGTH + 8)) \
        --skip-server-warmup "${engine_flags[@]}"
    engine_urls=("${server_urls[@]}")
    start_servers teacher $((TRAINER_NODES + ENGINE_NODES)) "$TEACHER_NODES" "$TEACHER_TP" "$TEACHER_PORT" \
        --model-path="$TEACHER_MODEL" "${teacher_flags[@]}"
    teacher_urls=("${server_urls[@]}")
    start_servers rewriter $((TRAINER_NODES + ENGINE_NODES + TEACHER_NODES)) "$REWRITER_NODES" "$REWRITER_TP" \
        "$REWRITER_PORT" --model-path="$REWRITER_MODEL" "${rewriter_flags[@]}"
    rewriter_urls=("${server_urls[@]}")
    wait_healthy "${engine_urls[@]}" "${teacher_urls[@]}" "${rewriter_urls[@]}"

    local words=(--preset "$PRESET" "$@" --data-path "${paths[@]}" --save "$RUN_DIR" --seq-length "$SEQ_LENGTH"
        --tensor-model-parallel-size "$TENSOR_PARALLEL" --pipeline-model-parallel-size "$PIPELINE_PARALLEL"
        --use-distributed-optimizer --overlap-grad-reduce --distributed-timeout-minutes 60
        --tensorboard-dir "$RUN_DIR/tensorboard" --win-rate-prompts "$WIN_RATE_PROMPTS")
    ((TENSOR_PARALLEL == 1)) || words+=(--sequence-parallel)
    ((ENGINE_NODES == 0)) || words+=(--rollout-url "${engine_urls[@]}")
    ((TEACHER_NODES == 0)) || words+=(--teacher-url "${teacher_urls[@]}")
    ((REWRITER_NODES == 0)) || words+=(--rewriter-url "${rewriter_urls[@]}")
    train "${words[@]}" || status=$?
    ((dry_run)) || finish "$status"
}
