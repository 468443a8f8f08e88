# shellcheck shell=bash disable=SC2154  # variables are shared with slurm_job.sh
# The servers of a SLURM job: started on nodes of their own, waited for, stopped. Part of slurm_job.sh, which has the settings.
#
# megatron_sip.serving.job_server is what runs on a server's node: it starts SGLang again when it ends or hangs.

KEY_VARIABLE=MEGATRON_SIP_JOB_KEY # of the environment: holds the key that the job's servers demand
server_pids=()
server_logs=()

# A new key for this start of the job: another job's trainer, or a former self of this one, is refused. The steps get it by
# their environment; no command line and no log shows it.
make_key() {
    declare -gx "$KEY_VARIABLE=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')"
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
    local role=$1 first=$2 nodes=$3 tp=$4 port=$5 host slot log url store_port own_store=()
    shift 5
    server_urls=()
    ((GPUS_PER_NODE % tp == 0)) || fail "$tp GPUs for each $role do not divide a node's $GPUS_PER_NODE GPUs"
    for host in "${hosts[@]:first:nodes}"; do
        for ((slot = 0; slot < GPUS_PER_NODE / tp; slot++)); do
            step "$host" 1
            url=http://$host:$((port + slot))
            log=$RUN_DIR/logs/$role-$host-$slot.log
            # SGLang would find a store's port free and bind it only later, when another server may have it. With data parallelism
            # each of its parts needs one.
            store_port=$((port + GPUS_PER_NODE / tp + slot))
            [[ " $* " == *" --dp"* || " $* " == *" --data-parallel-size"* ]] || own_store=(--nccl-port="$store_port")
            # Every engine samples with a seed of its own: equal seeds would give equal rollouts.
            local command=("${step_words[@]}" env SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 SGLANG_RETURN_ORIGINAL_LOGPROB=1
                "$VENV/bin/python" -m megatron_sip.serving.job_server --url="$url" --log="$log"
                --ready="$RUN_DIR/logs/servers_ready" --max-failures="$MAX_SERVER_FAILURES"
                --restart-seconds="$RESTART_SECONDS" --load-seconds=$((60 * START_MINUTES)) --hang-seconds="$HANG_SECONDS"
                --key-variable="$KEY_VARIABLE" --peers "${hosts[@]:0:TRAINER_NODES}" --
                "$VENV/bin/python" -m sglang.launch_server --host="${SERVER_ADDRESS:-$host}"
                --port=$((port + slot)) "${own_store[@]}" --tp-size="$tp" --base-gpu-id=$((slot * tp))
                --log-level-http=warning # no line for each of millions of requests
                --random-seed=$((1 + ${#server_urls[@]})) "$@")
            server_urls+=("$url")
            # Or this run would train on another's server.
            ((dry_run)) || require_free "$host" $((port + slot))
            ((dry_run || ${#own_store[@]} == 0)) || require_free "$host" "$store_port"
            if ((dry_run)); then
                echo "$(show "${command[@]}") &"
            else
                "${command[@]}" &
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

# srun forwards SIGUSR1, upon which a server ends in peace; on SIGTERM srun kills its tasks at once.
stop_servers() {
    local signal seconds
    for signal in USR1 TERM KILL; do
        ((${#server_pids[@]} == 0)) && return
        kill -s "$signal" "${server_pids[@]}" 2> /dev/null || true
        seconds=0
        while ((seconds++ < 20)) && kill -0 "${server_pids[@]}" 2> /dev/null; do
            sleep 1
        done
        kill -0 "${server_pids[@]}" 2> /dev/null || server_pids=()
    done
}
