#!/usr/bin/env bash
#SBATCH --job-name=draftline-worker
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@180
# One array task: one shard of `synth generate` on one node. Starts as many servers as fit on the node's GPUs, waits until
# they are healthy, runs synth on all of them, and always stops them. Finished rows are kept. Before the time limit the
# task requeues itself; a requeued or preempted task resumes.
# With STAGE=dump, one shard of `dump run`, of a synthesis with the same number of shards, with as many engines as fit.
#
#   sbatch --array=0-63 --gpus-per-node=8 --time=12:00:00 distributed/worker.sh RECIPE INPUT OUTPUT [--set KEY=VALUE ...]
#   STAGE=dump sbatch --array=0-63 --gpus-per-node=8 --dependency=aftercorr:JOB distributed/worker.sh RECIPE OUTPUT STORE
#   synth merge OUTPUT       # after the last task of synth; the last task of a dump joins its shards itself
#
# From the environment, all optional:
#   STAGE                    synth (default) or dump
#   SHARD                    I/N, instead of the array's task and count
#   SHARDS                   number of all shards, for an array of only some of them (sbatch --array=3,17)
#   BACKEND                  vllm or sglang, over the recipe's serve.backend
#   SERVERS                  of this node (default: its GPUs / those of a server by the recipe)
#   ENGINES                  of a dump on this node (default: its GPUs / those of an engine by the recipe)
#   CUDA_VISIBLE_DEVICES     the GPUs to divide among the servers or engines (default: all of the node)
#   THINKING_MODES           as `synth generate --thinking-modes`
#   VLLM_SERVE_EXTRA_ARGS, SGLANG_SERVE_EXTRA_ARGS
#                            more flags of the server, quoted as for a shell: '--hf-overrides "{\"a b\": 1}"'
#   CONTAINER_IMAGE, CONTAINER_MOUNTS
#                            run inside this image, where the cluster has pyxis; mount the project and all folders
#   DRAFTLINE_ROOT           the project's checkout (default: where this file lies; sbatch copies it, so give it there)
#   DRAFTLINE_BIN            the folder of the commands synth, dump and serve (default: the checkout's .venv/bin)
set -euo pipefail

recipe=${1:?RECIPE is missing} input=${2:?INPUT is missing} output=${3:?OUTPUT is missing}
more=("${@:4}")
root=${DRAFTLINE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
[[ -e $root/distributed/worker.sh ]] || root=$(dirname "$0")/..
cd "$root"

if [[ -n ${CONTAINER_IMAGE:-} && -z ${DRAFTLINE_IN_CONTAINER:-} ]]; then
  export DRAFTLINE_IN_CONTAINER=1
  exec srun --ntasks=1 --container-image="$CONTAINER_IMAGE" --container-mounts="${CONTAINER_MOUNTS:-$PWD:$PWD}" \
    --container-workdir="$PWD" bash distributed/worker.sh "$@"
fi
PATH="${DRAFTLINE_BIN:-$PWD/.venv/bin}:$PATH"

shards=${SHARDS:-${SLURM_ARRAY_TASK_COUNT:-0}}
if [[ -z ${SHARD:-} ]] && ((${SLURM_ARRAY_TASK_ID:?neither SHARD nor an array task} >= shards)); then
  echo "worker: task $SLURM_ARRAY_TASK_ID of an array of $shards: give SHARDS, of how many this array is a part" >&2
  exit 2
fi
shard=${SHARD:-$SLURM_ARRAY_TASK_ID/$shards}
stage=${STAGE:-synth}
case ${BACKEND:-} in
  '' | vllm | sglang) ;;
  *) echo "worker: BACKEND is $BACKEND, expected vllm or sglang" >&2; exit 2 ;;
esac
with=(--recipe "$recipe" ${BACKEND:+--set "serve.backend=$BACKEND"} "${more[@]}")
endpoints=() pids=() modes=() work_pid=

cleanup() {
  code=$?
  trap - EXIT TERM INT USR2
  for pid in $work_pid "${pids[@]}"; do kill -TERM "$pid" 2> /dev/null || true; done
  for pid in $work_pid "${pids[@]}"; do wait "$pid" 2> /dev/null || true; done
  exit "$code"
}
trap cleanup EXIT
trap 'echo "worker: stopped; what was finished is kept" >&2; exit 143' TERM INT
trap 'again' USR2

again() {
  echo "worker: the time is nearly over; queued again" >&2
  if [[ -n $work_pid ]]; then
    kill -TERM "$work_pid" 2> /dev/null || true
    wait "$work_pid" || true
  fi
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  scontrol requeue "${job:-$SLURM_JOB_ID}"
  exit 143
}

case $stage in
  synth) ;;
  dump)
    dump run "${with[@]}" --conversations "$input" --output "$output" --shard "$shard" --engines "${ENGINES:-0}" &
    work_pid=$!
    wait "$work_pid"
    work_pid=
    exit
    ;;
  *) echo "worker: STAGE is $stage, expected synth or dump" >&2; exit 2 ;;
esac

# The recipe's backend, and the GPUs of each server, from the server's command.
describe='
import json, sys
words = json.load(sys.stdin)["command"]
backend = "sglang" if "sglang.launch_server" in words else "vllm"
flags = ["--tp", "--pp-size"] if backend == "sglang" else ["--tensor-parallel-size", "--pipeline-parallel-size"]
if backend == "vllm":
    flags += ["--data-parallel-size"]
elif "--enable-dp-attention" not in words:  # with it, the replicas share the GPUs of --tp
    flags += ["--dp-size"]
gpus = 1
for flag in flags:
    gpus *= int(words[words.index(flag) + 1]) if flag in words else 1
print(backend, gpus)'
describe_server() { serve command "${with[@]}" --for synth --format json -- "$@" | python -c "$describe"; }
described=$(describe_server)
extra_args=${VLLM_SERVE_EXTRA_ARGS:-}
[[ $described == sglang* ]] && extra_args=${SGLANG_SERVE_EXTRA_ARGS:-}
extra=()
if [[ -n $extra_args ]]; then
  split='import shlex, sys; sys.stdout.write("".join(word + "\0" for word in shlex.split(sys.argv[1])))'
  mapfile -d '' -t extra < <(python -c "$split" "$extra_args")
  described=$(describe_server "${extra[@]}")
fi
gpus_of_each=${described#* }

# The GPUs of this task: those assigned to it, whatever they are called, or all of the node.
if [[ -n ${CUDA_VISIBLE_DEVICES+assigned} ]]; then
  IFS=, read -r -a devices <<< "$CUDA_VISIBLE_DEVICES"
else
  num_gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU ' || true)
  devices=()
  for ((gpu = 0; gpu < num_gpus; gpu++)); do devices+=("$gpu"); done
fi
gpus=${#devices[@]}
servers=${SERVERS:-$((gpus > gpus_of_each ? gpus / gpus_of_each : 1))}
if ((gpus && servers * gpus_of_each > gpus)); then
  echo "worker: $servers servers of $gpus_of_each GPUs each, expected at most the $gpus GPUs of this task" >&2
  exit 2
fi

logs=$output/shards/worker-${shard//\//-of-}
mkdir -p "$logs"

for ((n = 0; n < servers; n++)); do
  if ((gpus)); then
    CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${devices[*]:n * gpus_of_each:gpus_of_each}")
    export CUDA_VISIBLE_DEVICES
  fi
  serve start "${with[@]}" --for synth --log "$logs/server-$n.log" -- "${extra[@]}" > "$logs/url-$n" &
  pids+=($!)
done

for ((n = 0; n < servers; n++)); do
  until url=$(grep -o '^http[^ ]*' "$logs/url-$n"); do
    if ! kill -0 "${pids[n]}" 2> /dev/null; then
      echo "worker: server $n did not start, its last lines ($logs/server-$n.log):" >&2
      tail -n 20 "$logs/server-$n.log" >&2 || true
      exit 1
    fi
    sleep 0.5
  done
  endpoints+=(--endpoint "$url")
done

[[ -n ${THINKING_MODES:-} ]] && modes=(--thinking-modes "$THINKING_MODES")
synth generate "${with[@]}" --prompts "$input" --output "$output" --shard "$shard" "${modes[@]}" "${endpoints[@]}" &
work_pid=$!
wait "$work_pid"
work_pid=
