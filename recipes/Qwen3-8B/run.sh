#!/usr/bin/env bash
# Train and measure a draft for Qwen3-8B on one node of 1 to 8 GPUs. The stages are in recipes/stages.sh, one command
# each; each skips what it has finished and resumes, so you can interrupt this script and run it again. README.md has
# hardware, disk and times.
#
#   recipes/Qwen3-8B/run.sh PROMPTS.jsonl [RUN_FOLDER [--set KEY=VALUE ...]]
#
#   RECIPE   default: recipes/Qwen3-8B/recipe.yaml; eagle3.yaml and dspark.yaml in this folder train other drafts,
#            smoke.yaml runs the same steps on 8 prompts
#   GPUS     number of GPUs of this node (default: all that nvidia-smi lists)
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="${DRAFTLINE_BIN:-$PWD/.venv/bin}:$PATH"

recipe=${RECIPE:-recipes/Qwen3-8B/recipe.yaml}
prompts=${1:?PROMPTS.jsonl is missing}
run=${2:-runs/qwen3-8b}
gpus=${GPUS:-$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU ' || true)}  # MIG lines are not GPUs
if [[ ${gpus:-0} -eq 0 ]]; then
  echo "run.sh: found no GPU (nvidia-smi --list-gpus), expected at least one. Set GPUS." >&2
  exit 2
fi
# Every GPU holds the target and at most four samples of a batch.
accumulate=1
if [[ $recipe != *smoke.yaml ]]; then
  batch=$(sed -n 's/^ *global_batch_size: *\([0-9]*\).*/\1/p' "$recipe")
  while ((${batch:-32} > 4 * accumulate * gpus)); do accumulate=$((2 * accumulate)); done
fi
with=(--recipe "$recipe" --set "serve.purposes.synth.args.data-parallel-size=$gpus"
  --set "train.gradient_accumulation_steps=$accumulate" "${@:3}")

# shellcheck source=recipes/stages.sh
source recipes/stages.sh
