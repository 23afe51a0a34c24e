#!/usr/bin/env bash
# Train and measure a DFlash draft for MiniMax-M3 on one node. The stages are in recipes/stages.sh, one command each; each
# skips what it has finished and resumes, so you can interrupt this script and run it again. README.md has hardware,
# disk and times.
#
#   recipes/MiniMax-M3-DFlash/run.sh PROMPTS.jsonl [RUN_FOLDER [--set KEY=VALUE ...]]
#
#   RECIPE   default: recipes/MiniMax-M3-DFlash/recipe.yaml; smoke.yaml in this folder runs the same steps on 8 prompts
#   GPUS     number of GPUs of this node (default: all that nvidia-smi lists)
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="${DRAFTLINE_BIN:-$PWD/.venv/bin}:$PATH"

recipe=${RECIPE:-recipes/MiniMax-M3-DFlash/recipe.yaml}
prompts=${1:?PROMPTS.jsonl is missing}
run=${2:-runs/minimax-m3-dflash}
gpus=${GPUS:-$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU ' || true)}  # MIG lines are not GPUs
if [[ ${gpus:-0} -eq 0 ]]; then
  echo "run.sh: found no GPU (nvidia-smi --list-gpus), expected at least one. Set GPUS." >&2
  exit 2
fi
with=(--recipe "$recipe" --set "serve.args.tensor-parallel-size=$gpus" "${@:3}")

# shellcheck source=recipes/stages.sh
source recipes/stages.sh
