# shellcheck shell=bash disable=SC1091,SC2034,SC2154  # variables are shared with slurm_servers.sh
# What the sbatch scripts share: servers on their own nodes (slurm_servers.sh), the trainer on its own, a clean end. Sourced,
# not run.
#
#   settings -> servers (engines, teacher, rewriter) -> health -> trainer -> stop servers -> requeue if there is more to do
#
# SIGTERM to the batch script (sbatch --signal=B:TERM@SECONDS sends it before the time limit) goes on to the trainer as
# SIGUSR1, upon which it saves the last finished step. The job is then requeued, and the same command continues there. A
# trainer that fails is started again beside the same servers while it comes further each time, and then requeued as well.

source "$(dirname "${BASH_SOURCE[0]}")/slurm_servers.sh"

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
RESTART_SECONDS=5     # until a server or a trainer that ended is started again
MAX_SERVER_FAILURES=5 # in a row, without 10 minutes of health between: the server is given up
HANG_SECONDS=600      # without an answer, a server that was healthy is ended and started again; longer than a push of the weights

dry_run=0
stop_requested=0
trainer_flags=()
trainer_pid=
first_checkpoint=0
furthest_step=0
hosts=()

fail() {
    echo "error: $*" >&2
    exit 1
}

# Settings that are numbers; COUNTS may be 0. Checked before any arithmetic, which would run what is written in them.
COUNTS="ENGINE_NODES TEACHER_NODES REWRITER_NODES WIN_RATE_PROMPTS MAX_RESTARTS RESTART_SECONDS"
NUMBERS="TRAINER_NODES GPUS_PER_NODE TENSOR_PARALLEL PIPELINE_PARALLEL ENGINE_TP TEACHER_TP REWRITER_TP SEQ_LENGTH \
TRAINER_PORT ENGINE_PORT TEACHER_PORT REWRITER_PORT START_MINUTES SAVE_SECONDS MAX_SERVER_FAILURES HANG_SECONDS"

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
    step_words=(srun --overlap --export=ALL --nodes="$2" --ntasks="$2" --ntasks-per-node=1 --nodelist="$1"
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

# keep_training WORDS...: the trainer, started again beside its servers when it fails, as long as each time it came further
# than ever before in this job; then its exit status.
keep_training() {
    local status last
    furthest_step=$first_checkpoint
    while true; do
        status=0
        train "$@" || status=$?
        last=$(last_step)
        ((status != 0 && stop_requested == 0 && last > furthest_step)) || return "$status"
        furthest_step=$last
        echo "the trainer failed with status $status after step $last and is started again, see $RUN_DIR/logs/trainer.log" >&2
        trainer_pid=
        sleep "$RESTART_SECONDS"
    done
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
        env CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=8 "$VENV/bin/python" -m megatron_sip.serving.on_node
        --peers "${hosts[@]}" --
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

# The last step that this job's trainer has finished, or the checkpoint that it began at.
last_step() {
    local last=
    if [[ $RUN_DIR/metrics.jsonl -nt $RUN_DIR/logs/started ]]; then
        last=$(sed -n 's/^{"step": \([0-9]*\),.*/\1/p' "$RUN_DIR/metrics.jsonl" | tail -n 1)
    fi
    echo $((${last:-0} > first_checkpoint ? last : first_checkpoint))
}

# Whether the command can work: the trainer has finished a step, or the job was requeued before. Its exit status does not
# tell, since torchrun ends with 1 whatever happened.
has_worked() {
    ((${SLURM_RESTART_COUNT:-0} > 0 || furthest_step > first_checkpoint))
}

# Whether SLURM is ending this job anyway: it was cancelled, or is being requeued.
is_ending() {
    [[ $(scontrol --oneliner show job "$SLURM_JOB_ID" 2> /dev/null) == *" JobState=COMPLETING "* ]]
}

# requeue REASON: the job back into the queue; fails with 2 when that did not help MAX_RESTARTS times at the same checkpoint.
requeue() {
    local record requeued
    record="job $SLURM_JOB_ID at checkpoint $(checkpoint)"
    requeued=$(grep --count --line-regexp --fixed-strings -e "$record" "$RUN_DIR/logs/requeued" 2> /dev/null) || true
    if ((${requeued:-0} >= MAX_RESTARTS)); then
        echo "error: $1; not requeued any more, after ${requeued} times at checkpoint $(checkpoint)" >&2
        return 2
    fi
    echo "$record" >> "$RUN_DIR/logs/requeued"
    echo "$1; requeueing job $SLURM_JOB_ID, which then continues"
    scontrol requeue incomplete "$SLURM_JOB_ID"
}

# finish STATUS: stop the servers; a job with more to do goes back into the queue.
finish() {
    local status=$1
    stop_servers
    if ! is_ending && ((stop_requested)); then
        ! [[ $RUN_DIR/summary.json -nt $RUN_DIR/logs/started ]] || exit 0 # it is written after the last step
        ! requeue "stopped before the end" || exit 0
        (($(checkpoint) > first_checkpoint && $(checkpoint) >= $(last_step))) || exit 1
    fi
    if is_ending || ((stop_requested)); then
        echo "stopped at step $(checkpoint); the same command continues there" >&2
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

# check_trainer HF_FOLDER WORDS...: mistakes in the trainer's flags show now, and not when all servers have loaded. A dry run of
# names that stand for files checks nothing.
check_trainer() {
    local report=/dev/null words=("${@:2}")
    [[ -e $1/config.json && ${SLURM_RESTART_COUNT:-0} == 0 ]] || return 0
    ((dry_run)) || report=$RUN_DIR/logs/dry_run.txt
    ((ENGINE_NODES == 0)) || words+=(--rollout-url http://engine)
    ((TEACHER_NODES == 0)) || words+=(--teacher-url http://teacher)
    ((REWRITER_NODES == 0)) || words+=(--rewriter-url http://rewriter)
    # The dry run says what the run costs, whether or not servers and texts are there.
    ((dry_run)) || "$VENV/bin/python" -m megatron_sip.config "${words[@]}" "${trainer_flags[@]}" ||
        fail "the trainer refuses these flags"
    WORLD_SIZE=$((TRAINER_NODES * GPUS_PER_NODE)) CUDA_DEVICE_MAX_CONNECTIONS=1 "$VENV/bin/python" -m megatron_sip.train "${words[@]}" \
        "${trainer_flags[@]}" --dry-run > "$report" || fail "the trainer refuses these flags"
}

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
        make_key
    else
        echo "# the servers, each of them started again when it ends"
    fi

    local words=(--preset "$PRESET" "$@" --data-path "${paths[@]}" --save "$RUN_DIR" --seq-length "$SEQ_LENGTH"
        --tensor-model-parallel-size "$TENSOR_PARALLEL" --pipeline-model-parallel-size "$PIPELINE_PARALLEL"
        --use-distributed-optimizer --overlap-grad-reduce
        --tensorboard-dir "$RUN_DIR/tensorboard" --win-rate-prompts "$WIN_RATE_PROMPTS")
    ((TENSOR_PARALLEL == 1)) || words+=(--sequence-parallel)
    check_trainer "$hf" "${words[@]}"

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

    ((ENGINE_NODES == 0)) || words+=(--rollout-url "${engine_urls[@]}" --rollout-key-variable "$KEY_VARIABLE")
    ((TEACHER_NODES == 0)) || words+=(--teacher-url "${teacher_urls[@]}" --teacher-key-variable "$KEY_VARIABLE")
    ((REWRITER_NODES == 0)) || words+=(--rewriter-url "${rewriter_urls[@]}" --rewriter-key-variable "$KEY_VARIABLE")
    keep_training "${words[@]}" || status=$?
    ((dry_run)) || finish "$status"
}
