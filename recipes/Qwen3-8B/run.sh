#!/usr/bin/env bash
# Train and measure a draft for Qwen3-8B on one node of 1 to 8 GPUs, one command per stage. Each stage skips what it has
# finished and resumes, so you can interrupt this script and run it again. README.md has hardware, disk and times.
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

# 0. Check the recipe before anything starts.
recipe check "${with[@]}"

# 1. Hold out one prompt in a hundred, at most 200. With smoke.yaml: 8 prompts to train on, 2 held out.
mkdir -p "$run/prompts"
if [[ $recipe == *smoke.yaml ]]; then
  head -n 8 "$prompts" > "$run/prompts/train.jsonl"
  sed -n '9,10p' "$prompts" > "$run/prompts/held_out.jsonl"
else
  awk 'NR % 100 != 0 || NR > 20000' "$prompts" > "$run/prompts/train.jsonl"
  awk 'NR % 100 == 0 && NR <= 20000' "$prompts" > "$run/prompts/held_out.jsonl"
fi

# 2. Qwen3 answers the prompts.
for split in train held_out; do
  synth generate "${with[@]}" --prompts "$run/prompts/$split.jsonl" --output "$run/synth/$split"
done
synth stats "$run/synth/train"

# 3. Capture the hidden states of the recipe's layers and the final state over these answers, and check them.
dump plan "${with[@]}" --conversations "$run/synth/train"
for split in train held_out; do
  dump run "${with[@]}" --conversations "$run/synth/$split" --output "$run/store/$split"
done
dump verify "${with[@]}" --store "$run/store/train" --once

# 4. Before hours of training: overfit 100 greedy replies, serve the draft, and check that vLLM accepts what training
#    predicts. With `objective: tokens` the replies are memorized fastest.
head -n 100 "$run/prompts/train.jsonl" > "$run/prompts/gate.jsonl"
greedy=("${with[@]}" --set synth.temperature=0)
synth generate "${greedy[@]}" --prompts "$run/prompts/gate.jsonl" --output "$run/synth/gate"
dump run "${greedy[@]}" --conversations "$run/synth/gate" --output "$run/store/gate"
bench gate "${greedy[@]}" --set train.draft.objective=tokens --processes "$gpus" \
  --store "$run/store/gate" --output "$run/gate"

# 5. Train on all GPUs, predict the acceptance length, export the folder that vLLM loads.
torchrun --standalone --nproc-per-node "$gpus" -m train.cli offline "${with[@]}" \
  --store "$run/store/train" --output "$run/draft"
torchrun --standalone --nproc-per-node "$gpus" -m train.cli eval "${with[@]}" --run-folder "$run/draft" \
  --store "$run/store/held_out" --output "$run/eval.json"
train export "${with[@]}" --run "$run/draft" --output "$run/export" --eval "$run/eval.json"

# 6. Measure the held-out prompts without the draft, with the recipe's number of draft tokens and with 1; the model card
#    gets the speeds. Print the command that serves target and draft.
bench acceptance "${with[@]}" --conversations "$run/synth/held_out" --draft "$run/export" --output "$run/bench"
train export "${with[@]}" --run "$run/draft" --output "$run/export" --eval "$run/eval.json" --served "$run/bench"
serve command "${with[@]}" --draft "$run/export" --for production
